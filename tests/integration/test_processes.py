"""Several real processes, joined by gloo: one plan, and one error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from axolotl_runs import TORCHRUN, free_port, on_several, plan_of, start, train, write_config
from safetensors.torch import load_file

from axolotl_layersel.config.conflicts import find_conflicts
from axolotl_layersel.config.conflicts import sharded as sharded_by
from axolotl_layersel.integration.processes import Processes, join_processes

pytestmark = pytest.mark.slow

HERE = Path(__file__).parents[1] / "helpers"


@pytest.fixture(scope="module")
def three_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of three processes saw, by rank."""
    out = tmp_path_factory.mktemp("three_processes")
    torchrun = [*TORCHRUN, "--nproc-per-node=3", f"--master-port={free_port()}"]
    start([*torchrun, str(HERE / "processes_script.py"), str(out)], out / "log").finish(timeout=300).check()
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(3)]


def test_every_process_knows_its_place(three_processes: list[dict[str, Any]]) -> None:
    assert [(seen["rank"], seen["world_size"]) for seen in three_processes] == [(0, 3), (1, 3), (2, 3)]
    assert {seen["main_only"] for seen in three_processes} == {"decided by 0"}


@pytest.mark.parametrize("case", ["fail_before", "fail_inside"])
def test_all_stop_with_the_error_of_the_one_that_failed(three_processes: list[dict[str, Any]], case: str) -> None:
    told = "PeerError: rank 1 failed: ValueError: row 7 is not a row"
    assert [seen[case]["error"] for seen in three_processes] == [told, "ValueError: row 7 is not a row", told]
    assert max(seen[case]["seconds"] for seen in three_processes) < 30


def test_all_stop_when_the_deciding_process_fails(three_processes: list[dict[str, Any]]) -> None:
    told = "PeerError: rank 0 failed: ValueError: row 7 is not a row"
    assert [seen["fail_main"]["error"] for seen in three_processes] == ["ValueError: row 7 is not a row", told, told]


def test_nobody_waits_when_all_fail_at_different_places(three_processes: list[dict[str, Any]]) -> None:
    assert {seen["fail_all"]["error"] for seen in three_processes} == {"ValueError: row 7 is not a row"}


@pytest.mark.parametrize("deviation", ["cosine", "logit_lens"])
@pytest.mark.parametrize("rows", [7, 2])
def test_shares_of_any_size_give_the_one_process_scores(
    three_processes: list[dict[str, Any]], rows: int, deviation: str
) -> None:
    """Seven rows are 3, 2 and 2; of two rows the last process gets none."""
    alone = three_processes[0][f"{deviation}_{rows}_alone"]
    for seen in three_processes:
        shared = seen[f"{deviation}_{rows}"]
        assert shared["cut"] == alone["cut"]
        assert shared["tokens"] == alone["tokens"]
        assert shared["deviation"] == pytest.approx(alone["deviation"], abs=1e-6)
        assert shared == three_processes[0][f"{deviation}_{rows}"]  # to the last bit, on every process


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    processes = join_processes(cpu=True)
    assert processes == Processes(rank=0, world_size=1)
    with pytest.raises(ValueError, match="as it is"), processes.stopping_together():
        processes.together(lambda: (_ for _ in ()).throw(ValueError("as it is")))


def test_processes_that_accelerate_has_not_joined_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler's WORLD_SIZE without a launcher: each process would choose layers of its own."""
    PartialState()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="WORLD_SIZE is 2, but accelerate has joined 1 of them"):
        join_processes(cpu=True)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes saw of models that torch's FSDP2 shards over them."""
    out = tmp_path_factory.mktemp("sharded")
    torchrun = [*TORCHRUN, "--nproc-per-node=2", f"--master-port={free_port()}"]
    start([*torchrun, str(HERE / "fsdp_script.py"), str(out)], out / "log", cwd=HERE).finish(timeout=300).check()
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_given_cut_holds_under_fsdp2(sharded: list[dict[str, Any]], mode: str) -> None:
    """The backward pass was proved to stop at the cut; frozen shards keep their bits, trained ones equal one model."""
    for seen in (process[mode] for process in sharded):
        assert seen["sharded"]
        assert seen["expected_trained"]
        assert seen["gradients_below_the_cut"] == []
        assert seen["frozen"] > 20
        assert seen["frozen_unchanged"]
        assert seen["losses"] == pytest.approx(seen["reference"], abs=1e-5)
        assert seen["largest_difference"] < 1e-5
        assert seen["losses"][-1] < seen["losses"][0]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"fsdp_config": {"reshard_after_forward": True}}, "FSDP1 (`fsdp_version` is not 2) shards the model"),
        ({"tensor_parallel_size": 2}, "`tensor_parallel_size: 2` splits the model"),
    ],
)
def test_sharded_scoring_is_refused_with_the_command_that_scores(config: dict[str, Any], reason: str) -> None:
    base = {"plugins": ["layersel"], "axolotl_config_path": "my.yml", "output_dir": "./out", **config}
    (conflict,) = find_conflicts(base)
    assert conflict.startswith(reason)
    assert "`axolotl layersel score my.yml`" in conflict
    assert "`layersel: {plan: ./out/layersel/plan.json}`" in conflict
    assert find_conflicts({**base, "layersel": {"first_layer": 3}}) == []
    assert find_conflicts({**base, "layersel": {"plan": "./out/layersel/plan.json"}}) == []


