"""Memory that runs out is answered with smaller batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from axolotl_layersel.log import LOG

B = TypeVar("B")
T = TypeVar("T")


class TooLargeError(RuntimeError):
    """Memory does not suffice for one row alone."""

    def __init__(self, batch: Any, error: Exception) -> None:
        super().__init__(str(error))
        self.batch = batch


def out_of_memory(error: Exception) -> bool:
    """Whether memory ran out; for the CPU and for cuBLAS, torch says so only in words."""
    words = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED", "bad_alloc")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error) for word in words)


def halving_batches(
    batches: Iterable[B], work: Callable[[B], T], *, halves: Callable[[B], Sequence[B]]
) -> Iterator[tuple[B, T]]:
    """Each batch with what `work` makes of it; where memory runs out, it and all batches after it are halved.

    Args:
        halves: a batch in two, or alone where it is one row.

    Raises:
        TooLargeError: with the batch, which is one row.
    """
    pending = list(batches)
    while pending:
        batch = pending.pop(0)
        with noting_lack(batch, halves) as lack:
            result = work(batch)
        if lack.memory:
            pending = halved([batch, *pending], halves)
        else:
            yield batch, result


@dataclass
class Lack:
    """Whether memory ran out."""

    memory: bool = False


@contextmanager
def noting_lack(batch: B, halves: Callable[[B], Sequence[B]]) -> Iterator[Lack]:
    """Note where memory runs out for a batch, and go on.

    Raises:
        TooLargeError: the batch is one row.
    """
    lack = Lack()
    try:
        yield lack
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        if len(halves(batch)) == 1:
            raise TooLargeError(batch, error) from error
        lack.memory = True


def halved(batches: Sequence[B], halves: Callable[[B], Sequence[B]]) -> list[B]:
    """The batches in halves, with a word in the log."""
    LOG.warning("out of memory: this batch and all after it are halved")
    return [half for batch in batches for half in halves(batch)]
