"""Stop a forward pass where it enters a layer, and start one there: for trainings that share their frozen layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from axolotl_layersel.model.decoder_stack import DecoderStack, unwrap
from axolotl_layersel.model.layer_inputs import record_inputs
from axolotl_layersel.model.replaced_forward import replaced_forward


def states_entering(stack: DecoderStack, layer: int, *, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """What layer `layer` is given for a right-padded batch, (B, T, D); nothing from that layer on is run.

    Raises:
        StackError: the layer did not run.
    """
    return record_inputs(stack, [layer], input_ids=input_ids, attention_mask=attention_mask)[layer].state


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
