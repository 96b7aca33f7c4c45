"""Run by `test_meeting.py` in several processes that no launcher watches: `waiting_script.py CASE OUT`.

The process group's time-out is shorter than what the processes wait for, and a process that is silent for three
seconds counts as dead. Every process that lives writes what it saw to `OUT/<rank>.json`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from axolotl_layersel.integration import meeting
from axolotl_layersel.integration.meeting import LostProcessError
from axolotl_layersel.integration.processes import Processes, join_processes

meeting.BEAT, meeting.PATIENCE = 0.5, 3.0


def slow(processes: Processes) -> Any:
    """One works for longer than the group's time-out, and one comes to the block late."""
    return processes.main_only(lambda: time.sleep(9) or "decided in the end")


def killed(processes: Processes) -> Any:
    """Rank 1 dies at work."""
    return processes.together(lambda: os.kill(os.getpid(), signal.SIGKILL) if processes.rank == 1 else None)


def stopped(processes: Processes) -> Any:
    """Rank 1 hangs with all of its threads."""
    return processes.together(lambda: os.kill(os.getpid(), signal.SIGSTOP) if processes.rank == 1 else None)


def store_gone(processes: Processes) -> Any:
    """Rank 0, which keeps the store, dies at work."""
    return processes.together(lambda: os.kill(os.getpid(), signal.SIGKILL) if processes.rank == 0 else None)


def main() -> None:
    """Run the case that the command line names."""
    processes = join_processes(cpu=True)
    torch.distributed.barrier()  # so that none dies while others join
    if sys.argv[1] == "slow" and processes.rank == 1:
        time.sleep(4)  # longer than a silent process is given
    started = time.monotonic()
    seen: dict[str, Any] = {"error": None}
    try:
        with processes.stopping_together():
            seen["result"] = globals()[sys.argv[1]](processes)
    except LostProcessError as error:
        seen["error"] = str(error)
    seen["seconds"] = time.monotonic() - started
    (Path(sys.argv[2]) / f"{processes.rank}.json").write_text(json.dumps(seen), encoding="utf-8")
    os._exit(0)  # the group cannot be left in order, where a member is dead


if __name__ == "__main__":
    main()
