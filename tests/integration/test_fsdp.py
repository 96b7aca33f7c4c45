"""FSDP2 inside axolotl, over real processes on the CPU: scored in the run, truly sharded, resumed, failing together.

accelerate uses FSDP on accelerators alone: `axolotl_test_plugins.CpuShards` says what is put right for the CPU.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from axolotl_runs import (
    Finished,
    logged_losses,
    make_dataset,
    make_model,
    on_several,
    plan_of,
    start,
    train,
    train_command,
    write_config,
)
from example_stand_ins import trained_layers
from safetensors.torch import load_file

from axolotl_layersel.integration import axolotl_api
from axolotl_layersel.integration.output_folder import LOCK_FILE, claim_folder, release_folders

pytestmark = pytest.mark.slow


def _options(*, by_main: bool, state_dict: str = "SHARDED_STATE_DICT", **changes: Any) -> dict[str, Any]:
    """Of a run that FSDP2 shards; `by_main`: the first process alone loads the weights."""
    options = on_several(
        {
            "layersel": {"num_samples": 13, "report": False},
            "fsdp_version": 2,
            "fsdp_config": {
                "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
                "state_dict_type": state_dict,
                "reshard_after_forward": True,
                "offload_params": False,
                "cpu_ram_efficient_loading": by_main,
            },
            **changes,
        }
    )
    options["plugins"] = ["axolotl_test_plugins.FixedSeed", "axolotl_test_plugins.CpuShards", *options["plugins"]]
    return options


def _here(run: Finished, *, trained: bool) -> list[tuple[int, int]]:
    """For each process: how many numbers of its trained or frozen parameters it holds, and of how many."""
    found = re.findall(rf"test: trained {trained}: (\d+) of (\d+) numbers are here", run.log)
    return [(int(here), int(whole)) for here, whole in found]


# ---- LoRA, loaded by the main process, and resumed -----------------------------------------------------------------

STEPS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory, run_inputs: dict[str, Path]) -> tuple[Path, Finished]:
    """The output folder and the log of a LoRA run on two processes, of which the first has loaded the weights."""
    folder = tmp_path_factory.mktemp("lora")
    config = write_config(folder, **run_inputs, **_options(by_main=True, **STEPS))
    return folder / "out", train(config, launcher="torchrun", processes=2).check()


def test_the_process_that_holds_the_weights_scores_as_one_process_does(
    lora: tuple[Path, Finished], uninterrupted: Path
) -> None:
    """To the last bit: the same rows in the same batches."""
    ours, alone = plan_of(lora[0]), plan_of(uninterrupted)
    assert ours["scores"] == alone["scores"]
    assert ours["trainable_layers"] == alone["trainable_layers"]
    assert ours["sample"] == alone["sample"]
    assert (
        lora[1].log.count(f"proved in the first step: the backward pass stops at layer {ours['first_trainable']}") == 2
    )


def test_adapters_and_frozen_weights_are_sharded(lora: tuple[Path, Finished], run_inputs: dict[str, Path]) -> None:
    for trained in (True, False):
        shares = _here(lora[1], trained=trained)
        assert len(shares) == 2
        assert sum(here for here, _ in shares) == shares[0][1]
        assert all(0.4 * whole < here < 0.6 * whole for here, whole in shares)
    assert trained_layers(lora[0].parent, run_inputs["model"], "lora") == plan_of(lora[0])["trainable_layers"]


def test_a_resumed_run_goes_on_with_the_plan_and_the_losses(
    tmp_path: Path, run_inputs: dict[str, Path], lora: tuple[Path, Finished]
) -> None:
    shutil.copytree(lora[0] / "checkpoint-2", tmp_path / "out" / "checkpoint-2")
    options = _options(by_main=True, auto_resume_from_checkpoints=True, **STEPS)
    run = train(write_config(tmp_path, **run_inputs, **options), launcher="torchrun", processes=2).check()
    assert "the plan of the checkpoint is used, nothing is scored" in run.log
    assert plan_of(tmp_path / "out") == plan_of(lora[0])
    assert logged_losses(tmp_path / "out") == logged_losses(lora[0])
    assert len(run.losses) == 2
    ours, theirs = (load_file(out / "adapter_model.safetensors") for out in (tmp_path / "out", lora[0]))
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


# ---- full fine-tuning; and every process with weights of its own ---------------------------------------------------


def test_full_fine_tuning_is_scored_where_the_other_processes_hold_zeros(
    tmp_path: Path, run_inputs: dict[str, Path], uninterrupted: Path
) -> None:
    """What the main process alone loads, transformers fills with zeros elsewhere: no meta tensor tells of them."""
    options = _options(by_main=True, state_dict="FULL_STATE_DICT", adapter=None, lora_target_linear=None, max_steps=2)
    run = train(write_config(tmp_path, **run_inputs, **options), launcher="torchrun", processes=3).check()
    plan, alone = plan_of(tmp_path / "out"), plan_of(uninterrupted)
    assert plan["scores"]["deviation"] == alone["scores"]["deviation"]
    cut = plan["first_trainable"]
    assert run.log.count(f"proved in the first step: the backward pass stops at layer {cut}") == 3
    for trained in (True, False):
        assert sum(here for here, _ in _here(run, trained=trained)) == _here(run, trained=trained)[0][1]
    before, after = (load_file(path / "model.safetensors") for path in (run_inputs["model"], tmp_path / "out"))
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    suffix = tuple(f"model.layers.{layer}." for layer in range(cut, 6))
    assert changed == {name for name in before if name.startswith((*suffix, "model.norm", "lm_head"))}


def test_processes_that_all_hold_the_weights_share_the_rows(
    tmp_path: Path, run_inputs: dict[str, Path], uninterrupted: Path
) -> None:
    options = _options(by_main=False, state_dict="FULL_STATE_DICT", max_steps=2)
    run = train(write_config(tmp_path, **run_inputs, **options), launcher="torchrun", processes=2).check()
    plan, alone = plan_of(tmp_path / "out"), plan_of(uninterrupted)
    assert plan["scores"]["deviation"] == pytest.approx(alone["scores"]["deviation"], abs=1e-6)
    assert plan["trainable_layers"] == alone["trainable_layers"]
    assert re.search(r"scoring layers: 7/7 rows", run.log)  # seven for one process, six for the other
    told = any("so it cannot be resumed; with SHARDED_STATE_DICT it can" in note for note in plan["notes"])
    assert told == axolotl_api.saves_part_of_adapters()
    assert run.log.count("proved in the first step") == 2


# ---- a process that fails, and one that is killed ------------------------------------------------------------------


def test_the_others_stop_with_the_error_of_the_one_that_scores(tmp_path: Path) -> None:
    def break_norm(model: Any) -> None:
        model.model.layers[2].input_layernorm.weight[0] = float("nan")

    model = make_model(tmp_path / "model", change=break_norm)
    config = write_config(tmp_path, model=model, data=make_dataset(tmp_path), **_options(by_main=True))
    run = train(config, launcher="torchrun", processes=2, timeout=300)
    assert run.returncode != 0
    assert "'model.layers.2.input_layernorm.weight' holds NaN or Inf" in run.log
    assert "PeerError: rank 0 failed: ScoringError: " in run.log
    assert {path.name for path in (tmp_path / "out" / "layersel").glob("*")} <= {LOCK_FILE}


@pytest.mark.parametrize("killed", [0, 1])
def test_all_end_when_one_is_killed_while_the_first_scores(
    tmp_path: Path, run_inputs: dict[str, Path], killed: int
) -> None:
    """The one that scores, or one that waits for it: no process is left, no plan, and nobody holds the folder."""
    options = _options(by_main=True, micro_batch_size=1)
    options["layersel"]["num_samples"] = 1500
    options["data"] = make_dataset(tmp_path / "many rows", rows=1500)
    command = train_command(write_config(tmp_path, **{**run_inputs, **options}), launcher="torchrun", processes=2)
    run = start(command, tmp_path / "log", env={"ACCELERATE_USE_CPU": "true"})
    run.wait_for("layersel: scoring ")
    workers = [child for child in psutil.Process(run.process.pid).children() if "axolotl.cli.train" in child.cmdline()]
    by_rank = {int(worker.environ()["RANK"]): worker for worker in workers}
    by_rank[killed].kill()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert alive == []
    assert run.finish(timeout=120).returncode != 0
    assert {path.name for path in (tmp_path / "out" / "layersel").glob("*")} <= {LOCK_FILE}
    claim_folder(tmp_path / "out" / "layersel")
    release_folders()
