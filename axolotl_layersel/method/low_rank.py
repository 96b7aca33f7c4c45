"""Low-rank adapters for the length of a pilot: two small products behind linear modules, as forward hooks.

The model's own weights are neither copied nor changed, whatever they are stored as, and nothing is left behind. Full
fine-tuning is piloted the same way: copies, gradients and moments of whole layers would not fit beside the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from axolotl_layersel.model.decoder_stack import DecoderStack

RANK, SCALE = 16, 2.0  # lora_r 16, lora_alpha 32


@contextmanager
def low_rank_adapters(stack: DecoderStack, *, first_trainable: int, seed: int) -> Iterator[list[nn.Parameter]]:
    """Put adapters on every linear module of layers k..L-1 within the block; yields their parameters, float32.

    Args:
        stack: of the bare model.
        first_trainable: k.
        seed: of the first factors; the second ones are zero, so that the model starts as it is.

    Raises:
        ValueError: the layers have no linear module.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters: list[nn.Parameter] = []
    handles = []
    try:
        for module, inputs, outputs in linear_modules(stack.layers[first_trainable:]):
            device = next(module.parameters()).device
            bound = 1 / math.sqrt(inputs)  # as PEFT's own
            drawn = torch.rand(RANK, inputs, generator=generator) * 2 * bound - bound
            down, up = nn.Parameter(drawn.to(device)), nn.Parameter(torch.zeros(outputs, RANK, device=device))
            parameters += [down, up]
            handles.append(module.register_forward_hook(_added(down, up)))
        if not parameters:
            raise ValueError("the decoder layers have no linear modules to adapt")
        yield parameters
    finally:
        for handle in handles:
            handle.remove()


def linear_modules(within: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, int, int]]:
    """Linear modules with their inputs and outputs, packed in 4 or 8 bit or not."""
    for module in (module for one in within for module in one.modules()):
        features = getattr(module, "in_features", None), getattr(module, "out_features", None)
        if isinstance(features[0], int) and isinstance(features[1], int):
            yield module, features[0], features[1]
        elif isinstance(module, Conv1D):
            yield module, module.nx, module.nf


def _added(down: Tensor, up: Tensor) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + SCALE * F.linear(F.linear(args[0].to(down.dtype), down), up).to(output.dtype)

    return hook
