"""The option block: defaults, bounds, and errors that name the option."""

import inspect

import pytest
import yaml
from pydantic import ValidationError

from axolotl_layersel.config.options import LayerSelArgs, LayerSelOptions
from axolotl_layersel.method.score_layers import score_layers


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"covrage": 0.9}, "covrage\n  Extra inputs are not permitted"),
        ({"coverage": 1.5}, "coverage\n  Input should be less than or equal to 1"),
        ({"coverage": 0}, "coverage\n  Input should be greater than 0"),
        ({"num_samples": 0}, "num_samples\n  Input should be greater than or equal to 1"),
        ({"max_tokens": -1}, "max_tokens\n"),
        ({"deviation": "euclid"}, "deviation\n  Input should be 'cosine' or 'logit_lens'"),
        (
            {"deviation": "semantic_loss"},
            "deviation is 'semantic_loss', which was removed: .*Remove the line",
        ),
        ({"gain": "transition"}, "gain is 'transition', and this option was removed: .*Remove the line"),
        ({"pilot": "always"}, "pilot"),
        ({"pilot_share": 0}, "pilot_share\n  Input should be greater than 0"),
        ({"pilot_share": 1.5}, "pilot_share\n  Input should be less than or equal to 1"),
        ({"policy": "best"}, "policy\n  Input should be 'coverage', 'peak_gain' or 'budget'"),
        ({"budget": 1.5}, "budget is 1.5; allowed is a fraction of the layers in .0, 1. or a whole number"),
        ({"budget": 0}, "budget"),
        ({"budget": True}, "budget"),
        ({"min_layers": 0}, "min_layers\n  Input should be greater than or equal to 1"),
        ({"first_layer": -1}, "first_layer\n  Input should be greater than or equal to 0"),
        ({"first_layer": 3, "plan": "p.json"}, "both first_layer .3. and plan .'p.json'. are given"),
        ({"train_head": "yes please"}, "train_head"),
    ],
)
def test_a_bad_option_is_refused_by_name(block: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LayerSelArgs(layersel=block)


def test_without_a_block_all_defaults_hold() -> None:
    assert LayerSelArgs().layersel is None
    assert LayerSelOptions().coverage == 0.95


def test_a_budget_keeps_its_type_because_it_means_something() -> None:
    assert isinstance(LayerSelOptions(budget=1).budget, int)
    assert isinstance(LayerSelOptions(budget=1.0).budget, float)


def test_the_pipeline_called_directly_has_the_same_defaults() -> None:
    defaults = {p.name: p.default for p in inspect.signature(score_layers).parameters.values()}
    shared = set(defaults) & set(LayerSelOptions.model_fields) - {"pilot"}  # there: what it needs to know of the run
    assert shared == {"deviation", "policy", "coverage", "budget", "min_layers"}
    for name in shared:
        assert defaults[name] == LayerSelOptions.model_fields[name].default


def test_every_option_says_what_it_does() -> None:
    assert all(field.description for field in LayerSelOptions.model_fields.values())


def test_a_conflict_in_the_config_around_the_block_is_a_validation_error() -> None:
    with pytest.raises(ValidationError, match="layersel: `unfrozen_parameters` is .*remove it"):
        LayerSelArgs(plugins=["layersel"], unfrozen_parameters=["lm_head"])


@pytest.mark.parametrize(
    ("written", "read"), [("off", "off"), ("auto", "auto"), ("on", "auto"), ("ram", "ram"), ("'disk'", "disk")]
)
def test_yaml_may_read_on_and_off_as_booleans(written: str, read: str) -> None:
    assert LayerSelOptions(**yaml.safe_load(f"prefix_cache: {written}")).prefix_cache == read
