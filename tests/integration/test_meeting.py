"""Processes wait for each other for as long as all live, and no longer: real ones, which no launcher watches."""

from __future__ import annotations

import json
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from axolotl_runs import HELPERS, free_port, start

pytestmark = pytest.mark.slow

ENDED = 30  # seconds, with room for a busy machine


def _run(case: str, out: Path, *, dead: int | None = None, processes: int = 3) -> list[dict[str, Any]]:
    """What each process saw that lived to the end, by rank."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    address |= {"AXOLOTL_NCCL_TIMEOUT": "6"}  # seconds: of the group, which accelerate joins
    ranks = range(processes)
    runs = [
        start(
            [sys.executable, str(HELPERS / "waiting_script.py"), case, str(out)],
            out / f"log{rank}",
            env={**address, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in ranks
    ]
    living = [rank for rank in ranks if rank != dead]
    deadline = time.monotonic() + 120
    while not all(runs[rank].process.poll() is not None for rank in living) and time.monotonic() < deadline:
        time.sleep(0.1)
    for run in runs:
        run.signal(signal.SIGKILL)
    silent = [rank for rank in living if not (out / f"{rank}.json").exists()]
    assert not silent, "".join(runs[rank].log for rank in silent)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in living]


def test_they_wait_for_longer_than_the_group_s_time_out(tmp_path: Path) -> None:
    """And for one that comes later than a silent one is given: it may be loading its model still."""
    seen = _run("slow", tmp_path)
    assert [one["result"] for one in seen] == ["decided in the end"] * 3
    assert all(one["seconds"] > 8 for one in (seen[0], seen[2]))


@pytest.mark.parametrize("case", ["killed", "stopped"])
def test_they_end_when_one_of_them_gives_no_sign_of_life(tmp_path: Path, case: str) -> None:
    keeps_the_store, other = _run(case, tmp_path, dead=1)
    assert "no sign of life from rank 1 while the others wait" in keeps_the_store["error"]
    # The other one may find first that the store has ended with its keeper.
    assert re.search("no sign of life from rank 1 while|the store of the process group does not answer", other["error"])
    assert all(3 < one["seconds"] < ENDED for one in (keeps_the_store, other))


def test_they_end_when_the_process_that_keeps_the_store_is_killed(tmp_path: Path) -> None:
    for one in _run("store_gone", tmp_path, dead=0):
        assert "the store of the process group does not answer" in one["error"]
        assert one["seconds"] < ENDED
