"""Make the base model runnable before it has adapters: on the right device, although it is prepared for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from axolotl_layersel.integration import axolotl_api
from axolotl_layersel.model.decoder_stack import DecoderStack
from axolotl_layersel.model.latent_states import left_as_found


def place(model: nn.Module) -> bool:
    """Move the model to this process's GPU if axolotl left it on the CPU, and say whether it did."""
    devices = set(getattr(model, "hf_device_map", {}).values())
    on_cpu = all(p.device.type == "cpu" for p in model.parameters())
    moves = torch.cuda.is_available() and on_cpu and len(devices) <= 1
    if moves:
        model.to(f"cuda:{torch.cuda.current_device()}")
    return moves


@contextmanager
def placed(model: nn.Module, *, keep: bool) -> Iterator[None]:
    """The model on this process's GPU; with `keep` also afterwards, since the trainer would move it there, too."""
    moved = place(model)
    try:
        yield
    finally:
        if moved and not keep:
            model.to("cpu")


@contextmanager
def ready_to_run(model: nn.Module, stack: DecoderStack) -> Iterator[None]:
    """Let the base model run although axolotl has prepared it for adapters; undone on leaving.

    For LoRA kernels axolotl rewrites the attention class to call `apply_qkv` and `apply_o`, which instances get only
    after adapters are loaded. A tiled MLP caches its trainable parameters in its first forward pass, before there are
    any, and accumulates gradients in its parameters: it runs whole here.
    """
    lent = [pair for layer in stack.layers for pair in axolotl_api.attentions_without_kernels(layer)]
    for attention, methods in lent:
        vars(attention).update(methods)
    try:
        with axolotl_api.tiled_mlps_whole(model):
            yield
    finally:
        for attention, methods in lent:
            for name in methods:
                delattr(attention, name)


@contextmanager
def evaluating(model: nn.Module, stack: DecoderStack, *, autocast: torch.dtype | None) -> Iterator[None]:
    """Run the base model as the trainer would run it, without dropout and gradients; all is undone on leaving."""
    with ready_to_run(model, stack), left_as_found(model, autocast=autocast):
        yield
