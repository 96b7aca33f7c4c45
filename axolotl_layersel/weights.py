"""The weight matrices of a decoder layer, found by structure: linear modules, routers, convolutions, experts.

A cost model needs every matrix that is multiplied with the hidden states, with its real shape, also where the stored
tensor is packed (4 and 8 bit). `probe.py` watches the modules found here at work.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from axolotl_layersel.stack import DecoderStack, unwrap


@dataclass(frozen=True)
class Matrix:
    """A weight matrix, or the matrices of all experts in one tensor, and the module that multiplies with it."""

    name: str  # in the layer
    module: nn.Module
    inputs: int
    outputs: int
    experts: int = 1  # matrices in one tensor
    linear: bool = False  # PEFT can put an adapter on it
    rank: int = 0  # of that adapter, where the layer is trained


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear module, also of one whose weight is packed."""
    features = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(features[0], int) and isinstance(features[1], int):
        return features[0], features[1]
    weight = module.get_parameter("weight")
    return weight.shape[1], weight.shape[0]


def find_matrices(layer: nn.Module) -> list[Matrix]:
    """All weight matrices of a layer without adapters.

    Raises:
        ValueError: the layer carries adapters already.
    """
    found: list[Matrix] = []
    claimed: list[str] = []
    for name, module in layer.named_modules():
        if hasattr(module, "base_layer"):
            raise ValueError(f"{name!r} carries an adapter already; costs are predicted for a model without adapters")
        if isinstance(module, nn.Embedding) or any(name.startswith(f"{place}.") for place in claimed):
            continue
        tensors: list[Tensor] = list(module.parameters(recurse=False))
        if parametrize.is_parametrized(module):  # axolotl quantises stacked experts this way
            claimed.append(f"{name}.parametrizations")
            tensors += [getattr(module, key) for key in vars(module)["_modules"]["parametrizations"]]
        stacked = [tensor for tensor in tensors if tensor.dim() == 3]
        if isinstance(module, _ConvNd):
            outputs = module.weight.shape[0]
            found.append(Matrix(name, module, module.weight.numel() // outputs, outputs))
        elif stacked:  # a 2-D tensor beside them is a bias for each expert
            found += [Matrix(name, module, t.shape[1], t.shape[2], experts=t.shape[0]) for t in stacked]
        elif isinstance(getattr(module, "in_features", None), int):
            claimed.append(name)
            found.append(Matrix(name, module, *linear_shape(module), linear=True))
        else:
            conv1d = hasattr(module, "nf")  # transformers' Conv1D is a linear module
            flat = [tensor for tensor in tensors if tensor.dim() == 2]
            found += [Matrix(name, module, t.shape[0], t.shape[1], linear=conv1d) for t in flat]
    return found


def with_adapters(stack: DecoderStack, *, rank: int, target_modules: Collection[str] | None) -> list[list[Matrix]]:
    """The matrices of layers 0..L-1, with the rank of the adapter that each would get.

    Args:
        rank: 0 for full fine-tuning.
        target_modules: names, or ends of dotted names, of the modules with an adapter; None: every linear module.

    Raises:
        ValueError: a layer carries adapters already, or `target_modules` matches nothing.
    """

    def rank_of(matrix: Matrix, index: int) -> int:
        name = f".{stack.layers_name}.{index}.{matrix.name}"
        chosen = target_modules is None or any(name.endswith(f".{end}") for end in target_modules)
        return rank if matrix.linear and chosen else 0

    found = [
        [dataclasses.replace(matrix, rank=rank_of(matrix, index)) for matrix in find_matrices(unwrap(layer))]
        for index, layer in enumerate(stack.layers)
    ]
    if rank and not any(matrix.rank for layer in found for matrix in layer):
        raise ValueError(
            f"target_modules {target_modules} names no linear module of {stack.layers_name!r}; "
            f"allowed are {sorted({matrix.name for layer in found for matrix in layer if matrix.linear})}"
        )
    return found
