"""What must not differ between the supported versions of axolotl: every spelling acts, checkpointing recomputes alike.

`tests/packaging/test_packaging.py` asks wheels and editable installs about spellings; here they train.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from axolotl.utils.dict import DictDefault
from axolotl_runs import plan_of, write_config
from axolotl_turns import WITNESS, train_in_turn

from axolotl_layersel import LayerSelPlugin

SPELLINGS = {
    "short": ["layersel"],
    "dotted": ["axolotl_layersel.LayerSelPlugin"],
    "older": ["axolotl_layersel.plugin.LayerSelPlugin"],
    "colon": ["axolotl_layersel:LayerSelPlugin"],
    "twice": ["layersel", "axolotl_layersel.LayerSelPlugin"],
}


@pytest.mark.slow
def test_configs_of_one_process_get_their_own_plans_and_recipes_under_every_spelling(
    tmp_path: Path, run_inputs: dict[str, Path]
) -> None:
    """The manager keeps instances of earlier configs: what they know must not reach a later run, nor one without."""
    cuts = {name: 1 + i for i, name in enumerate(SPELLINGS)}
    configs = []
    for name, spelling in SPELLINGS.items():
        options = {"plugins": [*spelling, WITNESS], "layersel": {"first_layer": cuts[name]}, "max_steps": 1}
        configs.append(write_config(tmp_path / name, **run_inputs, **options))
    without = {"plugins": [WITNESS], "layersel": None, "max_steps": 1}
    configs.append(write_config(tmp_path / "without", **run_inputs, **without))
    results = train_in_turn(tmp_path, configs)
    assert {name: result["error"] for name, result in results.items()} == dict.fromkeys([*SPELLINGS, "without"], "")
    assert results["without"]["layers"] == list(range(6))
    assert not (tmp_path / "without" / "out" / "layersel").exists()
    for name, cut in cuts.items():
        assert results[name]["layers"] == list(range(cut, 6)), name
        assert plan_of(tmp_path / name / "out")["first_trainable"] == cut
        recipe = yaml.safe_load((tmp_path / name / "out" / "layersel" / "recipe.yml").read_text(encoding="utf-8"))
        assert (recipe["layersel"], recipe["plugins"][:-1]) == ({"first_layer": cut}, SPELLINGS[name])


# ---- how checkpointing recomputes ----------------------------------------------------------------------------------


def registered(**config: Any) -> Any:
    """The config after the plugin's first hook."""
    cfg = DictDefault({"plugins": ["layersel"], "gradient_checkpointing": True, **config})
    LayerSelPlugin().register(cfg)
    return cfg.gradient_checkpointing_kwargs


def test_checkpointing_is_non_reentrant_where_the_config_does_not_choose() -> None:
    """The default of axolotl 0.19 and 0.20 is reentrant, and 0.21's leaves out preference training."""
    assert registered() == {"use_reentrant": False}
    assert registered(rl="dpo") == {"use_reentrant": False}
    assert registered(gradient_checkpointing_kwargs={"offload": True}) == {"offload": True, "use_reentrant": False}
    assert registered(gradient_checkpointing_kwargs={"use_reentrant": True}) == {"use_reentrant": True}
    assert registered(gradient_checkpointing=None) is None


@pytest.mark.parametrize("launched", [False, True])
def test_under_zero_3_it_is_reentrant(launched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A non-reentrant recomputation would look at partitioned parameters."""
    if launched:  # by `accelerate launch` with a DeepSpeed plugin
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    assert registered(deepspeed=None if launched else {"zero_optimization": {"stage": 3}}) == {"use_reentrant": True}


def test_a_config_without_the_plugin_is_left_alone() -> None:
    assert registered(plugins=["another.Plugin"]) is None


def test_the_recipe_shows_the_config_before_the_plugin_changed_it() -> None:
    """Two spellings are two instances, and axolotl registers both with one config."""
    cfg = DictDefault({"plugins": ["layersel"], "gradient_checkpointing": True, "axolotl_config_path": "twice.yml"})
    for plugin in (LayerSelPlugin(), LayerSelPlugin()):
        plugin.register(cfg)
    assert "gradient_checkpointing_kwargs" in cfg
    assert "gradient_checkpointing_kwargs" not in LayerSelPlugin.written["twice.yml"]
