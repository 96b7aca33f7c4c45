"""Prove on one batch that a model computes the same layer by layer as in one forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from axolotl_layersel.model.decoder_stack import DecoderStack, StackError
from axolotl_layersel.model.layer_by_layer import LayerByLayer
from axolotl_layersel.model.verify_stack import prove_stack
from axolotl_layersel.model.weights_here import weights_here, weights_on_demand


@contextmanager
def read_out_here(stack: DecoderStack, device: torch.device) -> Iterator[None]:
    """Within the block all that is not in the decoder layers and the embeddings is on the device.

    That is the final norm, the unembedding, position embeddings and the like; embeddings that are tied to the
    unembedding as well.
    """
    away = list(stack.layers) if stack.tied else [*stack.layers, stack.embeddings]
    with weights_here([stack.backbone, stack.head], device, without=away):
        yield


class Proof:
    """One batch that passes the model as a whole, and then, with the batches to be scored, layer by layer.

    A batch and its own reader, for `run_layers`. Within `read_out_here`.

    Args:
        model: in eval mode, under the precision that it will be scored in.
        stack: found in it; checked here, every weight comes to the device once for it.
        input_ids: (1, T) int64; the same on all processes.

    Raises:
        StackError: the model computes something else than the stack says.
    """

    attention_mask = None
    nbytes = 0

    def __init__(self, model: nn.Module, stack: DecoderStack, *, input_ids: Tensor, way: LayerByLayer) -> None:
        self.input_ids = input_ids
        self.as_tuple = False  # whether the layers return a tuple, the hidden state first
        self._model_name, self._stack = type(model).__name__, stack

        def note(_module: nn.Module, _args: Any, output: Any) -> None:
            self.as_tuple = not isinstance(output, Tensor)

        on_demand = [*stack.layers, *([] if stack.tied else [stack.embeddings])]
        with (
            stack.layers[0].register_forward_hook(note),
            weights_on_demand(on_demand, way.device, before=lambda: way.anyone(False)),
        ):
            self._whole_BTD = prove_stack(model, stack, input_ids=input_ids.to(way.device), alone=False)

    def halves(self) -> list[Proof]:
        """Itself: it is one row."""
        return [self]

    def to(self, device: torch.device) -> None:
        """Nothing is kept between layers."""

    def read(self, state: int, hidden_BTD: Tensor) -> None:
        """Compare the last state with that of the whole model.

        Raises:
            StackError: they differ.
        """
        if state != self._stack.num_layers:
            return
        missed = torch.linalg.vector_norm(hidden_BTD.to(self._whole_BTD.device).float() - self._whole_BTD.float())
        rounding = max(1e-3, 2 * torch.finfo(hidden_BTD.dtype).eps)  # some kernels add in a new order in every run
        if missed > rounding * torch.linalg.vector_norm(self._whole_BTD.float()):
            raise StackError(
                f"{self._model_name}: run one by one its layers compute something else, so they take more from each "
                "other than the hidden state. Score it where the whole model fits, or choose the layers by hand with "
                "`layersel: {first_layer: ...}`"
            )
