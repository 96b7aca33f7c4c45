"""Put one decoder layer in the state in which a run would train it, and take it back.

Adapters do not exist yet when a cut is chosen. PEFT puts the run's own on the layer for as long as it is measured.
Modules with packed weights (4 bit, 8 bit, GPTQ) compute in kernels that a FLOP counter cannot see: a plain product of
the same shape replaces them. Nothing is copied but adapters, and no gradient is kept.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import cast_adapter_dtype
from torch import Tensor, nn
from torch.nn import functional as F

from axolotl_layersel.model.adapted_modules import Adapters

Learnt = Literal["everything", "adapters", "nothing"]
_ADAPTER = "default"  # PEFT's name for the one adapter of a model


@contextmanager
def in_training(module: nn.Module, *, learns: Learnt) -> Iterator[None]:
    """With gradients and dropout, without checkpointing; afterwards as found."""
    modes = [(part, part.training) for part in module.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    checkpointed = [part for part in module.modules() if vars(part).get("gradient_checkpointing")]
    try:
        module.train()
        for name, parameter in module.named_parameters():
            learnt = learns == "everything" or (learns == "adapters" and "lora_" in name)
            parameter.requires_grad_(learnt and parameter.is_floating_point())
        for part in checkpointed:
            vars(part)["gradient_checkpointing"] = False
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for part, mode in modes:
            part.training = mode
        for part in checkpointed:
            vars(part)["gradient_checkpointing"] = True


@contextmanager
def own_parts(layer: nn.Module) -> Iterator[None]:
    """Whatever the block puts into a layer, its modules and parameters are afterwards its own, in their own order."""
    before = [(part, dict(part._modules), dict(part._parameters)) for part in layer.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in layer.parameters()]
    try:
        yield
    finally:
        for part, modules, parameters in before:
            part._modules.clear()
            part._modules.update(modules)
            part._parameters.clear()
            part._parameters.update(parameters)
        for parameter, flag in flags:  # PEFT freezes what is not an adapter
            parameter.requires_grad_(flag)


def unpack_weights(layer: nn.Module, *, dtype: torch.dtype) -> None:
    """Let plain products in `dtype` stand in for modules with packed weights; within `own_parts`."""
    for name, module in list(layer.named_modules()):
        if _packed(module):
            parent, _, leaf = name.rpartition(".")
            setattr(layer.get_submodule(parent), leaf, _PlainProduct(module, dtype))


def add_adapters(layer: nn.Module, name: str, adapters: Adapters) -> None:
    """Let PEFT put the run's adapters on a layer; within `own_parts`.

    Args:
        name: of the layer in its model, as the adapters' modules and parameters are named.
    """
    prefix, stock = f"{name}.", adapters.config
    config = LoraConfig(
        r=stock.r,
        rank_pattern=stock.rank_pattern,
        target_modules=[module for module in adapters.modules if module.startswith(prefix)],
        target_parameters=[parameter for parameter in adapters.parameters if parameter.startswith(prefix)],
        fan_in_fan_out=stock.fan_in_fan_out,
        lora_bias=stock.lora_bias,
        use_dora=stock.use_dora,
    )
    if not config.target_modules and not config.target_parameters:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says it again when it wraps the model
        inject_adapter_in_model(config, _holder(layer, name), adapter_name=_ADAPTER)
    cast_adapter_dtype(layer, _ADAPTER)  # to float32, as in a run
    for part in layer.modules():
        if isinstance(part, LoraLayer) and not isinstance(part, ParamWrapper) and stock.lora_dropout:
            part.lora_dropout[_ADAPTER] = nn.Dropout(stock.lora_dropout)  # parameters have no input to drop


def _holder(layer: nn.Module, name: str) -> nn.Module:
    """A module in which the layer, and nothing else, has its full name."""
    for part in reversed(name.split(".")):
        holder = nn.Module()
        holder.add_module(part, layer)
        layer = holder
    return layer


def _packed(module: nn.Module) -> bool:
    features = _features(module)
    if not all(isinstance(size, int) for size in features):
        return False
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or tuple(weight.shape) != features[::-1]:
        return True
    return weight.itemsize == 1  # 8-bit integers, and the 8-bit floats of kernels of their own


def _features(module: nn.Module) -> tuple[Any, Any]:
    return getattr(module, "in_features", None), getattr(module, "out_features", None)


class _PlainProduct(nn.Linear):
    """A linear module's shape without its weight: one zero that is read as a whole matrix; Jamba subtracts the bias."""

    def __init__(self, packed: nn.Module, dtype: torch.dtype) -> None:
        inputs, outputs = _features(packed)
        super().__init__(inputs, outputs, bias=False, device="meta")
        device = next((tensor.device for tensor in (*packed.parameters(), *packed.buffers())), torch.device("cpu"))
        zero = torch.zeros((), dtype=dtype, device=device)
        self.weight = nn.Parameter(zero.expand(outputs, inputs), requires_grad=False)
        if isinstance(bias := getattr(packed, "bias", None), Tensor):
            self.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)

    def forward(self, states: Tensor) -> Tensor:
        """The product, computed as weights are and returned as states are."""
        return F.linear(states.to(self.weight.dtype), self.weight, self.bias).to(states.dtype)
