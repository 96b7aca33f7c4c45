"""Models that do not fit are scored layer by layer: when, by which command, and with the plan of whole passes."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from axolotl.integrations.base import PluginManager
from axolotl_runs import make_dataset, make_model, plan_of, train, write_config
from tiny import tiny_llama

import axolotl_layersel._startup  # noqa: F401  # the alias, where the package is not installed
from axolotl_layersel.config.conflicts import find_conflicts
from axolotl_layersel.integration.commands import compare, fill_cache, score
from axolotl_layersel.integration.scoring_way import does_not_fit
from axolotl_layersel.method.scoring_pass import scoring_bytes
from axolotl_layersel.model.decoder_stack import find_stack
from axolotl_layersel.plan import Plan
from axolotl_layersel.plan_parts import Scores
from axolotl_layersel.prefix_cache.state_store import PrefixCacheError

# Two layers in main memory, four on the disk: as `device_map: auto` would do for a small GPU.
PARTLY_ON_DISK = {
    **dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu"),
    **{f"model.layers.{i}": "cpu" if i < 2 else "disk" for i in range(6)},
}


@pytest.fixture(autouse=True)
def _no_plugin_left_behind() -> Iterator[None]:
    PluginManager.get_instance().plugins.clear()
    yield
    PluginManager.get_instance().plugins.clear()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("inputs")
    prepared = str(folder / "prepared")
    return {"model": make_model(folder / "model"), "data": make_dataset(folder), "dataset_prepared_path": prepared}


@pytest.fixture(scope="module")
def usual(inputs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Scores:
    """Of whole forward passes."""
    return _scores(score(write_config(tmp_path_factory.mktemp("usual"), **inputs), {})[0])


def _scores(plan: Plan) -> Scores:
    assert plan.scores is not None
    return plan.scores


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "why"),
    [
        (
            {"layersel": {"num_samples": 16, "layer_by_layer": True, "layer_by_layer_gb": 1e-5}},
            "the config asks for it",
        ),
        ({"device_map": PARTLY_ON_DISK}, "weights are offloaded to main memory or to the disk"),
        ({"max_memory": {"cpu": "200KB"}}, "weights are offloaded to main memory or to the disk"),
    ],
    ids=["asked", "device map", "max memory"],
)
def test_the_command_scores_what_is_offloaded(
    config: dict[str, Any],
    why: str,
    inputs: dict[str, Any],
    usual: Scores,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        plan, path = score(write_config(tmp_path, **inputs, **config), {})
    assert path.exists()
    assert f"scoring layer by layer on cpu, because {why}: two layers" in caplog.text
    assert "s are left" in caplog.text
    assert plan.prediction is not None  # costs are measured on a layer that was fetched for it
    assert dataclasses.replace(_scores(plan), pilot=usual.pilot) == usual


@pytest.mark.slow
def test_a_training_run_streams_and_trains(inputs: dict[str, Any], usual: Scores, tmp_path: Path) -> None:
    config = write_config(tmp_path, **inputs, layersel={"num_samples": 16, "layer_by_layer": True})
    run = train(config, launcher="python").check()
    plan = plan_of(tmp_path / "out")
    assert plan["scores"]["deviation"] == usual.deviation
    assert "scoring layer by layer on cpu, because the config asks for it" in run.log
    assert f"proved in the first step: the backward pass stops at layer {plan['first_trainable']}" in run.log
    assert len(run.losses) == 4


@pytest.mark.slow
def test_offloaded_weights_are_refused_where_the_config_forbids_the_only_way(
    inputs: dict[str, Any], tmp_path: Path
) -> None:
    config = write_config(
        tmp_path, **inputs, device_map=PARTLY_ON_DISK, layersel={"num_samples": 16, "layer_by_layer": False}
    )
    with pytest.raises(
        ValueError, match=r"`layer_by_layer: false`, but weights are offloaded .* `layer_by_layer: auto`"
    ):
        score(config, {})


@pytest.mark.slow
def test_what_needs_the_whole_model_is_refused_by_name(inputs: dict[str, Any], tmp_path: Path) -> None:
    config = write_config(tmp_path, **inputs, device_map=PARTLY_ON_DISK, layersel={"num_samples": 16})
    refused = r"`compare` needs the whole model on the device, and weights are offloaded .* `axolotl layersel score`"
    with pytest.raises(ValueError, match=refused):
        compare(config, {})
    with pytest.raises(PrefixCacheError, match="weights below the cut are offloaded"):
        fill_cache(config, {"layersel__first_layer": 3})


@pytest.mark.slow
@pytest.mark.parametrize(
    "split",
    [{"tensor_parallel_size": 2}, {"context_parallel_size": 2}, {"expert_parallel_size": 2}],
    ids=lambda split: next(iter(split)),
)
def test_the_command_that_a_refusal_names_scores_a_config_that_splits_the_model(
    split: dict[str, int], inputs: dict[str, Any], usual: Scores, tmp_path: Path
) -> None:
    config = write_config(tmp_path, **inputs, layersel={"num_samples": 16}, **split)
    written = yaml.safe_load(config.read_text(encoding="utf-8"))
    (refusal,) = find_conflicts({**written, "axolotl_config_path": str(config)})
    assert f"`axolotl layersel score {config}`" in refusal
    plan, path = score(config, {})
    assert _scores(plan).deviation == usual.deviation
    assert f"`layersel: {{plan: {path}}}`" in refusal
    assert find_conflicts({**written, "layersel": {"plan": str(path)}}) == []


def test_a_model_fits_up_to_the_memory_that_it_and_its_scoring_take() -> None:
    model = tiny_llama()
    stack, weights = find_stack(model), sum(p.nbytes for p in model.parameters())
    needed = weights + scoring_bytes(stack, batch_tokens=64)
    fits = {"found": {"host"}, "batch_tokens": 64}
    assert does_not_fit(model, stack, free=int(needed / 0.95) + 2, **fits) is None
    why = does_not_fit(model, stack, free=int(needed / 0.95) - 2, **fits)
    assert why == "the model and what scoring needs take 0.136 GB, and 0.136 GB are free there"
    assert does_not_fit(model, stack, {"here"}, free=0, batch_tokens=64) is None  # it is there already
