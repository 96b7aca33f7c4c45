"""Count what one forward and backward pass takes: FLOPs with torch's own counter, bytes with autograd's own hooks.

torch's counter sees matrix products, convolutions and softmax attention; here it learns four operations more. It does
not see kernels that are no operations of torch, such as recurrences of state-space layers in Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


@dataclass(frozen=True)
class StepCount:
    """One forward and backward pass."""

    forward_flops: int
    recomputed_flops: int  # forward, until the last tensor is saved: there non-reentrant checkpointing stops
    backward_flops: int
    saved_bytes: int  # saved for backward, without parameters and what is shared
    shared_bytes: int  # saved of what the pass was given, such as rotary embeddings


def count_step(
    compute: Callable[[], Tensor], *, inputs: Iterable[Tensor], weights: Iterable[Tensor], given: Iterable[Tensor] = ()
) -> StepCount:
    """Run `compute`, and backward from its result to the inputs and weights that require a gradient; none is kept.

    Args:
        compute: the forward pass.
        inputs: what it computes with.
        weights: parameters and buffers, which are there anyway and do not count as saved.
        given: tensors that other passes use as well.
    """
    weights = list(weights)
    saved = _Saved(weights=weights, given=given)
    with flop_counter() as forward, saved.during(forward):
        output = compute()
    with flop_counter() as backward:
        if wanted := [tensor for tensor in (*inputs, *weights) if tensor.requires_grad]:
            torch.autograd.grad(output, wanted, torch.zeros_like(output), allow_unused=True)
    return StepCount(
        forward_flops=forward.get_total_flops(),
        recomputed_flops=saved.flops_at_last,
        backward_flops=backward.get_total_flops(),
        saved_bytes=sum(saved.bytes.values()),
        shared_bytes=sum(saved.given_bytes.values()),
    )


def flop_counter() -> FlopCounterMode:
    """A counter with the operations that torch's own lacks, and one that it gets wrong."""
    return FlopCounterMode(display=False, custom_mapping=_MORE_OPERATIONS)


def _grouped_mm(left: list[int], right: list[int], *_: Any, **__: Any) -> int:
    """Rows sorted by expert, each multiplied with its own expert's matrix; or gradients of those matrices."""
    return 2 * prod(left) * right[-1]


def _convolution_backward(output: list[int], _input: list[int], weight: list[int], *rest: Any, **_: Any) -> int:
    """As many FLOPs for each gradient as forward; torch's formula ignores groups, which depthwise convolutions have."""
    input_grad, weight_grad, _bias_grad = rest[-1]
    return int(2 * prod(output) * prod(weight[1:]) * (input_grad + weight_grad))


def _attention(query: list[int], key: list[int], value: list[int], *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(
    gradient: list[int], query: list[int], key: list[int], value: list[int], *_: Any, **__: Any
) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))


_MORE_OPERATIONS: dict[Any, Any] = {
    torch.ops.aten._grouped_mm: _grouped_mm,
    torch.ops.aten.convolution_backward: _convolution_backward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class _Saved:
    """The storages that autograd saves for backward."""

    def __init__(self, *, weights: Iterable[Tensor], given: Iterable[Tensor]) -> None:
        self._weights = {_storage(tensor) for tensor in weights}
        self._given = {_storage(tensor) for tensor in given}
        self._alive: list[Tensor] = []  # a freed storage would give its address to another
        self.bytes: dict[int, int] = {}
        self.given_bytes: dict[int, int] = {}
        self.flops_at_last = 0  # FLOPs that had been computed when the last tensor was saved

    def during(self, counter: FlopCounterMode) -> torch.autograd.graph.saved_tensors_hooks:
        def pack(tensor: Tensor) -> Tensor:
            self.flops_at_last = counter.get_total_flops()
            key = _storage(tensor)
            if key not in self._weights:
                (self.given_bytes if key in self._given else self.bytes)[key] = tensor.untyped_storage().nbytes()
                self._alive.append(tensor.detach())
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
