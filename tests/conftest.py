"""Fixtures that several test files share: one tiny model and one data set for a whole session."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest

hypothesis.settings.register_profile("long", max_examples=2000)
# Read when axolotl and transformers are imported: no telemetry, no network.
for _name in ("AXOLOTL_DO_NOT_TRACK", "DO_NOT_TRACK", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import without_fla  # noqa: E402, F401


@pytest.fixture(scope="session")
def run_inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`model` and `data` for `axolotl_runs.write_config(folder, **run_inputs, ...)`; never written to."""
    from axolotl_runs import make_dataset, make_model

    folder = tmp_path_factory.mktemp("run_inputs")
    return {"model": make_model(folder / "model"), "data": make_dataset(folder)}


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, run_inputs: dict[str, Path]) -> Path:
    """The output folder of a run that nothing disturbed: 13 calibration rows, eight steps, a checkpoint every two."""
    from axolotl_runs import UNINTERRUPTED, train, write_config

    folder = tmp_path_factory.mktemp("uninterrupted")
    train(write_config(folder, **run_inputs, **UNINTERRUPTED)).check()
    return folder / "out"
