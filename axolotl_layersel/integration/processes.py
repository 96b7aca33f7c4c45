"""What several training processes must agree on: statistics, errors, and one decision.

Every call here is made by all processes or by none, inside `stopping_together`. A process that fails there sends its
error to the others in place of what they wait for, so that all stop within seconds and none waits for a timeout. They
may wait for each other for hours (`meeting.py`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

from axolotl_layersel.integration.meeting import Heart, LostProcessError, meet

T = TypeVar("T")

# As axolotl's own, which reads `ddp_timeout` into this variable: the group may serve the whole training.
_TIMEOUT_VARIABLE, _TIMEOUT_SECONDS = "AXOLOTL_NCCL_TIMEOUT", "1800"


class PeerError(RuntimeError):
    """Another process of the run failed; the message is its own."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run, seen from one of them."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that writes files and logs."""
        return self.rank == 0

    def together(self, work: Callable[[], T]) -> list[T]:
        """Do `work` on every process and return all results by rank, on every process.

        Raises:
            PeerError: another process failed, here or anywhere else in `stopping_together`; with its error's text.
            LostProcessError: another process was killed or hangs.
        """
        mine = work()
        return [mine] if self.world_size == 1 else [one["result"] for one in self._exchange({"result": mine})]

    def main_only(self, work: Callable[[], T]) -> T:
        """Do `work` on the main process and send its result, or its error, to all."""
        results = self.together(lambda: work() if self.is_main else None)
        return results[0]  # type: ignore[return-value]

    def stopping_together(self) -> StoppingTogether:
        """A block in which all processes stop when one fails; it ends with `together` or `main_only`."""
        return StoppingTogether(self)

    def _exchange(self, mine: dict[str, Any]) -> list[dict[str, Any]]:
        from accelerate.utils import gather_object

        meet(_store(), rank=self.rank, world_size=self.world_size, late=_timeout().total_seconds())
        everyone: list[dict[str, Any]] = gather_object([mine])
        if "error" not in mine and (errors := [one["error"] for one in everyone if "error" in one]):
            raise PeerError("; ".join(errors))
        return everyone


class StoppingTogether:
    """If this process leaves the block with an error, the others get it, so that none waits for a timeout."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.heart = Heart(_store(), processes.rank) if processes.world_size > 1 else None

    def __enter__(self) -> None:
        if self.heart is not None:
            self.heart.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.heart is None:
            return
        try:
            # These two are known to all. An interrupt reaches every process from the launcher, at any point.
            if isinstance(error, Exception) and not isinstance(error, (PeerError, LostProcessError)):
                told = f"rank {self.processes.rank} failed: {type(error).__name__}: {error}"
                self.processes._exchange({"error": told})
        finally:
            self.heart.stop()


def _store() -> Any:
    """The key-value store that the process group was made with.

    Private: `torch.distributed.distributed_c10d._get_default_store`, torch 2.11 to 2.14.
    """
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def join_processes(*, cpu: bool) -> Processes:
    """The processes of this run; the group is initialised if a launcher started more than one.

    Args:
        cpu: the run is on the CPU, which accelerate must know before it picks a backend.

    Raises:
        RuntimeError: the launcher started several processes, and accelerate has not joined them.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started == 1:
        return Processes()
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    state = PartialState(cpu=cpu or parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=_timeout())
    if state.num_processes != started:
        raise RuntimeError(
            f"WORLD_SIZE is {started}, but accelerate has joined {state.num_processes} of them, so each process would "
            "choose and train on its own: start them with `accelerate launch` or `torchrun`, which also set "
            "LOCAL_RANK, or unset WORLD_SIZE"
        )
    return Processes(rank=state.process_index, world_size=state.num_processes)


def _timeout() -> timedelta:
    """Of the process group's collectives."""
    return timedelta(seconds=int(os.environ.get(_TIMEOUT_VARIABLE, _TIMEOUT_SECONDS)))
