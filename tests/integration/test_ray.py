"""Ray Train: a driver that validates the config, and workers that score, agree and train."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from axolotl.utils.dict import DictDefault
from axolotl_runs import Finished, plan_of, train, write_config
from safetensors.torch import load_file

from axolotl_layersel.integration import ray_workers as handover
from axolotl_layersel.integration.ray_workers import config_as_written

pytestmark = pytest.mark.slow


def test_a_driver_hands_on_the_keys_that_the_user_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker sees what validation made of the config: a hundred keys more, in another folder."""
    monkeypatch.chdir(tmp_path)
    raw = {"base_model": "m", "use_ray": True, "layersel": {"plan": "here/plan.json"}, "learning_rate": "1e-3"}
    driver = DictDefault(raw)
    assert config_as_written(driver) == raw
    assert driver["layersel"]["plan"] == str(tmp_path / "here" / "plan.json")
    worker = DictDefault({**driver.to_dict(), "learning_rate": 0.001, "device": "cpu"})
    assert config_as_written(worker) == {**raw, "learning_rate": 0.001, "layersel": driver["layersel"]}
    assert worker["layersel"] == driver["layersel"]


def test_without_ray_the_config_is_left_alone() -> None:
    raw = {"base_model": "m", "layersel": {"plan": "here/plan.json"}}
    cfg = DictDefault(raw)
    assert config_as_written(cfg) == raw
    assert cfg == DictDefault(raw)


@pytest.fixture(scope="module")
def ray_run(tmp_path_factory: pytest.TempPathFactory, run_inputs: dict[str, Path]) -> Iterator[tuple[Path, Finished]]:
    """Two workers of a real Ray, to the end of training: the output folder, and the driver's log."""
    pytest.importorskip("ray.train", reason="Ray is not installed: pip install 'ray[train]'")
    folder = tmp_path_factory.mktemp("ray_run")
    config = write_config(
        folder,
        **run_inputs,
        plugins=[f"axolotl_test_plugins.{name}" for name in ("RayOnCpu", "CpuProcesses")] + ["layersel"],
        layersel={"num_samples": 13, "min_layers": 2},
        use_ray=True,
        ray_num_workers=2,
        resources_per_worker={"CPU": 1},
        max_steps=2,
        save_strategy="steps",
        save_steps=2,
    )
    scratch = tempfile.mkdtemp(prefix="ray-")  # Ray's sockets lie in it, and their paths must be short
    env = {"RAY_TMPDIR": scratch, "RAY_USAGE_STATS_ENABLED": "0", "RAY_ADDRESS": "local", "ACCELERATE_USE_CPU": "true"}
    try:
        yield folder / "out", train(config, launcher="python", env=env, timeout=420).check()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def test_ray_workers_train_with_the_plan_of_one_process(ray_run: tuple[Path, Finished], uninterrupted: Path) -> None:
    out, run = ray_run
    plan, alone = plan_of(out), plan_of(uninterrupted)
    assert plan["options"] == {**alone["options"], "min_layers": 2}  # the driver's options reached the workers
    assert plan["trainable_layers"] == alone["trainable_layers"]
    assert plan["scores"]["deviation"] == pytest.approx(alone["scores"]["deviation"], abs=1e-6)
    assert run.log.count("proved in the first step") == 2  # on both
    assert run.log.count("layersel: the plan is ") == 1
    assert sorted(path.relative_to(out) for path in out.rglob("plan.json")) == [
        Path("checkpoint-2/layersel/plan.json"),
        Path("layersel/plan.json"),
    ]


def test_ray_workers_train_adapters_of_the_plans_layers_alone(ray_run: tuple[Path, Finished]) -> None:
    out, _ = ray_run
    weights = load_file(out / "adapter_model.safetensors")
    layers = {int(name.split(".layers.")[1].split(".")[0]) for name in weights}
    assert sorted(layers) == plan_of(out)["trainable_layers"]
    assert all(weight.abs().max() > 0 for name, weight in weights.items() if "lora_B" in name)  # zero before training


def test_the_recipe_of_a_ray_run_holds_what_the_user_wrote(ray_run: tuple[Path, Finished]) -> None:
    """And not the hundred keys that validation adds."""
    out, _ = ray_run
    recipe: dict[str, Any] = yaml.safe_load((out / "layersel" / "recipe.yml").read_text())
    written: dict[str, Any] = yaml.safe_load((out.parent / "config.yml").read_text())
    assert set(recipe) == set(written) - {"use_cpu"}  # which validation drops: axolotl 0.19 does not know it
    assert recipe["layersel"]["first_layer"] == plan_of(out)["first_trainable"]
    assert handover.KEYS not in recipe
    assert recipe["datasets"][0]["path"] == written["datasets"][0]["path"]
