"""Processes wait for each other for as long as all of them live: in short steps, never in a collective.

A collective of the process group ends with an error after the group's time-out, and one process may score a large model
for longer than that while the others wait. So each says in the group's store that it has arrived, and looks now and
then whether the rest have; the collective comes after, when nobody has to wait in it. A thread of each process counts
up in the store as a sign of life, so that the others notice where one was killed or hangs, and no launcher ends them.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

_ARRIVALS, _BLOCKS, _BEATS = "layersel/arrivals", "layersel/blocks", "layersel/beats"
STEPS = 0.001, 0.1  # seconds between two looks at the arrivals: the first, and the most
BEAT = 2.0  # seconds between two signs of life
PATIENCE = 60.0  # seconds without a sign of life after which a process counts as dead


class LostProcessError(RuntimeError):
    """A process was killed or hangs, so nobody may wait for it any longer."""


class Heart:
    """Gives signs of life from its start to its stop, whatever the main thread computes."""

    def __init__(self, store: Any, rank: int) -> None:
        self._store, self._rank = store, rank
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="layersel-heart", daemon=True)

    def start(self) -> None:
        """From now on, silence means that this process is dead.

        Raises:
            LostProcessError: the store is gone already.
        """
        with _store_answers():
            self._store.add(f"{_BEATS}/{self._rank}", 1)  # first, so that whoever sees the block sees a new beat
            self._store.add(f"{_BLOCKS}/{self._rank}", 1)
        self._thread.start()

    def stop(self) -> None:
        """No sign is given once this returns."""
        self._stopped.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._stopped.wait(BEAT):
            try:
                self._store.add(f"{_BEATS}/{self._rank}", 1)
            except RuntimeError:  # the store is gone; the main thread will find out, if it needs it
                return


def meet(store: Any, *, rank: int, world_size: int, late: float) -> None:
    """Return when every process has called this as often as this one has.

    Args:
        store: of the process group.
        rank: of this process, whose heart beats.
        world_size: processes that meet.
        late: seconds to wait for a process that has not started its heart yet: it loads a large model, perhaps.

    Raises:
        LostProcessError: a process that all wait for gives no sign of life, or the store is gone.
    """
    with _store_answers():
        expected = -(-store.add(_ARRIVALS, 1) // world_size) * world_size  # nobody is one meeting ahead of another
        watch, looked, step = _Watch(store, rank, world_size, late), time.monotonic(), STEPS[0]
        while store.add(_ARRIVALS, 0) < expected:
            time.sleep(step)
            step = min(2 * step, STEPS[1])
            if time.monotonic() - looked > BEAT:
                looked = time.monotonic()
                watch.look(looked)


@contextlib.contextmanager
def _store_answers() -> Iterator[None]:
    try:
        yield
    except LostProcessError:
        raise
    except RuntimeError as error:  # torch's own errors of a store are of this kind
        raise LostProcessError(
            f"the store of the process group does not answer, so the process that keeps it has ended: {error}"
        ) from error


class _Watch:
    """When each process last gave a sign of life."""

    def __init__(self, store: Any, rank: int, world_size: int, late: float) -> None:
        self._store, self._late = store, late
        self._block = store.add(f"{_BLOCKS}/{rank}", 0)  # hearts that this process has started so far
        self._seen = {other: (-1, time.monotonic()) for other in range(world_size)}  # beats, and when they changed

    def look(self, now: float) -> None:
        silent = []
        for other, (before, since) in self._seen.items():
            started = self._store.add(f"{_BLOCKS}/{other}", 0) >= self._block
            beats = self._store.add(f"{_BEATS}/{other}", 0)
            if beats != before:
                self._seen[other] = beats, now
            elif now - since > (PATIENCE if started else self._late):
                silent.append(other)
        if silent:
            raise LostProcessError(
                f"no sign of life from rank {', '.join(map(str, silent))} while the others wait: it was killed, by "
                "lack of memory perhaps, or it hangs; its own log says more"
            )
