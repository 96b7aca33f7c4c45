"""Memory that runs out: the work is done in smaller batches, each part once and in order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from axolotl_layersel.model.memory import TooLargeError, halving_batches


def halves(batch: list[int]) -> list[list[int]]:
    middle = len(batch) // 2
    return [batch[:middle], batch[middle:]] if middle else [batch]


def room_for(most: int) -> Callable[[list[int]], int]:
    """Work that an allocator refuses for more than so many rows, in the words of torch's CPU allocator."""

    def work(batch: list[int]) -> int:
        if len(batch) > most:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes")
        return sum(batch)

    return work


def test_every_row_is_worked_on_once_and_in_order() -> None:
    done = list(halving_batches([[1, 2, 3, 4, 5], [6, 7, 8], [9]], room_for(2), halves=halves))
    assert [row for batch, _ in done for row in batch] == list(range(1, 10))
    assert all(len(batch) <= 2 and total == sum(batch) for batch, total in done)


def test_after_the_first_refusal_no_later_batch_is_tried_whole() -> None:
    tried: list[int] = []

    def work(batch: list[int]) -> None:
        tried.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    list(halving_batches([[1, 2, 3, 4]] * 3, work, halves=halves))
    assert tried == [4, *[2] * 6]


def test_a_single_row_that_does_not_fit_is_named() -> None:
    with pytest.raises(TooLargeError, match="can't allocate memory") as refused:
        list(halving_batches([[1], [2, 3]], room_for(0), halves=halves))
    assert refused.value.batch == [1]


def test_other_errors_are_not_taken_for_it() -> None:
    def work(_batch: list[int]) -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        list(halving_batches([[1, 2]], work, halves=halves))
