"""What the states of a cache depend on, in one number: another model, cut, precision or code has another folder.

The weights are hashed as they lie in memory, so that a revision, a quantisation or a merged adapter shows without
anybody naming it. Around them stand the config of the model, the classes and functions that compute, and the versions
of the libraries. The data are no part of it: samples have keys of their own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from axolotl_layersel.model.decoder_stack import DecoderStack

_CHUNK = 64 << 20
_NO_MATTER = {"_name_or_path", "use_cache", "transformers_version", "pad_token_id", "bos_token_id", "eos_token_id"}


def below_the_cut(stack: DecoderStack, *, first_trainable: int) -> Iterator[tuple[str, nn.Module]]:
    """The modules that run before layer k: embeddings, their norms, rotary embeddings, layers 0..k-1; by name."""
    above = {id(m) for layer in stack.layers[first_trainable:] for m in layer.modules()}
    above |= {id(m) for m in stack.final_norm.modules()}
    for name, module in stack.backbone.named_modules():
        if id(module) not in above:
            yield name, module


def prefix_fingerprint(
    stack: DecoderStack, *, first_trainable: int, facts: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Thirty-two hexadecimal digits, and what they were made of.

    Args:
        stack: of the model in training; weights may lie on any device.
        first_trainable: k.
        facts: of the run: autocast, dtype and width of the states, how they are stored, versions.
    """
    weights, code = hashlib.sha256(), hashlib.sha256()
    for name, module in below_the_cut(stack, first_trainable=first_trainable):
        forward = getattr(module.forward, "__func__", module.forward)
        kind, function = type(module), f"{getattr(forward, '__module__', '')}.{getattr(forward, '__qualname__', '')}"
        code.update(f"{name} {kind.__module__}.{kind.__qualname__} {function}\n".encode())
        for own, tensor in _tensors(module):
            weights.update(f"{name}.{own} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            _add(weights, tensor)
    config = getattr(stack.backbone, "config", None)
    told = config.to_dict() if config is not None and hasattr(config, "to_dict") else {}
    about = {
        "cut": first_trainable,
        "weights": weights.hexdigest(),
        "code": code.hexdigest(),
        "config": {key: value for key, value in sorted(told.items()) if key not in _NO_MATTER},
        "attention": getattr(config, "_attn_implementation", None),
        "device": next(stack.layers[0].parameters()).device.type,
        "float32_matmul": torch.get_float32_matmul_precision(),
        "cuda_tf32": torch.backends.cuda.matmul.allow_tf32,
        **facts,
    }
    text = json.dumps(about, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32], json.loads(text)


def same_prefix(one: DecoderStack, other: DecoderStack, *, first_trainable: int) -> bool:
    """Whether two models hold the same numbers below layer k, by name."""
    theirs = dict(below_the_cut(other, first_trainable=first_trainable))
    for name, module in below_the_cut(one, first_trainable=first_trainable):
        own, matching = dict(_tensors(module)), dict(_tensors(theirs[name])) if name in theirs else {}
        if own.keys() != matching.keys():
            return False
        if not all(torch.equal(tensor, matching[key].to(tensor.device)) for key, tensor in own.items()):
            return False
    return True


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own parameters and buffers, and the scales of quantised ones."""
    for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
        if tensor is None:
            continue
        yield name, tensor.detach()
        state = getattr(tensor, "quant_state", None)
        if state is not None:
            for key, value in sorted(state.as_dict(packed=True).items()):
                yield f"{name}.{key}", value
        for key in ("CB", "SCB"):  # 8-bit weights
            value = getattr(tensor, key, None)
            if isinstance(value, Tensor):
                yield f"{name}.{key}", value


def _add(digest: Any, tensor: Tensor) -> None:
    flat = tensor.contiguous().view(-1)
    for part in (flat.view(torch.uint8) if flat.numel() else flat).split(_CHUNK):
        digest.update(part.cpu().numpy())
