"""Which modules and parameters of a model get a LoRA adapter, by PEFT's own rules.

A config names its targets by ends of names, by a regex, as "all-linear", or by names from before transformers stacked
the experts of a layer in one tensor. PEFT resolves all of them when it wraps a model; here its own functions give the
same answer before that.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

from peft import LoraConfig
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers, get_model_conversion_mapping
from torch import nn

_PARAMETRIZED = ".parametrizations."  # where torch keeps experts that axolotl stores in 8 or 4 bit


@dataclass(frozen=True)
class Adapters:
    """A run's adapters, as if every layer were trained."""

    stock: LoraConfig  # as axolotl builds it from the user's keys, or as a saved adapter has it
    config: LoraConfig  # with targets as PEFT reads them for this model; "all-linear" is resolved
    modules: tuple[str, ...]  # full names of the modules with an adapter
    parameters: tuple[str, ...]  # the same for single parameters: the stacked tensors of experts

    @property
    def converted(self) -> bool:
        """Whether PEFT itself turned targeted modules into parameters."""
        return set(self.config.target_parameters or ()) != set(self.stock.target_parameters or ())


def adapted_modules(model: nn.Module, stock: LoraConfig) -> Adapters:
    """What PEFT would adapt in `model`.

    Args:
        model: the base model, before PEFT wraps it.
        stock: the adapter config of the run.
    """
    config = copy.deepcopy(stock)
    convert_peft_config_for_transformers(config, model=model, conversions=get_model_conversion_mapping(model))
    config = _maybe_include_all_linear_layers(config, model)
    named = [name for name, _ in model.named_modules() if name and _PARAMETRIZED not in f"{name}."]
    modules = tuple(name for name in named if check_target_module_exists(config, name))
    targets = config.target_parameters or ()
    parameters = [n for n in _parameter_names(model) if any(n == t or n.endswith(f".{t}") for t in targets)]
    return Adapters(copy.deepcopy(stock), config, modules, tuple(parameters))  # PEFT changes the one that it wraps with


def _parameter_names(model: nn.Module) -> list[str]:
    """Full names of all parameters; one that is stored quantised goes by the name under which it is used."""
    names: dict[str, None] = {}  # an ordered set
    for name, _ in model.named_parameters():
        owner, parametrized, rest = name.partition(_PARAMETRIZED)
        names[f"{owner}.{rest.partition('.')[0]}" if parametrized else name] = None
    return list(names)
