"""Whole runs on data that is tokenised while training: images, and streams."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from axolotl_runs import FULL_FINE_TUNING, make_dataset, plan_of, write_config
from axolotl_turns import train_in_turn
from example_stand_ins import trained_layers
from image_data import image_options, make_image_model

pytestmark = pytest.mark.slow

GIVEN = {"layersel": {"first_layer": 2, "report": False}, "skip_prepare_dataset": True}
SCORED = {"layersel": {"num_samples": 8, "report": False}}
PACKED = {"sample_packing": True, "attn_implementation": "sdpa"}
IMAGES: dict[str, dict[str, Any]] = {
    "images-lora": GIVEN,
    "images-full": {**GIVEN, **FULL_FINE_TUNING},
    "images-refused": {**SCORED, "skip_prepare_dataset": True},
    "images-prepared": SCORED,
    "text-with-processor": {**SCORED, **PACKED, "images": False, "sequence_len": 96},
    "less-than-a-batch": {**SCORED, **PACKED, "images": False, "sequence_len": 512},
}
STREAMS: dict[str, dict[str, Any]] = {
    "stream": {},
    "stream-packed": {**PACKED, "pad_to_sequence_len": True},
}


def write_stream(folder: Path, model: Path, options: dict[str, Any]) -> Path:
    """Instructions in two files, read as `streaming: true` reads them."""
    paths = [str(make_dataset(folder, 12, first=12 * part, name=f"part{part}.jsonl")) for part in range(2)]
    datasets = [{"path": path, "ds_type": "json", "split": "train", "type": "alpaca"} for path in paths]
    if "sample_packing" in options:  # opened by axolotl as one data set, without ds_type
        datasets = [{"path": "json", "data_files": paths, "split": "train", "type": "alpaca"}]  # type: ignore[dict-item]
    return write_config(
        folder, model=model, data=folder, datasets=datasets, streaming=True, max_steps=2, **SCORED, **options
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, run_inputs: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """What came of each, all in one process; packing last, for which axolotl changes transformers in memory."""
    root = tmp_path_factory.mktemp("data_runs")
    model = make_image_model(root / "gemma3")
    configs = []
    for name, options in (*IMAGES.items(), *STREAMS.items()):
        folder = root / name
        folder.mkdir()
        if name in STREAMS:
            configs.append(write_stream(folder, run_inputs["model"], options))
        else:
            configs.append(write_config(folder, **image_options(folder, model, max_steps=2, **options)))
    configs.sort(key=lambda path: "sample_packing: true" in path.read_text(encoding="utf-8"))
    results = train_in_turn(root, configs)
    for name, result in results.items():
        if not result["error"]:
            adapter = None if name.endswith("full") else "lora"
            base = run_inputs["model"] if name in STREAMS else model
            result |= {"plan": plan_of(root / name / "out"), "layers": trained_layers(root / name, base, adapter)}
    return results


@pytest.mark.parametrize("name", ["images-lora", "images-full", "text-with-processor", *STREAMS])
def test_a_run_trains_the_plan_s_layers_and_stops_at_the_cut(name: str, runs: dict[str, dict[str, Any]]) -> None:
    """Of an image-text model nothing else is trained: neither the vision tower nor the projector."""
    result = runs[name]
    assert result["error"] == ""
    plan = result["plan"]
    assert result["layers"] == plan["trainable_layers"]
    assert f"proved in the first step: the backward pass stops at layer {plan['first_trainable']}" in result["log"]
    if name in ("images-lora", "images-full"):
        assert plan["trainable_layers"] == [2, 3] and plan["scores"] is None
    else:
        assert plan["first_trainable"] > 0 and plan["sample"]["rows"] == 8


def test_a_run_without_a_step_says_so(runs: dict[str, dict[str, Any]]) -> None:
    """Data that packing cannot fill one batch with: axolotl saves a model and ends well."""
    result = runs["less-than-a-batch"]
    assert result["error"] == ""
    assert "training ended without a single step, so nothing was trained" in result["log"]
    assert "proved in the first step" not in result["log"]


@pytest.mark.parametrize("name", ["images-refused", "images-prepared"])
def test_images_without_a_cut_are_refused_before_anything_is_loaded(name: str, runs: dict[str, dict[str, Any]]) -> None:
    said = runs[name]["said"]
    assert "layersel: `processor_type` has images and text turned into tokens batch by batch while training" in said
    assert "layersel: {first_layer: ...}" in said and "layersel: {plan: ...}" in said
    assert ("with `skip_prepare_dataset: true`" in said) == (name == "images-prepared")
    assert "Loading model" not in runs[name]["log"]
