"""ZeRO-2 and ZeRO-3 inside axolotl, over real processes on the CPU: `make test-deepspeed`; skipped without DeepSpeed.

axolotl's own process group is DeepSpeed's here, joined by gloo. The first start compiles an operator, which takes a
compiler and a minute.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from axolotl_runs import (
    Finished,
    make_dataset,
    make_model,
    on_several,
    plan_of,
    start,
    train_command,
    write_config,
)
from example_stand_ins import sharded_example, trained_layers
from safetensors.torch import load_file

from axolotl_layersel.integration.output_folder import LOCK_FILE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]

ENVIRONMENT = {"DS_ACCELERATOR": "cpu"}


def _config(folder: Path, stage: int, *, model: Path, data: Path, **changes: Any) -> Path:
    zero = {
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": False,
            "stage3_gather_16bit_weights_on_model_save": True,
            "stage3_param_persistence_threshold": 0,  # else all of a tiny model stays whole
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "zero.json").write_text(json.dumps(zero), encoding="utf-8")
    options = on_several({"layersel": {"num_samples": 13, "report": False}, "max_steps": 2, **changes})
    options["plugins"] = ["axolotl_test_plugins.CpuZero", *options["plugins"]]
    return write_config(folder, model=model, data=data, deepspeed=str(folder / "zero.json"), use_cpu=None, **options)


def _train(config: Path, *, processes: int = 2, timeout: float = 600) -> Finished:
    command = train_command(config, launcher="torchrun", processes=processes)
    return start(command, config.parent / "log", env=ENVIRONMENT).finish(timeout=timeout)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_lora_run_is_scored_as_one_process_scores_it(
    tmp_path: Path, run_inputs: dict[str, Path], uninterrupted: Path, stage: int
) -> None:
    run = _train(_config(tmp_path, stage, **run_inputs)).check()
    plan, alone = plan_of(tmp_path / "out"), plan_of(uninterrupted)
    assert plan["scores"]["deviation"] == pytest.approx(alone["scores"]["deviation"], abs=1e-6)
    assert plan["scores"]["stability"] == alone["scores"]["stability"]
    assert plan["trainable_layers"] == alone["trainable_layers"]
    assert plan["sample"] == alone["sample"]
    assert run.log.count(f"proved in the first step: the backward pass stops at layer {plan['first_trainable']}") == 2
    assert ("because DeepSpeed has partitioned the weights" in run.log) == (stage == 3)
    assert trained_layers(tmp_path, run_inputs["model"], "lora") == plan["trainable_layers"]


def test_one_process_under_zero_3_has_the_scores_of_one_without_it(
    tmp_path: Path, run_inputs: dict[str, Path], uninterrupted: Path
) -> None:
    """To the last bit: the same rows in the same batches, layer by layer."""
    _train(_config(tmp_path, 3, **run_inputs, max_steps=1), processes=1).check()
    plan, alone = plan_of(tmp_path / "out"), plan_of(uninterrupted)
    assert plan["scores"]["deviation"] == alone["scores"]["deviation"]
    assert plan["trainable_layers"] == alone["trainable_layers"]


@pytest.mark.parametrize("options", [{"num_samples": 2}, {"first_layer": 3}], ids=["scored", "given"])
def test_full_fine_tuning_under_zero_3_changes_the_suffix_alone(
    tmp_path: Path, run_inputs: dict[str, Path], options: dict[str, Any]
) -> None:
    """On three processes, of which one has no row to score; and with a given cut, which scores nothing."""
    changes = {"adapter": None, "lora_target_linear": None, "layersel": {**options, "report": False}}
    run = _train(_config(tmp_path, 3, **run_inputs, **changes), processes=3 if "num_samples" in options else 2).check()
    plan = plan_of(tmp_path / "out")
    assert (plan["scores"] is None) == ("first_layer" in options)
    cut = plan["first_trainable"]
    assert f"proved in the first step: the backward pass stops at layer {cut}" in run.log
    before, after = (load_file(path / "model.safetensors") for path in (run_inputs["model"], tmp_path / "out"))
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    suffix = tuple(f"model.layers.{layer}." for layer in range(cut, 6))
    assert changed == {name for name in before if name.startswith((*suffix, "model.norm", "lm_head"))}


def test_all_stop_with_the_error_of_one(tmp_path: Path) -> None:
    """One row holds a word whose embedding is broken; the process that has it fails, and nobody waits for a layer."""
    data = make_dataset(tmp_path)
    lines = data.read_text().splitlines()
    lines[5] = lines[5].replace("The sum", "^ sum")
    data.write_text("\n".join(lines))

    def break_embedding(model: Any) -> None:
        model.get_input_embeddings().weight[_token(tmp_path / "tokenizer")] = float("nan")

    model = make_model(tmp_path / "model", change=break_embedding)
    run = _train(_config(tmp_path, 3, model=model, data=data, layersel={"num_samples": 64}), timeout=400)
    assert run.returncode != 0
    assert "ScoringError: training rows give latent states that are not finite" in run.log
    assert re.search(r"PeerError: rank [01] failed: ScoringError: ", run.log)
    assert {path.name for path in (tmp_path / "out" / "layersel").glob("*")} <= {LOCK_FILE}


def _token(folder: Path) -> int:
    from axolotl_runs import make_tokenizer

    (token,) = make_tokenizer()("^", add_special_tokens=False)["input_ids"]
    return int(token)


def test_all_end_when_one_is_killed(tmp_path: Path, run_inputs: dict[str, Path]) -> None:
    data = make_dataset(tmp_path / "many rows", rows=1500)
    changes = {"layersel": {"num_samples": 1500}, "micro_batch_size": 1}
    config = _config(tmp_path, 3, **{**run_inputs, "data": data}, **changes)
    run = start(train_command(config, launcher="torchrun", processes=2), tmp_path / "log", env=ENVIRONMENT)
    run.wait_for("layersel: scoring layer")
    workers = [child for child in psutil.Process(run.process.pid).children() if "axolotl.cli.train" in child.cmdline()]
    workers[1].kill()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert alive == []
    assert run.finish(timeout=120).returncode != 0
    assert {path.name for path in (tmp_path / "out" / "layersel").glob("*")} <= {LOCK_FILE}


def test_the_zero_3_example_scores_and_trains_on_two_processes(tmp_path: Path) -> None:
    run = _train(sharded_example("llama-3.1-8b-full-zero3", tmp_path)).check()
    plan = plan_of(tmp_path / "out")
    assert plan["scores"] is not None
    assert "because DeepSpeed has partitioned the weights" in run.log
    assert run.log.count(f"proved in the first step: the backward pass stops at layer {plan['first_trainable']}") == 2
    assert set(trained_layers(tmp_path, tmp_path / "model", None)) - {-1} == set(plan["trainable_layers"])
    assert len(run.losses) == 2
