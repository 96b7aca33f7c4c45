"""Put a filled cache before the frozen layers of a trainer's models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import nn

from axolotl_layersel.model.decoder_stack import DecoderStack, find_stack
from axolotl_layersel.prefix_cache.cached_prefix import CachedPrefix
from axolotl_layersel.prefix_cache.fingerprint import same_prefix
from axolotl_layersel.prefix_cache.offload import OffloadedWeights
from axolotl_layersel.prefix_cache.samples import Key
from axolotl_layersel.prefix_cache.state_store import StateStore


def install_cache(
    model: nn.Module,
    stack: DecoderStack,
    store: StateStore,
    *,
    first_trainable: int,
    where: Mapping[Key, str],
    tolerance: float,
    trainer: Any,
    offload: Literal["auto"] | bool,
    folder: Path,
) -> list[CachedPrefix]:
    """Install the cache in the model, and in a reference model beside it whose frozen layers hold the same numbers.

    Args:
        model: in training.
        stack: of the model.
        store: filled.
        first_trainable: k.
        where: of each sample, for messages.
        tolerance: of the check in the first step.
        trainer: which may have a `ref_model`, and knows the padding token.
        offload: the option `offload_prefix`.
        folder: for weights that leave the host's memory.
    """
    stacks = [stack]
    reference = getattr(trainer, "ref_model", None)
    if reference is not None and reference is not model:
        other = find_stack(reference)
        stacks += [other] if same_prefix(stack, other, first_trainable=first_trainable) else []
    installed = []
    for one in stacks:
        cached = CachedPrefix(
            stack=one,
            store=store,
            first_trainable=first_trainable,
            where=where,
            tolerance=tolerance,
            pad_token_id=getattr(trainer.processing_class, "pad_token_id", None),
            weights=_leaving(one, first_trainable, offload, folder),
        )
        cached.install()
        installed.append(cached)
    return installed


def _leaving(
    stack: DecoderStack, first_trainable: int, offload: Literal["auto"] | bool, folder: Path
) -> OffloadedWeights | None:
    """The weights that leave the device after the first step, or None where they stay."""
    device = next(stack.layers[0].parameters()).device
    modules = [m for layer in stack.layers[:first_trainable] for m in layer.modules()] + [stack.embeddings]
    eight_bit = any(hasattr(p, "SCB") for m in modules for p in m.parameters(recurse=False))
    if offload is False or (offload == "auto" and device.type != "cuda") or eight_bit:
        return None
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return OffloadedWeights(modules, kept=list(stack.head.parameters()), folder=folder)
