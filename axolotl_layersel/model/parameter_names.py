"""Names of parameters and modules, whatever wraps the model."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from axolotl_layersel.model.decoder_stack import DecoderStack

_WRAPPER_PARTS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


def normalise(name: str) -> str:
    """A parameter or module name without what DDP, FSDP, torch.compile and checkpoint wrappers add to it."""
    parts = [part for part in name.split(".") if part not in _WRAPPER_PARTS]
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def within(name: str, places: Iterable[str]) -> str:
    """The place that holds the parameter `name`, or an empty string."""
    return next((place for place in places if name.startswith(f"{place}.") or name == place), "")


def shorten(names: Collection[str]) -> str:
    """The first ten names, and how many more there are."""
    ordered = sorted(names)
    rest = f", and {len(ordered) - 10} more" if len(ordered) > 10 else ""
    return (", ".join(ordered[:10]) or "none") + rest


def layer_of(name: str, stack: DecoderStack) -> int | None:
    """Index of the decoder layer that a module or parameter belongs to, or None; wrapper prefixes do not matter."""
    found = re.search(rf"(?:^|[.]){re.escape(stack.layers_name)}[.](\d+)(?:[.]|$)", name)
    return int(found.group(1)) if found else None
