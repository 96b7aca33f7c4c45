"""What a model gives to its decoder layers: recorded in a forward pass that ends there, to run single layers with."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from axolotl_layersel.model.decoder_stack import DecoderStack, StackError, given_state


@dataclass(frozen=True)
class LayerInput:
    """One call of a decoder layer."""

    state: Tensor  # (B, T, D)
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _AllSeen(Exception):
    """Ends a forward pass early; no error."""


def record_inputs(
    stack: DecoderStack, indices: Collection[int], *, input_ids: Tensor, attention_mask: Tensor | None = None
) -> dict[int, LayerInput]:
    """What the model gives to layers `indices` for a batch; nothing is run from the last of them on.

    Raises:
        StackError: a layer did not run.
    """
    calls: dict[int, LayerInput] = {}

    def note(index: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[index] = LayerInput(given_state(args, kwargs), args, dict(kwargs))
            if len(calls) == len(indices):
                raise _AllSeen

        return hook

    with ExitStack() as hooks, suppress(_AllSeen):
        for index in indices:
            hooks.enter_context(stack.layers[index].register_forward_pre_hook(note(index), with_kwargs=True))
        stack.backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    if missing := sorted(set(indices) - set(calls)):
        raise StackError(f"decoder layers {missing} did not run; allowed are models that run all of their layers")
    return calls
