"""A resumed run keeps the plan of its checkpoint, and says so when it is asked for another.

That a killed run resumes with the losses of an undisturbed one is tested with real processes in `test_faults.py`.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axolotl.cli.config import load_cfg
from axolotl.integrations.base import PluginManager
from axolotl_runs import UNINTERRUPTED, write_config
from transformers import AutoModelForCausalLM

import axolotl_layersel._startup  # noqa: F401  # the alias, where the package is not installed
from axolotl_layersel.integration import axolotl_api
from axolotl_layersel.integration.decide import decide
from axolotl_layersel.integration.processes import Processes
from axolotl_layersel.integration.run_settings import settings_of
from axolotl_layersel.plan import Plan, PlanError, read_plan, write_text

pytestmark = pytest.mark.slow


@pytest.fixture
def output(uninterrupted: Path, tmp_path: Path) -> Path:
    """A copy of a finished run's output folder, with checkpoints 2 to 8."""
    shutil.copytree(uninterrupted, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture(autouse=True)
def _no_plugin_left_behind() -> Iterator[None]:
    PluginManager.get_instance().plugins.clear()
    yield
    PluginManager.get_instance().plugins.clear()


def _decide(folder: Path, inputs: dict[str, Path], **overrides: Any) -> Plan:
    """What a run with this config would train; without a data set, so that scoring would fail."""
    options = {**UNINTERRUPTED, "auto_resume_from_checkpoints": True, **overrides}
    cfg = load_cfg(str(write_config(folder, **inputs, **options)))
    model = AutoModelForCausalLM.from_pretrained(inputs["model"])
    return decide(settings_of(cfg), model, None, processes=Processes())


def test_every_checkpoint_holds_the_plan_of_its_run(output: Path) -> None:
    plan = (output / "layersel" / "plan.json").read_bytes()
    checkpoints = sorted(output.glob("checkpoint-*"))
    assert [path.name for path in checkpoints] == [f"checkpoint-{step}" for step in (2, 4, 6, 8)]
    assert {(path / "layersel" / "plan.json").read_bytes() for path in checkpoints} == {plan}


def test_the_plan_of_the_checkpoint_is_used(tmp_path: Path, output: Path, run_inputs: dict[str, Path]) -> None:
    """Also where the folder's own plan was replaced since: by `axolotl layersel score`, say."""
    plan = read_plan(output)
    other = dataclasses.replace(plan, first_trainable=plan.first_trainable + 1)
    write_text(output / "layersel" / "plan.json", other.to_json())
    assert _decide(tmp_path, run_inputs) == plan
    explicit = {"auto_resume_from_checkpoints": None, "resume_from_checkpoint": str(output / "checkpoint-4")}
    assert _decide(tmp_path, run_inputs, **explicit) == plan
    same = {"layersel": {"first_layer": plan.first_trainable}}
    assert _decide(tmp_path, run_inputs, **same) == plan


def test_another_cut_is_refused_with_both_cuts(tmp_path: Path, output: Path, run_inputs: dict[str, Path]) -> None:
    plan = read_plan(output)
    cut = plan.first_trainable + 1
    both = f"was trained with first_layer {plan.first_trainable}, this config asks for {cut}"
    with pytest.raises(PlanError, match=both):
        _decide(tmp_path, run_inputs, layersel={"first_layer": cut})
    path = tmp_path / "other.json"
    write_text(path, dataclasses.replace(plan, first_trainable=cut).to_json())
    with pytest.raises(PlanError, match=both):
        _decide(tmp_path, run_inputs, layersel={"plan": str(path)})


def test_a_checkpoint_without_a_plan_is_refused(tmp_path: Path, output: Path, run_inputs: dict[str, Path]) -> None:
    """As a run without the plugin leaves it, or one that was killed while the checkpoint was written."""
    shutil.rmtree(output / "checkpoint-8" / "layersel")
    with pytest.raises(
        PlanError, match=r"checkpoint-8' has no readable plan, .*Remove it to go on from the one before"
    ):
        _decide(tmp_path, run_inputs)
    shutil.rmtree(output / "checkpoint-8")
    assert _decide(tmp_path, run_inputs) == read_plan(output / "checkpoint-6")


def test_a_checkpoint_of_another_adapter_is_refused(tmp_path: Path, output: Path, run_inputs: dict[str, Path]) -> None:
    with pytest.raises(PlanError, match="the plan of the checkpoint was made for adapter 'lora', this run has None"):
        _decide(tmp_path, run_inputs, adapter=None, lora_target_linear=None)


def test_an_fsdp2_checkpoint_with_a_part_of_the_adapters_is_refused(
    tmp_path: Path, output: Path, run_inputs: dict[str, Path]
) -> None:
    """As accelerate 1.13 writes it with FULL_STATE_DICT; what it writes with SHARDED_STATE_DICT is a folder."""
    (output / "checkpoint-8" / "pytorch_model_fsdp_0").mkdir()
    assert _decide(tmp_path, run_inputs) == read_plan(output)
    (output / "checkpoint-8" / "pytorch_model_fsdp.bin").touch()
    if not axolotl_api.saves_part_of_adapters():
        assert _decide(tmp_path, run_inputs) == read_plan(output)
        return
    with pytest.raises(
        PlanError, match="checkpoint-8' holds the first process's share of the adapters alone.*lora_model_dir"
    ):
        _decide(tmp_path, run_inputs)
