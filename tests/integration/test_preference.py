"""Preference data is scored on the tokens that its trainer trains on; the trainers here are TRL's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from axolotl_runs import FULL_FINE_TUNING, instruction_rows, make_tokenizer, plan_of, write_config
from axolotl_turns import WITNESS, train_in_turn
from datasets import Dataset
from models import CASES
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from axolotl_layersel.integration.preference_rows import PreferenceRows
from axolotl_layersel.method.calibration import IGNORED, CalibrationError, draw_rows

CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
LLAMA = next(case for case in CASES if case.name == "Llama")


def paired(count: int = 4) -> list[dict[str, Any]]:
    """Prompts with a right answer, chosen, and a wrong one."""
    return [
        {"prompt": row["instruction"] + "\n", "chosen": row["output"], "rejected": f"It is {i}."}
        for i, row in enumerate(instruction_rows(count))
    ]


def conversations(count: int = 4) -> list[dict[str, Any]]:
    """The same as lists of messages."""
    return [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in paired(count)
    ]


def judged(count: int = 4) -> list[dict[str, Any]]:
    """Single completions, every other one undesirable."""
    return [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2 == 0}
        for i, row in enumerate(paired(count))
    ]


def tokenizer() -> PreTrainedTokenizerFast:
    made = make_tokenizer()
    made.chat_template = CHAT
    return made


def trained_on(rl: str, rows: list[dict[str, Any]], folder: Path) -> list[dict[str, list[int]]]:
    """Tokens and labels of the completions to come closer to, as TRL's trainer prepares them."""
    config, trainer_class = {
        "dpo": (DPOConfig, DPOTrainer),
        "kto": (KTOConfig, KTOTrainer),
        "orpo": (ORPOConfig, ORPOTrainer),
        "simpo": (CPOConfig, CPOTrainer),
    }[rl]
    options: dict[str, Any] = {"output_dir": str(folder), "max_length": 200, "report_to": [], "use_cpu": True}
    reference = {}
    if rl in ("dpo", "kto"):
        options["bf16"] = False
        reference = {"ref_model": LLAMA.model(vocab_size=512)}
    if rl == "simpo":
        options["loss_type"] = "simpo"
    trainer = trainer_class(
        model=LLAMA.model(vocab_size=512),
        args=config(**options),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        **reference,
    )
    made = []
    for row in trainer.train_dataset:
        if "chosen_labels" in row:
            made.append({"input_ids": row["chosen_input_ids"], "labels": row["chosen_labels"]})
        elif row.get("label", True):
            completion = row.get("chosen_ids") or row["completion_ids"]
            prompt = row["prompt_ids"]
            made.append({"input_ids": prompt + completion, "labels": [IGNORED] * len(prompt) + completion})
    return made


@pytest.mark.parametrize(
    ("rl", "rows"),
    [
        ("dpo", paired()),
        ("dpo", conversations()),
        ("kto", judged()),
        ("kto", paired()),
        ("orpo", paired()),
        ("orpo", conversations()),
        ("simpo", paired()),
    ],
    ids=["DPO", "DPO conversations", "KTO", "KTO pairs", "ORPO", "ORPO conversations", "SimPO"],
)
def test_rows_are_the_trainer_s_own(rl: str, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    ours = PreferenceRows(Dataset.from_list(rows), rl=rl, tokenizer=tokenizer(), max_length=200)
    made = [ours[index] for index in range(len(ours))]
    scored = [row for row in made if set(row["labels"]) != {IGNORED}]
    assert scored == trained_on(rl, rows, tmp_path)
    assert all(IGNORED in row["labels"] and len(row["labels"]) == len(row["input_ids"]) for row in scored)


def test_ipo_is_tokenised_as_dpo_is() -> None:
    dpo, ipo = (PreferenceRows(paired(), rl=rl, tokenizer=tokenizer(), max_length=200) for rl in ("dpo", "ipo"))
    assert [dpo[i] for i in range(len(dpo))] == [ipo[i] for i in range(len(ipo))]


def test_undesirable_completions_are_not_drawn() -> None:
    options: dict[str, Any] = {"num_samples": 64, "max_tokens": 10_000, "seed": 0, "sequence_len": 200}
    rows = PreferenceRows(judged(6), rl="kto", tokenizer=tokenizer(), max_length=200)
    assert len(draw_rows(rows, **options).rows) == 3
    worse = [{**row, "label": False} for row in judged(6)]
    with pytest.raises(CalibrationError, match="all 6 rows of the training set have every label masked"):
        draw_rows(PreferenceRows(worse, rl="kto", tokenizer=tokenizer(), max_length=200), **options)


@pytest.mark.parametrize("column", ["image", "images"])
def test_images_are_refused_because_their_tokens_are_made_while_training(column: str) -> None:
    """TRL takes data with one of these columns for images, and axolotl 0.21 trains on them."""
    rows = Dataset.from_list([{**row, column: "a picture"} for row in paired()])
    with pytest.raises(ValueError, match=f"the column '{column}'.*cannot be scored.*first_layer.*plan"):
        PreferenceRows(rows, rl="dpo", tokenizer=tokenizer(), max_length=64)


def test_other_kinds_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="rl is 'grpo'; allowed are dpo, ipo, orpo, simpo, kto"):
        PreferenceRows([], rl="grpo", tokenizer=tokenizer(), max_length=200)


