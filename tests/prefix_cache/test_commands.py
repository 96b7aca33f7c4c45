"""`axolotl layersel cache`, several processes, a run that was killed while it filled, and runs that go without."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from axolotl_runs import (
    BIN,
    SEQUENCE_LEN,
    axolotl,
    logged_losses,
    make_dataset,
    make_model,
    on_several,
    start,
    train,
    train_command,
    write_config,
)
from axolotl_turns import train_in_turn

from axolotl_layersel.config.prefix_cache import cache_conflicts
from axolotl_layersel.prefix_cache.folders import list_caches

pytestmark = pytest.mark.slow

CUT = 3


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return {"model": make_model(folder / "model"), "data": make_dataset(folder, rows=24)}


def config(folder: Path, inputs: dict[str, Path], cache: str, **options: Any) -> Path:
    block = {"first_layer": CUT, "report": False, "prefix_cache": cache, **options.pop("layersel", {})}
    wanted = {"plugins": ["axolotl_test_plugins.FixedSeed", "layersel"], "max_steps": None, "num_epochs": 2}
    return write_config(folder, **inputs, layersel=block, **{**wanted, **options})


def cache_command(*args: str, log: Path) -> Any:
    return start([str(BIN / "python"), "-m", "axolotl_layersel", "cache", *args], log).finish()


def test_the_command_fills_shows_and_clears_and_a_run_uses_what_it_filled(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    path = config(tmp_path, inputs, "off")
    filled = cache_command(str(path), log=tmp_path / "fill.log").check()
    assert not list(tmp_path.glob("out/checkpoint*")) and "'loss'" not in filled.log
    (found,) = list_caches(tmp_path / "prepared" / "layersel_prefix_cache")
    assert found.samples > 10 and found.about["cut"] == CUT  # of 24 rows, those that are short enough
    shown = cache_command(str(path), "--info", log=tmp_path / "info.log").check()
    assert f"cut {CUT}, {found.samples} samples, {found.tokens} tokens" in shown.log

    path = config(tmp_path, inputs, "auto", layersel={"first_layer": CUT}, num_epochs=1)
    ran = train(path).check()
    assert "0 samples were computed now" in ran.log, ran.log[-3000:]

    cleared = cache_command(str(path), "--clear", log=tmp_path / "clear.log").check()
    assert f"removed: {found.path}" in cleared.log and not found.path.exists()


def test_a_run_that_was_killed_while_filling_is_gone_on_with(tmp_path: Path, inputs: dict[str, Path]) -> None:
    path = config(
        tmp_path,
        inputs,
        "disk",
        plugins=["axolotl_test_plugins.SlowFilling", "axolotl_test_plugins.FixedSeed", "layersel"],
    )
    running = start(train_command(path), tmp_path / "killed.log")
    running.wait_for("frozen layers: ")
    running.wait_for("10 rows filled")
    running.signal(signal.SIGKILL)
    assert running.finish().returncode != 0
    again = train(config(tmp_path, inputs, "disk")).check()
    (computed,) = re.findall(r"(\d+) samples were computed now", again.log)
    (of,) = re.findall(r"of (\d+) samples, \d+ tokens", again.log)
    assert 0 < int(computed) <= int(of) - 8, again.log[-3000:]
    assert "0 through the frozen layers" in again.log


def test_two_processes_share_filling_and_train_as_without(tmp_path: Path, inputs: dict[str, Path]) -> None:
    losses = {}
    for name in ("off", "disk"):
        options = on_several({"plugins": ["axolotl_test_plugins.FixedSeed", "layersel"]})
        path = config(tmp_path / name, inputs, name, **options, save_strategy="epoch", micro_batch_size=1)
        ran = train(path, launcher="torchrun", processes=2, timeout=400).check()
        losses[name] = logged_losses(tmp_path / name / "out")
        if name == "disk":
            assert "0 through the frozen layers" in ran.log, ran.log[-3000:]
            indexes = list((tmp_path / name / "prepared" / "layersel_prefix_cache").glob("*/*.safetensors"))
            assert len(indexes) == 2, "each process writes its share"
    assert len(losses["disk"]) >= 8 and losses["disk"] == pytest.approx(losses["off"], rel=1e-4)


def test_auto_goes_without_where_it_cannot_and_says_why(tmp_path: Path, inputs: dict[str, Path]) -> None:
    cases: dict[str, tuple[dict[str, Any], str]] = {
        "one epoch": ({"num_epochs": 1}, "it would save 0.000 of the run"),
        "neftune": ({"neftune_noise_alpha": 5}, "NEFTune adds noise"),
        "dropout": ({"overrides_of_model_config": {"attention_dropout": 0.1}}, "below the cut training is random"),
        "no room": ({"layersel": {"prefix_cache_gb": 1e-6}}, "`prefix_cache_gb` allows 0.0 GB"),
        "gradients": ({"layersel": {"stop_backward": False}}, "`stop_backward: false` sends gradients"),
    }
    configs = [config(tmp_path / name, inputs, "auto", **options) for name, (options, _) in cases.items()]
    runs = train_in_turn(tmp_path, configs)
    for name, (_, why) in cases.items():
        assert not runs[name]["error"], runs[name]["log"][-3000:]
        assert "prefix cache: off: " in runs[name]["log"] and why in runs[name]["log"], name


def test_asked_for_by_name_it_is_an_error_before_training(tmp_path: Path, inputs: dict[str, Path]) -> None:
    path = config(tmp_path / "dropout", inputs, "disk", overrides_of_model_config={"attention_dropout": 0.1})
    small = config(tmp_path / "small", inputs, "ram", layersel={"prefix_cache_gb": 1e-6})
    runs = train_in_turn(tmp_path, [path, small])
    assert "below the cut training is random (layers.0.self_attn.attention_dropout is 0.1" in runs["dropout"]["error"]
    assert "of memory are free" in runs["small"]["error"]
    assert "'loss'" not in runs["dropout"]["log"] + runs["small"]["log"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fsdp_config": {"fsdp_version": 2}}, "FSDP shards the model, and a cache needs whole layers"),
        ({"deepspeed": "deepspeed_configs/zero3.json"}, "ZeRO-3 partitions the model, and a cache"),
        ({"pretraining_dataset": [{"path": "x"}]}, "a stream shows its rows once"),
        ({"streaming": True}, "a stream shows its rows once"),
        ({"neftune_noise_alpha": 5}, "NEFTune adds noise"),
        ({"lora_modules_to_save": ["embed_tokens"]}, "`lora_modules_to_save` trains embeddings"),
        ({"skip_prepare_dataset": True}, "rows become tokens while training"),
        ({"layer_offloading": True}, "`layer_offloading` moves frozen layers"),
        ({"qat": {"weight_dtype": "int4"}}, "`qat` starts to quantise"),
        ({"rl": "dpo", "lora_model_dir": "x"}, "switches frozen adapters of `lora_model_dir` off"),
        ({"layersel": {"prefix_cache": "disk", "stop_backward": False}}, "`stop_backward: false` sends gradients"),
    ],
)
def test_what_forbids_a_cache_is_a_conflict_where_it_is_asked_for(options: dict[str, Any], message: str) -> None:
    base = {
        "plugins": ["layersel"],
        "layersel": {"prefix_cache": "disk", "first_layer": 2},
        "sequence_len": SEQUENCE_LEN,
    }
    (found,) = cache_conflicts({**base, **options})
    assert found.startswith("`prefix_cache: disk`: ") and message in found
    asked = {**base, **options}
    assert not cache_conflicts({**asked, "layersel": {**asked["layersel"], "prefix_cache": "auto"}})
    assert not cache_conflicts(base)


def test_evaluating_and_merging_know_nothing_of_the_cache(tmp_path: Path, inputs: dict[str, Path]) -> None:
    path = config(tmp_path, inputs, "disk", num_epochs=1, save_strategy="epoch", output_dir=str(tmp_path / "out"))
    train(path).check()
    merged = axolotl("merge_lora", str(path), log=tmp_path / "merge.log").check()
    assert "prefix cache" not in merged.log
    assert (
        json.loads((tmp_path / "out" / "merged" / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"] == 6
    )
