"""Adapters are foreseen where PEFT puts them when it wraps the model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from models import CASES
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from axolotl_layersel.model.adapted_modules import adapted_modules

TARGETS: dict[str, tuple[str, dict[str, Any]]] = {
    "ends of names": ("Llama", {"target_modules": ["q_proj", "mlp.down_proj"]}),
    "a regex": ("Llama", {"target_modules": r".*\.[02]\.(self_attn|mlp)\.(q|up)_proj"}),
    "all-linear": ("Llama", {"target_modules": "all-linear"}),
    "some layers, some modules left out": (
        "Llama",
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1, 3], "exclude_modules": ["up_proj"]},
    ),
    "Conv1D": ("GPT-2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "experts by their old names": ("Mixtral", {"target_modules": ["q_proj", "w1", "w2", "w3"]}),
    "experts as tensors": ("Qwen3-MoE", {"target_parameters": ["experts.gate_up_proj"], "target_modules": []}),
}


def model_of(name: str) -> PreTrainedModel:
    return next(case for case in CASES if case.name == name).model()


@pytest.mark.parametrize("key", TARGETS)
def test_peft_adapts_what_was_foreseen(key: str) -> None:
    name, options = TARGETS[key]
    stock = LoraConfig(r=2, **options)
    before = copy.deepcopy(stock)
    found = adapted_modules(model_of(name), stock)
    assert stock == before, "the run's own config stays as it is"
    wrapped = get_peft_model(model_of(name), stock).base_model
    assert set(found.modules) == set(wrapped.targeted_module_names)
    assert set(found.parameters) == set(wrapped.targeted_parameter_names)
    assert found.modules or found.parameters
    assert found.converted == (key == "experts by their old names")
