"""What a model hands to its decoder layers: recorded in a short forward pass, to run single layers with."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from axolotl_layersel.model.decoder_stack import DecoderStack, first_tensor

_VISIBLE = {  # implementations that are made of torch's operations, so that FLOPs can be counted
    "_attn_implementation": ("sdpa", "eager"),
    "_experts_implementation": ("grouped_mm", "batched_mm", "eager"),
}


@dataclass(frozen=True)
class LayerInput:
    """One call of a decoder layer."""

    state: Tensor  # (1, T, D)
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _AllSeen(Exception):
    """Ends a forward pass early; no error."""


def record_inputs(stack: DecoderStack, indices: Collection[int], length: int) -> dict[int, LayerInput]:
    """What the model hands to layers `indices` in a forward pass over `length` positions; it ends at the last.

    Raises:
        ValueError: a layer did not run.
    """
    calls: dict[int, LayerInput] = {}
    handles = []

    def note(index: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[index] = LayerInput(first_tensor(args if args else kwargs.get("hidden_states")), args, dict(kwargs))
            if len(calls) == len(indices):
                raise _AllSeen

        return hook

    weight = stack.embeddings.get_parameter("weight")
    ids = (torch.arange(length, device=weight.device) * 31 % weight.shape[0])[None]
    try:
        for index in indices:
            handles.append(stack.layers[index].register_forward_pre_hook(note(index), with_kwargs=True))
        with suppress(_AllSeen):
            stack.backbone(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if missing := sorted(set(indices) - set(calls)):
        raise ValueError(f"decoder layers {missing} did not run; costs are predicted for a model that runs all of them")
    return calls


@contextmanager
def visible_kernels(backbone: nn.Module) -> Iterator[bool]:
    """Run attention and experts with torch's operations, whatever kernels the run will use; afterwards as found.

    Yields:
        Whether what is saved for pairs of positions is saved in the run as well: not where eager attention stands in
        for a fused kernel.
    """
    config = getattr(backbone, "config", None)
    before = {name: getattr(config, name, None) for name in _VISIBLE}
    plain = {
        "_attn_implementation": "sdpa" if getattr(backbone, "_supports_sdpa", False) else "eager",
        "_experts_implementation": "eager",
    }
    hidden = [name for name, value in before.items() if value is not None and value not in _VISIBLE[name]]
    try:
        for name in hidden:
            setattr(config, name, plain[name])
        yield "_attn_implementation" not in hidden or plain["_attn_implementation"] != "eager"
    finally:
        for name in hidden:
            setattr(config, name, before[name])
