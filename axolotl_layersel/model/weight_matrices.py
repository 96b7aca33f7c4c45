"""The weight matrices of a decoder layer, found by structure: linear modules, routers, convolutions, experts.

A cost model needs every matrix that is multiplied with the hidden states, with its real shape, also where the stored
tensor is packed (4 and 8 bit). `layer_probe.py` watches the modules found here at work.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from axolotl_layersel.model.decoder_stack import DecoderStack, unwrap


@dataclass(frozen=True)
class Matrix:
    """A weight matrix, or the matrices of all experts in one tensor, and the module that multiplies with it."""

    name: str  # in the layer
    module: nn.Module
    inputs: int
    outputs: int
    linear: bool = False  # a module that PEFT can put an adapter on
    stacked: Tensor | None = None  # the tensor (experts, ., .) that holds it for all experts
    rank: int = 0  # of its adapter, where the layer is trained

    @property
    def experts(self) -> int:
        """How many matrices it stands for."""
        return 1 if self.stacked is None else self.stacked.shape[0]


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
        tensors: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
        if parametrize.is_parametrized(module):  # axolotl quantises stacked experts this way
            claimed.append(f"{name}.parametrizations")
            tensors |= {key: getattr(module, key) for key in vars(module)["_modules"]["parametrizations"]}
        stacked = {key: tensor for key, tensor in tensors.items() if tensor.dim() == 3}
        if isinstance(module, _ConvNd):
            outputs = module.weight.shape[0]
            found.append(Matrix(name, module, module.weight.numel() // outputs, outputs))
        elif stacked:  # a 2-D tensor beside them is a bias for each expert
            found += [Matrix(f"{name}.{k}", module, t.shape[1], t.shape[2], stacked=t) for k, t in stacked.items()]
        elif isinstance(getattr(module, "in_features", None), int):
            claimed.append(name)
            found.append(Matrix(name, module, *linear_shape(module), linear=True))
        else:
            conv1d = hasattr(module, "nf")  # transformers' Conv1D is a linear module
            flat = [tensor for tensor in tensors.values() if tensor.dim() == 2]
            found += [Matrix(name, module, t.shape[0], t.shape[1], linear=conv1d) for t in flat]
    return found


def with_adapters(
    stack: DecoderStack, *, rank: int, target_modules: Collection[str] | None, target_parameters: Collection[str]
) -> list[list[Matrix]]:
    """The matrices of layers 0..L-1, with the rank of the adapter that each would get.

    Args:
        rank: 0 for full fine-tuning.
        target_modules: names, or ends of dotted names, of the modules with an adapter; None: every linear module.
        target_parameters: the same for stacked tensors.

    Raises:
        ValueError: a layer carries adapters already, or the targets match nothing.
    """

    def rank_of(matrix: Matrix, index: int) -> int:
        if matrix.linear and target_modules is None:
            return rank
        ends = target_modules if matrix.linear else target_parameters if matrix.stacked is not None else ()
        name = f".{stack.layers_name}.{index}.{matrix.name}"
        return rank if any(name.endswith(f".{end}") for end in ends or ()) else 0

    found = [
        [dataclasses.replace(matrix, rank=rank_of(matrix, index)) for matrix in find_matrices(unwrap(layer))]
        for index, layer in enumerate(stack.layers)
    ]
    if rank and not any(matrix.rank for layer in found for matrix in layer):
        allowed = {matrix.name for layer in found for matrix in layer if matrix.linear}
        raise ValueError(
            f"target_modules {target_modules} and target_parameters {target_parameters} name nothing in "
            f"{stack.layers_name!r} that can carry an adapter; linear modules there are {sorted(allowed)}"
        )
    return found
