"""Let a model compute with kernels that a FLOP counter can see."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_VISIBLE = {  # implementations that are made of torch's operations, so that FLOPs can be counted
    "_attn_implementation": ("sdpa", "eager"),
    "_experts_implementation": ("grouped_mm", "batched_mm", "eager"),
}


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
