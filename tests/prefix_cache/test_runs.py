"""Real axolotl runs with and without the cache: the same losses and saved weights; frozen layers do not run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from axolotl_runs import FULL_FINE_TUNING, instruction_rows, make_dataset, make_model, write_config
from axolotl_turns import WITNESS, train_in_turn
from safetensors.torch import load_file

from axolotl_layersel.plan import read_plan

pytestmark = pytest.mark.slow

CUT = 3
MODES: dict[str, dict[str, Any]] = {
    "lora": {"val_set_size": 0.2, "eval_strategy": "epoch", "gradient_checkpointing": False},
    "accumulated": {"gradient_accumulation_steps": 2, "group_by_length": True},
    "reentrant": {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "full": FULL_FINE_TUNING,
    "qlora": {"adapter": "qlora", "load_in_4bit": True},
    "dpo": {"rl": "dpo"},
    "full dpo": {"rl": "dpo", **FULL_FINE_TUNING},
    "kto": {"rl": "kto", "remove_unused_columns": False},
    "simpo": {"rl": "simpo", "simpo_gamma": 0.5},
    "packed": {
        "sample_packing": True,
        "attn_implementation": "sdpa",
        "eval_sample_packing": False,
        "sequence_len": 640,
    },
}
WHERE = {"ram": "ram", "disk": "disk", "again": "disk"}  # the third run finds what the second wrote


def preference_rows(folder: Path, rl: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for i, row in enumerate(instruction_rows(16)):
        if rl == "kto":
            rows.append({"prompt": row["instruction"], "completion": row["output"], "label": i % 2 == 0})
        else:
            rows.append({"prompt": row["instruction"], "chosen": row["output"], "rejected": f"It is {i}."})
    path = folder / f"{rl}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    kind = {"field_prompt": "prompt", "prompt_format": "{prompt}"}
    return [{"path": str(path), "ds_type": "json", "split": "train", "type": kind}]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("runs")
    model, data = make_model(folder / "model"), make_dataset(folder, rows=24)
    configs = []
    for mode, options in MODES.items():
        for name in ("off", *WHERE):
            here = folder / f"{mode} {name}"
            here.mkdir()
            config = {
                "plugins": ["axolotl_test_plugins.FixedSeed", "layersel", "axolotl_test_plugins.LayerCalls", WITNESS],
                "layersel": {
                    "first_layer": CUT,
                    "report": False,
                    "prefix_cache": WHERE.get(name, "off"),
                    "offload_prefix": name in ("ram", "disk"),  # from the host's memory to mapped files
                },
                "dataset_prepared_path": str(folder / f"{mode} prepared"),
                "dataset_num_proc": 0,
                "max_steps": None,
                "num_epochs": 2,
                "learning_rate": 0.001 if name != "again" else 0.002,
                **options,
            }
            if rl := options.get("rl"):
                config["datasets"] = preference_rows(folder, rl)
            configs.append(write_config(here, model=model, data=data, **config))
    results = train_in_turn(folder, configs, timeout=1500)
    return {name: {**result, "folder": folder / name} for name, result in results.items()}


def saved(run: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights that a run left: adapters, or the model."""
    (file,) = (run["folder"] / "out").glob("*model.safetensors")
    return load_file(file)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["ram", "disk"])
def test_losses_are_those_of_a_run_without_the_cache(mode: str, name: str, runs: dict[str, dict[str, Any]]) -> None:
    without, cached = runs[f"{mode} off"], runs[f"{mode} {name}"]
    assert not without["error"] and not cached["error"], without["error"] + cached["error"] + cached["log"][-3000:]
    assert len(cached["losses"]) == len(without["losses"]) >= 4
    # The rounding of one forward pass in another batch, and ten times that after steps that divide by small numbers.
    first, *later = zip(cached["losses"], without["losses"], strict=True)
    assert first[0] == pytest.approx(first[1], rel=1e-5, abs=1e-6)
    assert all(a == pytest.approx(b, rel=1e-4, abs=1e-5) for a, b in later)


