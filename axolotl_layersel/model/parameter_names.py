"""Names of parameters and modules, whatever wraps the model."""

from __future__ import annotations

from collections.abc import Collection, Iterable

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
