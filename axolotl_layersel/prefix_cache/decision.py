"""Whether a cache is used, and where it is kept: by what it takes, what room there is, and what it should save."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from axolotl_layersel.prefix_cache.state_store import PrefixCacheError

Choice = Literal["auto", "ram", "disk"]
SHARE_OF_FREE = 0.8  # of the disk or of memory that is free now
WORTH_IT = 0.02  # of the whole run; less than that is not worth the room


@dataclass(frozen=True)
class Need:
    """What a run would put into a cache, and get from it."""

    tokens: int  # of all samples, each once
    missing_tokens: int  # of those that the disk does not hold yet
    bytes_per_token: int
    epochs: float  # how often training reads each sample
    frozen_forward: float  # share of a step with all layers that the frozen layers take forward
    step: float  # ratio of a step to one with all layers, without a cache

    @property
    def bytes(self) -> int:
        """Of all samples."""
        return self.tokens * self.bytes_per_token

    @property
    def missing_bytes(self) -> int:
        """Of those that the disk does not hold yet."""
        return self.missing_tokens * self.bytes_per_token

    @property
    def first_epoch(self) -> float:
        """Its work, filling included, as a ratio to training all layers."""
        return self.step - self.frozen_forward * (1 - self.missing_tokens / max(self.tokens, 1))

    @property
    def later_epochs(self) -> float:
        """The work of each."""
        return self.step - self.frozen_forward

    def pays(self, *, on_disk: bool = True) -> bool:
        """Whether enough of the run is saved to be worth the room."""
        return self.step - self.whole_run(on_disk=on_disk) >= WORTH_IT * self.step

    def whole_run(self, *, on_disk: bool = True) -> float:
        """The run's work with the cache, filling included, as a ratio to training all layers without one."""
        computed = self.missing_tokens if on_disk else self.tokens
        return self.step - self.frozen_forward * (1 - computed / max(self.tokens, 1) / max(self.epochs, 1e-9))


@dataclass(frozen=True)
class Room:
    """Where it could go; bytes."""

    free_disk: int
    free_memory: int
    limit: float | None  # the user's
    processes: int


def choose(choice: Choice, need: Need, room: Room) -> tuple[Literal["ram", "disk"], str]:
    """Where the cache goes, and why, in a few words.

    Raises:
        PrefixCacheError: there is no cache, because it does not fit or, for `auto`, does not pay.
    """
    limit = float("inf") if room.limit is None else room.limit
    disk_fits = need.missing_bytes <= SHARE_OF_FREE * room.free_disk and need.bytes <= limit
    memory_fits = need.bytes <= min(SHARE_OF_FREE * room.free_memory, limit)
    if choice == "ram" and room.processes > 1:
        raise PrefixCacheError(
            f"`prefix_cache: ram` keeps states in one process, and this run has {room.processes}: use `disk`, whose "
            "files all of them read, from memory where there is enough"
        )
    if choice == "ram" and not memory_fits:
        raise PrefixCacheError(_too_much(need.bytes, "memory", room.free_memory, room.limit))
    if choice == "disk" and not disk_fits:
        raise PrefixCacheError(_too_much(need.missing_bytes, "disk", room.free_disk, room.limit))
    if choice != "auto":
        return choice, "asked for"
    if not need.pays():
        saved = need.step - need.whole_run()
        raise PrefixCacheError(
            f"{need.epochs:.2g} epochs and {need.missing_tokens} of {need.tokens} tokens to compute first: it would "
            f"save {max(saved, 0) / need.step:.3f} of the run, less than {WORTH_IT}"
        )
    if disk_fits:
        return "disk", "it pays and there is room"
    if memory_fits and room.processes == 1 and need.pays(on_disk=False):
        return "ram", "it pays, and there is room in memory alone"
    raise PrefixCacheError(_too_much(need.missing_bytes, "disk", room.free_disk, room.limit))


def _too_much(wanted: int, where: str, free: int, limit: float | None) -> str:
    most = f", `prefix_cache_gb` allows {limit / 1e9:.1f} GB" if limit is not None else ""
    return (
        f"states of {wanted / 1e9:.3g} GB are to be kept, {free / 1e9:.3g} GB of {where} are free, of which "
        f"{SHARE_OF_FREE} may be used{most}: free some space, raise `prefix_cache_gb`, use `prefix_cache_dtype: int8` "
        "or a cut that trains more layers"
    )
