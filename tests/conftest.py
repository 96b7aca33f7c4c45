"""Fixtures that several test files share: one tiny model and one data set for a whole session."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def run_inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`model` and `data` for `axolotl_runs.write_config(folder, **run_inputs, ...)`; never written to."""
    from axolotl_runs import make_dataset, make_model

    folder = tmp_path_factory.mktemp("run_inputs")
    return {"model": make_model(folder / "model"), "data": make_dataset(folder)}
