"""Where states are kept while a run uses them: by key, in memory or in the memory-mapped files of `state_files.py`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from axolotl_layersel.prefix_cache.samples import Key, Segment


class StateStore(ABC):
    """States of samples, (n, D) each, all of one width and dtype."""

    @abstractmethod
    def __contains__(self, key: Key) -> bool:
        """Whether the sample's states are here."""

    @abstractmethod
    def add(self, key: Key, states_nD: Tensor) -> None:
        """Keep the states of one sample; the tensor may be used for something else afterwards."""

    @abstractmethod
    def copy_into(self, key: Key, out_nD: Tensor) -> None:
        """Write the states of a sample that is here into `out_nD`, on the CPU.

        Raises:
            KeyError: the sample is not here.
        """

    def flush(self) -> None:  # noqa: B027 - nothing to do for those that keep nothing back
        """Make everything that was added readable, here and for later runs."""


class MemoryStore(StateStore):
    """States in the memory of this process; nothing outlives the run."""

    def __init__(self) -> None:
        self._states: dict[Key, Tensor] = {}

    def __contains__(self, key: Key) -> bool:
        return key in self._states

    def add(self, key: Key, states_nD: Tensor) -> None:
        self._states[key] = states_nD.detach().to("cpu", copy=True).contiguous()

    def copy_into(self, key: Key, out_nD: Tensor) -> None:
        out_nD.copy_(self._states[key])


def assemble(
    store: StateStore, segments: Sequence[Segment], *, shape: tuple[int, int, int], dtype: torch.dtype, pin: bool
) -> Tensor | None:
    """The states of a batch, (B, T, D) on the CPU with zeros where there is no sample; None if one is not here.

    Args:
        store: of the samples.
        segments: of the batch.
        shape: B, T and D.
        dtype: in which states are handed on.
        pin: in page-locked memory, for a fast copy to a GPU.
    """
    wanted = [s for s in segments if not (s.only_padding and s.key not in store)]
    if not wanted or any(segment.key not in store for segment in wanted):
        return None
    full = len(wanted) == shape[0] and all(segment.tokens == shape[1] for segment in wanted)
    states_BTD = (torch.empty if full else torch.zeros)(shape, dtype=dtype, pin_memory=pin)
    for segment in wanted:
        store.copy_into(segment.key, states_BTD[segment.row, segment.start : segment.end])
    return states_BTD