@pytest.mark.parametrize("mode", MODES)
def test_every_batch_came_from_the_cache(mode: str, runs: dict[str, dict[str, Any]]) -> None:
    for name in WHERE:
        log = runs[f"{mode} {name}"]["log"]
        hits, misses = map(int, re.findall(r"(\d+) batches from the cache, (\d+) through the frozen", log)[0])
        assert (hits > 0, misses) == (True, 0), f"{mode} {name}: {log[-3000:]}"


@pytest.mark.parametrize("mode", MODES)
def test_a_later_run_with_other_settings_computes_nothing_again(mode: str, runs: dict[str, dict[str, Any]]) -> None:
    first, again = (
        re.findall(r"(\d+) samples were computed now", runs[f"{mode} {n}"]["log"]) for n in ("disk", "again")
    )
    assert int(first[0]) > 0 and again == ["0"]


@pytest.mark.parametrize("name", ["ram", "disk"])
@pytest.mark.parametrize("mode", ["lora", "reentrant", "qlora", "packed"])
def test_saved_adapters_are_those_of_a_run_without_the_cache(
    mode: str, name: str, runs: dict[str, dict[str, Any]]
) -> None:
    without, cached = saved(runs[f"{mode} off"]), saved(runs[f"{mode} {name}"])
    assert cached.keys() == without.keys() and len(cached) == 2 * 7 * 3  # both factors, projections, trained layers
    for key, weight in without.items():
        assert cached[key].dtype == weight.dtype
        same_change(cached[key], weight, start=torch.zeros_like(weight))


@pytest.mark.parametrize("name", ["ram", "disk"])
def test_saved_models_are_those_of_a_run_without_the_cache(name: str, runs: dict[str, dict[str, Any]]) -> None:
    """Frozen weights lay in mapped files when the model was saved."""
    without, cached = saved(runs["full off"]), saved(runs[f"full {name}"])
    base = load_file(runs["full off"]["folder"].parent / "model" / "model.safetensors")
    assert cached.keys() == without.keys() == base.keys()
    for key, weight in without.items():
        layer = re.search(r"layers\.(\d+)", key)
        frozen = int(layer[1]) < CUT if layer else "embed_tokens" in key
        assert torch.equal(weight, base[key]) == frozen, key
        if frozen:
            assert torch.equal(cached[key], weight), key
        else:
            same_change(cached[key], weight, start=base[key])


def same_change(one: torch.Tensor, other: torch.Tensor, *, start: torch.Tensor) -> None:
    """Adam turns a gradient that is nothing but rounding into a whole step; there are few such entries."""
    assert (one - other).norm() <= 1e-3 * (other - start).norm()


@pytest.mark.parametrize("mode", ["lora", "packed", "full"])
def test_the_plan_knew_what_the_cache_would_take(mode: str, runs: dict[str, dict[str, Any]]) -> None:
    run = runs[f"{mode} disk"]
    tokens = re.findall(r"samples, (\d+) tokens, .* GB in ", run["log"])
    prediction = read_plan(run["folder"] / "out").prediction
    assert prediction is not None and prediction.cache is not None and prediction.per_cut.frozen_forward is not None
    cache, frozen = prediction.cache, prediction.per_cut.frozen_forward[CUT]
    assert [str(cache.tokens)] == tokens and cache.bytes_per_token == 4 * 32
    assert cache.epochs == 2 and cache.first_epoch == prediction.step
    assert cache.whole_run == pytest.approx((cache.first_epoch + cache.later_epochs) / 2)
    assert cache.later_epochs == pytest.approx(prediction.step - frozen)
    assert prediction.per_cut.whole_run and prediction.per_cut.whole_run[CUT] == cache.whole_run
    assert prediction.memory and prediction.memory.offloaded == cache.offloaded_bytes > 0
    assert f"FLOPs of the whole run {cache.whole_run:.2f}" in run["log"]


def test_without_a_cache_the_plan_has_none(runs: dict[str, dict[str, Any]]) -> None:
    prediction = read_plan(runs["lora off"]["folder"] / "out").prediction
    assert prediction and prediction.cache is None and prediction.per_cut.whole_run is None
    assert prediction.memory and prediction.memory.offloaded == 0 and prediction.memory.total > 0
