"""Stop a forward pass where it enters a layer, and start one there: for trainings that share their frozen layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor, nn

from axolotl_layersel.model.decoder_stack import DecoderStack, StackError, first_tensor, unwrap
from axolotl_layersel.model.replaced_forward import replaced_forward


class _Reached(Exception):
    """Ends a forward pass early; no error."""


def states_entering(stack: DecoderStack, layer: int, *, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """What layer `layer` is given for a right-padded batch, (B, T, D); nothing from that layer on is run.

    Raises:
        StackError: the layer did not run.
    """
    seen: list[Tensor] = []

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(first_tensor(args if args else kwargs.get("hidden_states")))
        raise _Reached

    handle = stack.layers[layer].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with suppress(_Reached):
            stack.backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    finally:
        handle.remove()
    if not seen:
        raise StackError(f"layer {layer} did not run")
    return seen[0]


@contextmanager
def starting_at(stack: DecoderStack, layer: int, states_BTD: Tensor, *, as_tuple: bool) -> Iterator[None]:
    """Within the block layers 0..layer-1 compute nothing, and layer `layer` is given `states_BTD`.

    Embeddings, masks and position embeddings are still the model's own, from the token ids that it is called with.

    Args:
        as_tuple: this model's layers return a tuple, the hidden state first.
    """

    def given(*_args: Any, **_kwargs: Any) -> Any:
        return (states_BTD, None) if as_tuple else states_BTD

    with replaced_forward([unwrap(module) for module in stack.layers[:layer]], lambda _own: given):
        yield
