"""Prove on one batch that a model computes the same layer by layer as in one forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from axolotl_layersel.model.decoder_stack import DecoderStack, StackError
from axolotl_layersel.model.layer_by_layer import LayerByLayer, run_layers
from axolotl_layersel.model.verify_stack import prove_stack
from axolotl_layersel.model.weights_here import weights_here, weights_on_demand


@dataclass(frozen=True)
class _OneBatch:
    input_ids: Tensor
    attention_mask: None = None

    def halves(self) -> list[_OneBatch]:
        return [self]


class _LastState:
    """Reads the output of the last layer."""

    nbytes = 0
    state_BTD: Tensor

    def read(self, _state: int, hidden_BTD: Tensor) -> None:
        self.state_BTD = hidden_BTD

    def to(self, _device: torch.device) -> None:
        pass


@contextmanager
def read_out_here(stack: DecoderStack, device: torch.device) -> Iterator[None]:
    """Within the block all that is not in the decoder layers and the embeddings is on the device.

    That is the final norm, the unembedding, position embeddings and the like; embeddings that are tied to the
    unembedding as well.
    """
    away = list(stack.layers) if stack.tied else [*stack.layers, stack.embeddings]
    with weights_here([stack.backbone, stack.head], device, without=away):
        yield


def prove_layers(model: nn.Module, stack: DecoderStack, *, input_ids: Tensor, way: LayerByLayer) -> bool:
    """Check on one batch that the stack is what it seems, and that layers run one by one give the same last state.

    Within `read_out_here`. Every weight comes to the device three times.

    Args:
        model: in eval mode, under the precision that it will be scored in.
        input_ids: (B, T) int64, without padding; the same on all processes.

    Returns:
        Whether the layers of this model return a tuple.

    Raises:
        StackError: a check failed.
    """
    forms: list[bool] = []
    on_demand = [*stack.layers, *([] if stack.tied else [stack.embeddings])]
    note = stack.layers[0].register_forward_hook(lambda _m, _a, output: forms.append(not isinstance(output, Tensor)))
    try:
        with weights_on_demand(on_demand, way.device, before=lambda: way.anyone(False)):
            whole_BTD = prove_stack(model, stack, input_ids=input_ids.to(way.device))
    finally:
        note.remove()
    quiet = LayerByLayer(way.device, way.keep_bytes, anyone=way.anyone)
    ((_, reader),) = run_layers(
        stack, [_OneBatch(input_ids)], way=quiet, enter=lambda _batch: _LastState(), as_tuple=forms[0]
    )
    missed = torch.linalg.vector_norm(reader.state_BTD.to(whole_BTD.device).float() - whole_BTD.float())
    rounding = max(1e-3, 2 * torch.finfo(whole_BTD.dtype).eps)  # where kernels add in a new order in every run
    if missed > rounding * torch.linalg.vector_norm(whole_BTD.float()):
        raise StackError(
            f"{type(model).__name__}: run one by one its layers compute something else, so they take more from each "
            "other than the hidden state. Score it where the whole model fits, or choose the layers by hand with "
            "`layersel: {first_layer: ...}`"
        )
    return forms[0]
