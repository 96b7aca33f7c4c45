"""What several training processes must agree on: statistics, errors, and one decision.

Every call here is made by all processes or by none. A process that fails tells the others before it raises, so that
all stop with its error within seconds and none waits for a timeout.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


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
            the process's own error where it failed itself, PeerError with that error's text on all others.
        """
        if self.world_size == 1:
            return [work()]
        from accelerate.utils import gather_object

        failure: Exception | None = None
        try:
            mine: dict[str, Any] = {"result": work()}
        except (ValueError, RuntimeError, OSError) as error:
            failure = error
            mine = {"error": f"rank {self.rank}: {type(error).__name__}: {error}"}
        everyone: list[dict[str, Any]] = gather_object([mine])
        if failure is not None:
            raise failure
        if errors := [e["error"] for e in everyone if "error" in e]:
            raise PeerError(errors[0])
        return [e["result"] for e in everyone]

    def main_only(self, work: Callable[[], T]) -> T:
        """Do `work` on the main process and hand its result, or its error, to all."""
        results = self.together(lambda: work() if self.is_main else None)
        return results[0]  # type: ignore[return-value]


def join_processes(*, cpu: bool) -> Processes:
    """The processes of this run; the group is initialised if a launcher started more than one.

    Args:
        cpu: the run is on the CPU, where accelerate must be told so before it picks a backend.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    from accelerate import PartialState

    state = PartialState(cpu=True) if cpu else PartialState()
    return Processes(rank=state.process_index, world_size=state.num_processes)
