"""ZeRO-2 and ZeRO-3 inside axolotl, on the CPU; skipped where DeepSpeed is not installed.

`DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed ninja` installs it without CUDA; its first start compiles an
operator, which takes a compiler and a minute.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from axolotl_runs import make_dataset, make_model, plan_of, start, train_command, write_config

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


@pytest.mark.parametrize(("stage", "options"), [(2, {"num_samples": 8}), (3, {"first_layer": 3})])
def test_zero_trains_the_suffix_and_stops_at_the_cut(tmp_path: Path, stage: int, options: dict[str, Any]) -> None:
    """ZeRO-2 keeps the model whole, so it is scored; ZeRO-3 partitions it, so the cut is given."""
    zero = {
        "zero_optimization": {"stage": stage, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto"),
    }
    (tmp_path / "zero.json").write_text(json.dumps(zero), encoding="utf-8")
    config = write_config(
        tmp_path,
        model=make_model(tmp_path / "model"),
        data=make_dataset(tmp_path),
        plugins=["axolotl_test_plugins.CpuProcesses", "layersel"],
        layersel=options,
        deepspeed=str(tmp_path / "zero.json"),
        use_cpu=None,
    )
    command = train_command(config, launcher="torchrun")
    run = start(command, tmp_path / "log", env={"DS_ACCELERATOR": "cpu"}).finish(timeout=300).check()
    plan = plan_of(tmp_path / "out")
    assert (plan["scores"] is None) == (stage == 3)
    assert f"proved in the first step: the backward pass stops at layer {plan['first_trainable']}" in run.log
    assert len(run.losses) == 4