# ---- whole runs ----------------------------------------------------------------------------------------------------

TRAINERS = {
    "dpo": "AxolotlDPOTrainer",
    "ipo": "AxolotlDPOTrainer",
    "kto": "AxolotlKTOTrainer",
    "orpo": "AxolotlORPOTrainer",
    "simpo": "AxolotlCPOTrainer",
}
FULL = ("dpo", "kto")  # also without adapters, where a second model is loaded as reference
RUNS = [*(f"{rl}-lora" for rl in TRAINERS), *(f"{rl}-full" for rl in FULL)]


def data_of(rl: str, folder: Path) -> dict[str, Any]:
    """An entry of `datasets:` with 24 rows of that kind."""
    kind: Any
    if rl == "orpo":
        kind = "chat_template.argilla"
        rows = [
            {key: [*row["prompt"], *row[key]] for key in ("chosen", "rejected")}
            | {"prompt": row["prompt"][0]["content"]}
            for row in conversations(24)
        ]
    elif rl == "kto":
        kind, rows = {"field_prompt": "prompt", "prompt_format": "{prompt}"}, judged(24)
    else:
        kind, rows = {"field_prompt": "prompt", "prompt_format": "{prompt}"}, paired(24)
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"path": str(path), "ds_type": "json", "split": "train", "type": kind}


def write_runs(root: Path, model: Path) -> list[Path]:
    """A config for each of `RUNS`, in a folder of its name."""
    configs = []
    for name in RUNS:
        rl, _, mode = name.partition("-")
        folder = root / name
        folder.mkdir()
        options: dict[str, Any] = {"chat_template": "jinja", "chat_template_jinja": CHAT} if rl == "orpo" else {}
        if mode == "full":
            options |= FULL_FINE_TUNING
        if rl == "kto":
            options["remove_unused_columns"] = False
        if rl == "simpo":
            options["simpo_gamma"] = 0.5
        configs.append(
            write_config(
                folder,
                model=model,
                data=folder,
                rl=rl,
                datasets=[data_of(rl, folder)],
                plugins=["layersel", WITNESS],
                layersel={"num_samples": 16, "coverage": 0.9, "report": False},
                dataset_num_proc=0,
                max_steps=3,
                **options,
            )
        )
    return configs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, run_inputs: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """What came of each of `RUNS`, all in one process."""
    root = tmp_path_factory.mktemp("preference")
    configs = write_runs(root, run_inputs["model"])
    results = train_in_turn(root, configs)
    for name, result in results.items():
        if not result["error"]:
            result["plan"] = plan_of(root / name / "out")
    return results


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_scores_trains_the_plan_s_layers_and_stops_at_the_cut(name: str, runs: dict[str, dict[str, Any]]) -> None:
    """Without an adapter a second model is loaded as reference, with the same hooks: it must be left alone."""
    rl, _, mode = name.partition("-")
    result = runs[name]
    assert result["error"] == ""
    plan = result["plan"]
    assert plan["adapter"] == ("lora" if mode == "lora" else None)
    assert plan["sample"]["rows"] == (12 if rl == "kto" else 16), "KTO: every other completion is undesirable"
    assert plan["scores"] is not None and 0 < plan["first_trainable"] < 6
    assert result["trainer"] == TRAINERS[rl] and result["steps"] == 3
    assert result["layers"] == plan["trainable_layers"]
    if mode == "lora":
        assert result["adapters"] and result["changed"] == []
    else:
        assert {"lm_head.weight", "model.norm.weight"} < set(result["changed"])
        assert "model.embed_tokens.weight" not in result["changed"]
    assert result["reference"] == ([] if mode == "full" else None)
    assert f"proved in the first step: the backward pass stops at layer {plan['first_trainable']}" in result["log"]
    parts = result["log"].split("All parameters are frozen")
    assert len(parts) == (2 if mode == "lora" and rl in ("dpo", "ipo", "kto") else 1)
    assert [part.count("this trainer adds the adapters itself") for part in parts] == ([1, 0] if parts[1:] else [0])
