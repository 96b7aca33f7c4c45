"""Run a model over a batch and read its latent states, one at a time; leave the model as it was found.

State 0 is what the first decoder layer is given, state i + 1 what layer i returns. States are read with hooks, because
the last entry of transformers' `hidden_states` is already normed while the others are not. Nothing is kept: a state
is gone when its reader returns.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from axolotl_layersel.model.decoder_stack import DecoderStack, first_tensor, given_state

StateReader = Callable[[int, Tensor], None]  # (state index 0..L, hidden states (B, T, D))


@contextmanager
def left_as_found(
    model: nn.Module, *, autocast: torch.dtype | None = None, device: torch.device | None = None
) -> Iterator[None]:
    """Evaluate without gradients, under the precision of the run; restore mode and random state, also on error.

    Args:
        model: its modules' training flags are restored one by one.
        autocast: the trainer's autocast dtype, or None for full precision.
        device: that computes; None: the one that the model is on.
    """
    modes = [(module, module.training) for module in model.modules()]
    device = device or next(model.parameters()).device
    python_state, numpy_state = random.getstate(), np.random.get_state()
    precision = torch.autocast(device.type, dtype=autocast) if autocast is not None else nullcontext()
    try:
        with torch.random.fork_rng(), torch.no_grad(), precision:
            model.eval()
            for module in model.modules():
                # On a CPU, bitsandbytes repacks 4-bit weights in place, and not without loss, in the first forward
                # pass in eval mode. Quantised linear modules compute the same in both modes.
                if hasattr(getattr(module, "weight", None), "quant_state"):
                    module.training = True
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for module, training in modes:
            module.training = training


def read_states(stack: DecoderStack, *, input_ids: Tensor, attention_mask: Tensor, reader: StateReader) -> None:
    """Run the backbone (no unembedding) over one batch and call `reader` for states 0..L in order.

    Args:
        stack: a stack that `prove_stack` has accepted.
        input_ids: (B, T) int64, right-padded: in a causal model padding cannot reach a real position.
        attention_mask: (B, T), 1 for real positions.
        reader: called inside the forward pass; it must not keep what it is given.
    """

    def into_first(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        reader(0, given_state(args, kwargs))

    def out_of(index: int) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _module, _args, output: reader(index + 1, first_tensor(output))

    with ExitStack() as hooks:
        hooks.enter_context(stack.layers[0].register_forward_pre_hook(into_first, with_kwargs=True))
        for index, layer in enumerate(stack.layers):
            hooks.enter_context(layer.register_forward_hook(out_of(index)))
        stack.backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
