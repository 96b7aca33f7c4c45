"""Where states are kept while a run uses them: by key, in memory or in the memory-mapped files of `state_files.py`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import psutil
import torch
from torch import Tensor
from torch.nn import functional

from axolotl_layersel.prefix_cache.samples import Key, Segment

StoredAs = Literal["model", "int8"]
GROUP = 64  # numbers of a token that share a scale in eight bits: a few entries of a token are huge in real models


def eight_bit_bytes(width: int) -> int:
    """What a token of `width` numbers takes in eight bits, with its float32 scales."""
    return width + 4 * -(-width // GROUP)


class PrefixCacheError(RuntimeError):
    """States in the cache are not what the frozen layers compute, or cannot be stored or used."""


class StateStore(ABC):
    """States of samples, (n, D) each, all of one width and dtype.

    Args:
        width: D.
        dtype: in which the frozen layers hand states on, and in which they are read.
        stored_as: `model` for that dtype, or `int8` with a scale for every `GROUP` numbers of a token.
    """

    def __init__(self, *, width: int, dtype: torch.dtype, stored_as: StoredAs = "model") -> None:
        self.width = width
        self.dtype = dtype
        self.stored_as = stored_as

    @property
    def bytes_per_token(self) -> int:
        """What one token takes."""
        return eight_bit_bytes(self.width) if self.stored_as == "int8" else self.width * self.dtype.itemsize

    @property
    def storage_error(self) -> float:
        """The largest relative error of a token's state that eight bits give.

        Each number is off by up to half of a step of max / 127, and the max is at most the norm of its group.
        """
        return min(self.width, GROUP) ** 0.5 / 254 if self.stored_as == "int8" else 0.0

    @abstractmethod
    def __contains__(self, key: Key) -> bool:
        """Whether the sample's states are here."""

    @abstractmethod
    def add(self, key: Key, states_nD: Tensor) -> None:
        """Keep the states of one sample; the tensor may be used for something else afterwards."""

    @abstractmethod
    def find(self, key: Key) -> tuple[Tensor, Tensor | None]:
        """The stored states of a sample, (n, D), and the scales of its groups, (n, G), or None.

        Raises:
            KeyError: the sample is not here.
        """

    @abstractmethod
    def bytes_left(self) -> int:
        """What is free where states are kept."""

    def flush(self) -> None:  # noqa: B027 - nothing to do for those that keep nothing back
        """Make everything that was added readable, here and for later runs."""

    def encode(self, states_nD: Tensor) -> tuple[Tensor, Tensor | None]:
        """States as they are stored, on the CPU."""
        states_nD = states_nD.detach().to("cpu")
        if self.stored_as == "model":
            return states_nD.contiguous(), None
        groups_nGg = _in_groups(states_nD.float())
        scales_nG = groups_nGg.abs().amax(dim=-1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        codes_nGg = (groups_nGg / scales_nG[..., None]).round().to(torch.int8)
        return codes_nGg.flatten(1)[:, : self.width].contiguous(), scales_nG

    def copy_into(self, key: Key, out_nD: Tensor) -> None:
        """Write the states of a sample into `out_nD`, on the CPU."""
        states, scales = self.find(key)
        if states.shape != out_nD.shape:
            raise PrefixCacheError(f"a sample of {len(out_nD)} tokens is stored with {len(states)}: clear the cache")
        if scales is not None:
            states = (_in_groups(states) * scales[..., None]).flatten(1)[:, : self.width]
        out_nD.copy_(states)


def _in_groups(states_nD: Tensor) -> Tensor:
    """(n, D) as (n, G, `GROUP`), with zeros at the end."""
    n, width = states_nD.shape
    return functional.pad(states_nD, (0, -width % GROUP)).view(n, -1, GROUP)


class MemoryStore(StateStore):
    """States in the memory of this process; nothing outlives the run."""

    def __init__(self, *, width: int, dtype: torch.dtype, stored_as: StoredAs = "model") -> None:
        super().__init__(width=width, dtype=dtype, stored_as=stored_as)
        self._states: dict[Key, tuple[Tensor, Tensor | None]] = {}

    def __contains__(self, key: Key) -> bool:
        return key in self._states

    def add(self, key: Key, states_nD: Tensor) -> None:
        """Keep a copy."""
        states, scales = self.encode(states_nD)
        self._states[key] = (states.clone(), scales)

    def find(self, key: Key) -> tuple[Tensor, Tensor | None]:
        """As it was added."""
        return self._states[key]

    def bytes_left(self) -> int:
        """Of the host's memory."""
        return int(psutil.virtual_memory().available)


def assemble(
    store: StateStore, segments: Sequence[Segment], *, rows: int, length: int, pin: bool = False
) -> Tensor | None:
    """The states of a batch, (B, T, D) on the CPU with zeros where there is no sample; None if one is not here.

    Args:
        store: of the samples.
        segments: of the batch.
        rows: B.
        length: T.
        pin: in page-locked memory, for a fast copy to a GPU.
    """
    wanted = [s for s in segments if not (s.only_padding and s.key not in store)]
    if not wanted or any(segment.key not in store for segment in wanted):
        return None
    full = len(wanted) == rows and all(segment.tokens == length for segment in wanted)
    make = torch.empty if full else torch.zeros
    states_BTD = make((rows, length, store.width), dtype=store.dtype, pin_memory=pin)
    for segment in wanted:
        store.copy_into(segment.key, states_BTD[segment.row, segment.start : segment.end])
    return states_BTD
