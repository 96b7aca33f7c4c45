"""Recipes: the user's config with the choice written in, valid for axolotl with and without the plugin.

That runs from both kinds train the plan's layers is tested with the example configs, where axolotl is running anyway.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml
from plans import given_plan, sample, scored_plan

from axolotl_layersel.plan import Plan, PlanError
from axolotl_layersel.report.recipe import RecipeError, recipe, recipe_text

MODEL = "HuggingFaceTB/SmolLM2-135M"
LORA_UPDATES = {
    "peft_layers_to_transform": [4, 5],
    "unfrozen_parameters": ["^base_model.model.model.layers.(4|5)[.].+lora_.+"],
}
FULL_UPDATES = {"unfrozen_parameters": ["^model.layers.(4|5)[.].+", "^model.norm.+"]}


def config(**overrides: Any) -> dict[str, Any]:
    """As a user writes it; None takes a key out."""
    values: dict[str, Any] = {
        "base_model": MODEL,
        "plugins": ["layersel"],
        "layersel": {"num_samples": 64, "coverage": 0.9, "stop_backward": True},
        "adapter": "lora",
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_target_linear": True,
        "datasets": [{"path": "yahma/alpaca-cleaned", "type": "alpaca"}],
        "output_dir": "./outputs/run",
        "sequence_len": 512,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "num_epochs": 1,
        "learning_rate": 0.0002,
        "gradient_checkpointing": True,
        **overrides,
    }
    return {key: value for key, value in values.items() if value is not None}


def lora_plan(**overrides: Any) -> Plan:
    return scored_plan(num_layers=6, first_trainable=4, **{"config_updates": LORA_UPDATES, **overrides})


def full_plan(**overrides: Any) -> Plan:
    return lora_plan(**{"adapter": None, "config_updates": FULL_UPDATES, **overrides})


def full_config(**overrides: Any) -> dict[str, Any]:
    return config(adapter=None, lora_r=None, lora_alpha=None, lora_target_linear=None, **overrides)


# ---- with the plugin -----------------------------------------------------------------------------------------------


def test_the_cut_replaces_all_options_of_scoring_and_the_others_stay() -> None:
    assert recipe(config(), lora_plan())["layersel"] == {"first_layer": 4, "stop_backward": True}
    cached = {"coverage": 0.9, "prefix_cache": "disk", "prefix_cache_gb": 64, "prefix_cache_dir": "/scratch/me"}
    result = recipe(config(layersel=cached), lora_plan())
    assert result["layersel"] == {"first_layer": 4, "prefix_cache": "disk", "prefix_cache_gb": 64}


@pytest.mark.parametrize("plain", [False, True])
def test_a_learning_rate_that_was_raised_for_the_cut_is_written_and_not_raised_again(plain: bool) -> None:
    updates = {**LORA_UPDATES, "learning_rate": 0.00026}
    result = recipe(config(layersel={"scale_learning_rate": True}), lora_plan(config_updates=updates), plain=plain)
    assert result["learning_rate"] == 0.00026
    assert result.get("layersel", {}) == ({} if plain else {"first_layer": 4})


def test_everything_else_is_kept_in_the_user_s_order() -> None:
    written = config()
    result = recipe(written, lora_plan())
    assert list(result) == list(written)
    assert {k: v for k, v in result.items() if k != "layersel"} == {k: v for k, v in written.items() if k != "layersel"}


def test_the_user_s_config_is_not_changed() -> None:
    written = config()
    before = copy.deepcopy(written)
    for plain in (False, True):
        recipe(written, lora_plan(), plain=plain)
    assert written == before


def test_a_config_without_the_plugin_gets_it() -> None:
    result = recipe(config(plugins=["axolotl.integrations.liger.LigerPlugin"], layersel=None), lora_plan())
    assert result["plugins"] == ["axolotl.integrations.liger.LigerPlugin", "layersel"]
    assert result["layersel"] == {"first_layer": 4}


def test_the_plugin_s_dotted_name_stays_as_written() -> None:
    assert recipe(config(plugins=["axolotl_layersel.LayerSelPlugin"]), lora_plan())["plugins"] == [
        "axolotl_layersel.LayerSelPlugin"
    ]


def test_secrets_and_what_belongs_to_one_machine_stay_behind() -> None:
    private = {"comet_api_key": "abc", "resume_from_checkpoint": "./x", "axolotl_config_path": "/home/me/c.yml"}
    assert not set(private) & set(recipe(config(**private), lora_plan()))


# ---- plain, for stock axolotl --------------------------------------------------------------------------------------


def test_plain_lora_has_the_layers_and_neither_plugin_nor_block() -> None:
    result = recipe(config(), lora_plan(), plain=True)
    assert result["peft_layers_to_transform"] == [4, 5]
    assert not {"plugins", "layersel", "unfrozen_parameters"} & set(result)
    assert result["gradient_checkpointing_kwargs"] == {"use_reentrant": False}


def test_plain_full_fine_tuning_has_the_patterns_alone() -> None:
    result = recipe(full_config(), full_plan(), plain=True)
    assert result["unfrozen_parameters"] == FULL_UPDATES["unfrozen_parameters"]
    assert not {"plugins", "layersel", "peft_layers_to_transform"} & set(result)


def test_plain_keeps_other_plugins() -> None:
    other = "axolotl.integrations.liger.LigerPlugin"
    assert recipe(config(plugins=["layersel", other]), lora_plan(), plain=True)["plugins"] == [other]


def test_plain_keeps_reentrant_checkpointing_only_where_axolotl_allows_it() -> None:
    reentrant = {"gradient_checkpointing_kwargs": {"use_reentrant": True}}
    assert recipe(config(**reentrant), lora_plan(), plain=True)["gradient_checkpointing_kwargs"]["use_reentrant"]
    full = recipe(full_config(**reentrant), full_plan(), plain=True)
    assert full["gradient_checkpointing_kwargs"] == {"use_reentrant": False}


def test_plain_without_checkpointing_says_nothing_about_it() -> None:
    result = recipe(config(gradient_checkpointing=False), lora_plan(), plain=True)
    assert "gradient_checkpointing_kwargs" not in result


def test_a_continued_adapter_has_patterns_because_its_own_file_names_its_layers() -> None:
    updates = {"unfrozen_parameters": LORA_UPDATES["unfrozen_parameters"]}
    result = recipe(config(lora_model_dir="./adapter"), lora_plan(config_updates=updates), plain=True)
    assert result["unfrozen_parameters"] == updates["unfrozen_parameters"]
    assert "peft_layers_to_transform" not in result


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_a_plan_for_another_model_is_refused_with_both_names() -> None:
    with pytest.raises(PlanError, match="made for base_model 'HuggingFaceTB/SmolLM2-135M', this run has 'other'"):
        recipe(config(base_model="other"), lora_plan())


def test_a_plan_for_another_adapter_is_refused() -> None:
    with pytest.raises(PlanError, match="made for adapter 'lora', this run has 'qlora'"):
        recipe(config(adapter="qlora"), lora_plan())


def test_a_config_that_chooses_layers_itself_is_refused() -> None:
    with pytest.raises(RecipeError, match="cannot carry the plan: `peft_layers_to_transform` is"):
        recipe(config(peft_layers_to_transform=[1]), lora_plan())


def test_a_plan_without_the_keys_it_wrote_cannot_be_made_plain() -> None:
    with pytest.raises(RecipeError, match="has no config_updates"):
        recipe(config(), given_plan(), plain=True)


def test_a_block_that_is_no_block_is_refused() -> None:
    with pytest.raises(RecipeError, match="`layersel:` is 'yes'"):
        recipe(config(layersel="yes"), lora_plan())


# ---- the file ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plain", [False, True])
def test_the_text_reads_back_as_the_recipe_and_equal_inputs_give_equal_text(plain: bool) -> None:
    text = recipe_text(config(), lora_plan(), plain=plain)
    assert yaml.safe_load(text) == recipe(config(), lora_plan(), plain=plain)
    assert text == recipe_text(config(), lora_plan(), plain=plain)
    assert all(len(line) <= 120 for line in text.splitlines())


def test_the_header_says_what_was_chosen_from_what() -> None:
    text = recipe_text(config(), lora_plan())
    assert text.startswith("# HuggingFaceTB/SmolLM2-135M: LoRA of layers 4 to 5 of 6; layers 0 to 3 are frozen.\n")
    assert "# Chosen by layersel from 128 rows (23456 scored tokens) of yahma/alpaca-cleaned.\n" in text
    assert "without saving compute" not in text
    assert "without saving compute" in recipe_text(config(), lora_plan(), plain=True)


def test_a_given_cut_has_a_header_without_a_sample() -> None:
    text = recipe_text(config(), given_plan(num_layers=6, first_trainable=1))
    assert (
        text.startswith("# HuggingFaceTB/SmolLM2-135M: LoRA of layers 1 to 5 of 6; layers 0 to 0 are frozen") is False
    )
    assert "of layers 1 to 5 of 6; layer 0 is frozen.\n" in text
    assert "Chosen by" not in text


def test_a_name_with_a_line_break_cannot_leave_the_comment() -> None:
    evil = sample("data\nplugins: [evil.Plugin]")
    text = recipe_text(config(), lora_plan(sample=evil))
    assert "plugins: [evil.Plugin]" in text
    assert yaml.safe_load(text)["plugins"] == ["layersel"]


def test_lists_of_numbers_stay_on_one_line_and_subclasses_of_dict_have_no_tag() -> None:
    class Other(dict):  # type: ignore[type-arg]
        pass

    text = recipe_text(Other(config(datasets=[Other(path="x", type="alpaca")])), lora_plan(), plain=True)
    assert "peft_layers_to_transform: [4, 5]\n" in text
    assert "datasets:\n  - path: x\n    type: alpaca\n" in text


# ---- axolotl's own schema ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("written", "plan"), [(config(), lora_plan()), (full_config(), full_plan())])
@pytest.mark.parametrize("plain", [False, True])
def test_axolotl_s_schema_accepts_the_file(written: dict[str, Any], plan: Plan, plain: bool) -> None:
    from axolotl.utils.config import prepare_plugins, validate_config
    from axolotl.utils.dict import DictDefault

    cfg = DictDefault(yaml.safe_load(recipe_text(written, plan, plain=plain)))
    prepare_plugins(cfg)
    valid = validate_config(cfg)
    if plain:
        key = "peft_layers_to_transform" if plan.adapter else "unfrozen_parameters"
        assert valid[key] == plan.config_updates[key]
        assert not valid.plugins
    else:
        assert valid.layersel.first_layer == 4
