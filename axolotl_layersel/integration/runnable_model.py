"""Let the bare model run where axolotl left it: on the right device, and although it is prepared for adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from axolotl_layersel.model.decoder_stack import DecoderStack
from axolotl_layersel.model.latent_states import left_as_found


def check_whole(model: nn.Module) -> None:
    """Refuse a model whose weights are not all on this process.

    Raises:
        ValueError: a parameter is partitioned (DeepSpeed ZeRO-3) or has no storage (FSDP, lazy loading).
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta or hasattr(parameter, "ds_id"):
            raise ValueError(
                f"the parameter {name!r} is not whole on this process, so the model cannot be scored here: score once "
                "on one process with `axolotl layersel score CONFIG`, then give `layersel: {plan: ...}`"
            )


def place(model: nn.Module) -> None:
    """Move the model to this process's GPU if axolotl left it on the CPU; the trainer would do so later."""
    devices = set(getattr(model, "hf_device_map", {}).values())
    on_cpu = all(p.device.type == "cpu" for p in model.parameters())
    if torch.cuda.is_available() and on_cpu and len(devices) <= 1:
        model.to(f"cuda:{torch.cuda.current_device()}")


class _Whole:
    """Stands in for axolotl's tiling of an MLP: one tile, without an autograd function of its own."""

    @staticmethod
    def apply(forward: Callable[..., Any], mlp: nn.Module, states: Tensor, _tiles: int, _trained: object) -> Any:
        return forward(mlp, states)


@contextmanager
def ready_to_run(model: nn.Module, stack: DecoderStack) -> Iterator[None]:
    """Let the bare model run although axolotl has prepared it for adapters; undone on leaving.

    For LoRA kernels axolotl rewrites the attention class to call `apply_qkv` and `apply_o`, which instances get only
    after adapters are loaded. A tiled MLP caches its trainable parameters in its first forward pass, before there are
    any, and accumulates gradients in its parameters: it runs whole here.
    """
    from axolotl.monkeypatch import lora_kernels

    lent: list[nn.Module] = []
    for layer in stack.layers:
        for (attention,) in ((a,) for a in lora_kernels.find_self_attn_in_layer(layer)):
            if not hasattr(attention, "apply_qkv"):
                attention.apply_qkv = MethodType(lora_kernels.original_apply_qkv, attention)
                attention.apply_o = MethodType(lora_kernels.original_apply_o, attention)
                lent.append(attention)
    tiled = [module for module in model.modules() if hasattr(module, "_tiled_mlp_dist_impl")]
    for module in tiled:
        vars(module)["_tiled_mlp_dist_impl"] = _Whole
    try:
        yield
    finally:
        for attention in lent:
            del attention.apply_qkv, attention.apply_o
        for module in tiled:
            for name in ("_compute_params", "_tiled_mlp_dist_impl"):
                vars(module).pop(name, None)


@contextmanager
def evaluating(model: nn.Module, stack: DecoderStack, *, autocast: torch.dtype | None) -> Iterator[None]:
    """Run the bare model as the trainer would run it, without dropout and gradients; all is undone on leaving."""
    with ready_to_run(model, stack), left_as_found(model, autocast=autocast):
        yield