def test_zero_3_is_found_in_the_file_that_the_config_names(tmp_path: Path) -> None:
    for stage, found in ((2, None), (3, "DeepSpeed ZeRO-3 partitions the model")):
        path = tmp_path / "deepspeed.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        assert sharded_by({"plugins": ["layersel"], "deepspeed": str(path)}) == found


def test_axolotl_trains_on_two_processes_with_the_plan_of_one(
    tmp_path: Path, run_inputs: dict[str, Path], uninterrupted: Path
) -> None:
    """13 rows: seven for one process, six for the other."""
    options = on_several({"layersel": {"num_samples": 13}, "max_steps": 2})
    run = train(write_config(tmp_path, **run_inputs, **options), processes=2).check()
    plan, alone = plan_of(tmp_path / "out"), plan_of(uninterrupted)
    assert plan["trainable_layers"] == alone["trainable_layers"]
    assert plan["scores"]["deviation"] == pytest.approx(alone["scores"]["deviation"], abs=1e-6)
    assert plan["scores"]["retention"] == pytest.approx(alone["scores"]["retention"], abs=1e-6)
    assert plan["scores"]["stability"] == alone["scores"]["stability"]
    assert plan["sample"] == alone["sample"]
    assert run.log.count("proved in the first step") == 2  # on both
    assert len(run.losses) == 2  # logged by one
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_axolotl_trains_on_three_processes_where_one_has_no_rows(tmp_path: Path, run_inputs: dict[str, Path]) -> None:
    options = on_several({"layersel": {"num_samples": 2}, "max_steps": 2})
    run = train(write_config(tmp_path, **run_inputs, **options), launcher="torchrun", processes=3).check()
    assert plan_of(tmp_path / "out")["sample"]["rows"] == 2
    assert run.log.count("proved in the first step") == 3


def test_axolotl_trains_a_given_cut_on_a_model_that_fsdp2_shards(
    tmp_path: Path, run_inputs: dict[str, Path], uninterrupted: Path
) -> None:
    """Full fine-tuning: the embeddings are frozen, norm and head trained, in one root unit; a unit for each layer."""
    options = on_several(
        {
            "adapter": None,
            "lora_target_linear": None,
            "layersel": {"plan": str(_plan_for_full_fine_tuning(uninterrupted, tmp_path)), "report": False},
            "fsdp_version": 2,
            "fsdp_config": {
                "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
                "state_dict_type": "FULL_STATE_DICT",
                "reshard_after_forward": True,
                "offload_params": False,
                "cpu_ram_efficient_loading": False,
            },
            "max_steps": 2,
            "save_strategy": "steps",
            "save_steps": 2,
        }
    )
    options["plugins"] = ["axolotl_test_plugins.CpuShards", *options["plugins"]]
    run = train(write_config(tmp_path, **run_inputs, **options), launcher="torchrun", processes=2).check()
    assert run.log.count("test: 7 units are sharded, ['FSDPLlamaForCausalLM', 'FSDPModule']") == 2
    cut = plan_of(tmp_path / "out")["first_trainable"]
    assert run.log.count(f"proved in the first step: the backward pass stops at layer {cut}") == 2
    assert plan_of(tmp_path / "out" / "checkpoint-2") == plan_of(tmp_path / "out")
    before = load_file(run_inputs["model"] / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    trained = tuple(f"model.layers.{layer}." for layer in range(cut, 6))
    assert changed == {name for name in before if name.startswith((*trained, "model.norm", "lm_head"))}


def _plan_for_full_fine_tuning(uninterrupted: Path, folder: Path) -> Path:
    """The plan of the LoRA run, as a run without an adapter would have written it."""
    path = folder / "given.json"
    path.write_text(json.dumps({**plan_of(uninterrupted), "adapter": None}), encoding="utf-8")
    return path


def test_two_machines_without_a_shared_folder_train_with_one_plan(tmp_path: Path, run_inputs: dict[str, Path]) -> None:
    """Two launches that join each other, each in a folder of its own; only the first writes, and both train."""
    options = on_several({"layersel": {"num_samples": 13, "report": False}, "max_steps": 2})
    options |= {"output_dir": "./out", "dataset_prepared_path": "./prepared", "save_strategy": "steps", "save_steps": 2}
    config = write_config(tmp_path, **run_inputs, **options)
    nodes = f"--nnodes=2 --nproc-per-node=1 --master-addr=127.0.0.1 --master-port={free_port()}".split()
    launched = []
    for rank in range(2):
        command = [*TORCHRUN, *nodes, f"--node-rank={rank}", "-m", "axolotl.cli.train", str(config)]
        node = tmp_path / f"node {rank}"
        launched.append(start(command, node / "log", env={"ACCELERATE_USE_CPU": "true"}))
    logs = [run.finish(timeout=240).check().log for run in launched]
    cut = plan_of(tmp_path / "node 0" / "out")["first_trainable"]
    assert cut > 0
    for log in logs:
        assert log.count(f"proved in the first step: the backward pass stops at layer {cut}") == 1
    written = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("plan.json"))
    assert written == ["node 0/out/checkpoint-2/layersel/plan.json", "node 0/out/layersel/plan.json"]
