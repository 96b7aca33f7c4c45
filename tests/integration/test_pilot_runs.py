"""A pilot inside axolotl's own runs: in plan and log, within its cost, and training is none the wiser."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from axolotl.utils.dict import DictDefault
from axolotl_runs import FULL_FINE_TUNING, make_dataset, make_model, on_several, plan_of, train, write_config
from axolotl_turns import WITNESS, train_in_turn
from datasets import load_from_disk

from axolotl_layersel.integration.pilot_settings import pilot_settings
from axolotl_layersel.integration.run_settings import settings_of
from axolotl_layersel.method.calibration import Row, Sample

ROWS, STEPS, BATCH = 64, 40, 8
PILOT = {"num_samples": ROWS, "pilot": True, "pilot_share": 0.6, "coverage": 0.4, "report": False}
RUN = {"max_steps": STEPS, "num_epochs": 10, "micro_batch_size": BATCH, "logging_steps": 10, "learning_rate": 0.002}
MODES: dict[str, dict[str, Any]] = {
    "lora": {},
    "full": FULL_FINE_TUNING,
    "qlora": {"adapter": "qlora", "load_in_4bit": True},
    "packed": {"sample_packing": True, "attn_implementation": "sdpa"},
}
SHORT: dict[str, dict[str, Any]] = {
    "short by steps": {},
    "short by epochs": {"max_steps": None, "num_epochs": 2},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return {"model": make_model(folder / "model", hidden_size=64), "data": make_dataset(folder, ROWS)}


def _config(folder: Path, inputs: dict[str, Path], options: dict[str, Any], **overrides: Any) -> Path:
    plugins = ["axolotl_test_plugins.FixedSeed", "layersel", WITNESS]
    return write_config(folder, **{**inputs, **RUN, **overrides}, plugins=plugins, layersel=options)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, inputs: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """What came of each, all in one process; packing last, for which axolotl changes transformers in memory."""
    root = tmp_path_factory.mktemp("pilot_runs")
    cheap = {**PILOT, "pilot_share": 0.001}
    configs = [_config(root / name, inputs, cheap, **overrides) for name, overrides in SHORT.items()]
    configs += [_config(root / mode, inputs, PILOT, **overrides) for mode, overrides in MODES.items()]
    plan = str(root / "lora" / "out" / "layersel" / "plan.json")
    configs.insert(-1, _config(root / "without a pilot", inputs, {"plan": plan}))
    results = train_in_turn(root, configs)
    for name, result in results.items():
        if not result["error"]:
            result["plan"] = plan_of(root / name / "out")
        result["folder"] = root / name
    return results


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_run_pilots_then_trains_the_plan_s_layers(mode: str, runs: dict[str, dict[str, Any]]) -> None:
    run = runs[mode]
    assert run["error"] == ""
    plan, scores = run["plan"], run["plan"]["scores"]
    pilot = scores["pilot"]
    assert scores["gain_source"] == "pilot" and scores["exponent"] is None
    assert 8 <= pilot["steps"] <= 40 and 0 < pilot["cost_share"] <= PILOT["pilot_share"]
    whole, *parts = pilot["cuts"]
    assert (whole["first_trainable"], whole["retention"], parts[-1]["first_trainable"]) == (0, 1.0, 5)
    assert whole["loss"] < pilot["base_loss"]
    for cut in pilot["cuts"]:
        assert f"layersel: pilot, layers {cut['first_trainable']} to 5 at rate {cut['learning_rate']:.2g}" in run["log"]
    assert any(f"comes from a pilot of {pilot['steps']} steps" in note for note in plan["notes"])
    assert run["layers"] == plan["trainable_layers"]
    assert f"proved in the first step: the backward pass stops at layer {plan['first_trainable']}" in run["log"]


@pytest.mark.slow
def test_training_after_a_pilot_is_that_of_the_same_plan_without_one(runs: dict[str, dict[str, Any]]) -> None:
    """The model, its weights and what is drawn at random are as if there had been no pilot."""
    piloted, again = runs["lora"], runs["without a pilot"]
    assert "pilot, layers" not in again["log"]
    assert len(piloted["losses"]) == STEPS // RUN["logging_steps"]
    assert piloted["losses"] == again["losses"]
    assert again["plan"]["scores"] == piloted["plan"]["scores"]


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_a_demanded_pilot_that_does_not_pay_stops_the_run_and_says_what_would(
    name: str, runs: dict[str, dict[str, Any]]
) -> None:
    """The run's tokens are those of its steps, or of its epochs where these end first."""
    run = runs[name]
    (prepared,) = (path for path in (run["folder"] / "prepared").iterdir() if path.is_dir())
    lengths = [len(ids) for ids in load_from_disk(str(prepared))["input_ids"]]  # without rows that are too long
    row = sum(lengths) / len(lengths)
    tokens = row * (STEPS * BATCH if name == "short by steps" else SHORT[name]["num_epochs"] * len(lengths))
    said = re.fullmatch(
        r"no pilot can be run: a run of ([\d,]+) tokens is too short for a pilot that costs 0.001 of it: raise "
        r"pilot_share to (\d\.\d{3}) to have one. Set `pilot: auto` to go on with the forward pass alone",
        run["said"],
    )
    assert said, run["error"]
    assert int(said[1].replace(",", "")) == pytest.approx(tokens, abs=1)
    assert 0.05 < float(said[2]) <= 1  # as much as the option allows
    assert not (run["folder"] / "out" / "layersel" / "plan.json").exists()


@pytest.mark.slow
def test_two_processes_run_the_pilot_of_one(
    tmp_path: Path, inputs: dict[str, Path], runs: dict[str, dict[str, Any]]
) -> None:
    """Each trains on as many rows as the one, so the pilot may cost as much; it runs on the main process alone."""
    config = write_config(tmp_path, **inputs, **RUN, **on_several({"layersel": PILOT}))
    run = train(config, processes=2).check()
    ours, theirs = (plan["scores"]["pilot"] for plan in (plan_of(tmp_path / "out"), runs["lora"]["plan"]))
    assert (ours["steps"], ours["rows"], ours["heldout_rows"]) == (
        theirs["steps"], theirs["rows"], theirs["heldout_rows"],
    )  # fmt: skip
    for one, other in zip(ours["cuts"], theirs["cuts"], strict=True):
        assert one["retention"] == pytest.approx(other["retention"], abs=1e-4)
    assert run.log.count("layersel: pilot, layers 5 to 5 at rate") == 1


def test_preference_training_has_no_pilot_and_none_is_demanded_of_it() -> None:
    sample = Sample(rows=(Row((1, 2, 3), (-100, 2, 3)),))
    config = {"output_dir": "out", "base_model": "m", "micro_batch_size": 2, "sequence_len": 8, "max_steps": 9}
    auto = settings_of(DictDefault({**config, "rl": "dpo"}))
    assert pilot_settings(auto, sample, [0], world_size=1) is None
    demanded = settings_of(DictDefault({**config, "rl": "dpo", "layersel": {"pilot": True}}))
    with pytest.raises(ValueError, match="`pilot: true` with `rl: dpo`: a pilot trains on next tokens"):
        pilot_settings(demanded, sample, [0], world_size=1)
    never = settings_of(DictDefault({**config, "layersel": {"pilot": False}}))
    assert pilot_settings(never, sample, [0], world_size=1) is None
