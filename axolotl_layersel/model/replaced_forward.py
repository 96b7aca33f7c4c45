"""Let modules compute something else for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

Forward = Callable[..., Any]


@contextmanager
def replaced_forward(modules: Iterable[nn.Module], replacement: Callable[[Forward], Forward]) -> Iterator[None]:
    """Within the block each module has another `forward` on its instance; afterwards the one that it had.

    Args:
        modules: each once.
        replacement: makes the other `forward` from the module's own.
    """
    owns: list[tuple[nn.Module, Forward | None]] = []
    try:
        for module in modules:
            owns.append((module, vars(module).get("forward")))
            vars(module)["forward"] = replacement(module.forward)
        yield
    finally:
        for module, own in owns:
            vars(module).pop("forward", None)
            if own is not None:
                vars(module)["forward"] = own
