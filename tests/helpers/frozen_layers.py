"""Tiny models that train layers CUT to the last, a step of one, and which of their layers ran."""

from __future__ import annotations

from collections import Counter
from typing import Any

from tiny import add_lora, train_only
from torch import Tensor, nn

from axolotl_layersel.model.decoder_stack import find_stack

CUT = 3


def lora(model: Any) -> Any:
    return add_lora(model, first_trainable=CUT)


def full(model: Any) -> Any:
    train_only(model, lambda name: any(f"layers.{i}." in name for i in range(CUT, 6)))
    return model


def count_calls(model: nn.Module) -> Counter[int]:
    """How often the attention of each layer ran."""
    calls: Counter[int] = Counter()
    for index, layer in enumerate(find_stack(model).layers):
        layer.self_attn.register_forward_hook(lambda *_, i=index: calls.update([i]))
    return calls


def step(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
