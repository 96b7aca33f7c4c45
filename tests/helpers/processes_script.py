"""Run by `test_processes.py` in several real processes: `torchrun --nproc-per-node=N processes_script.py CASE OUT`.

Every process writes what it saw to `OUT/<rank>.json`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny import tiny_llama

from axolotl_layersel.integration.processes import Processes, join_processes
from axolotl_layersel.method.calibration import Row
from axolotl_layersel.method.score_layers import score_layers


def rows(number: int) -> list[Row]:
    """Rows of different lengths."""
    made = []
    for i in range(number):
        ids = tuple(1 + (7 * i + j * j) % 60 for j in range(5 + i % 7))
        made.append(Row(ids, ids))
    return made


def scores(processes: Processes, number: int, deviation: str) -> dict[str, Any]:
    """What this share of `number` rows comes to, once the shares are put together."""
    found = score_layers(
        tiny_llama(),
        rows(number),
        deviation=deviation,
        batch_tokens=24,
        share=(processes.rank, processes.world_size),
        together=processes.together,
    )
    scores = found.scores
    return {
        "cut": found.first_trainable,
        "deviation": scores.deviation,
        "tokens": scores.tokens,
        "retention": scores.retention,
    }


def refuse() -> None:
    """What the failing process does."""
    raise ValueError("row 7 is not a row")


def fail_before(processes: Processes) -> None:
    """Rank 1 fails before the others ask it for anything."""
    if processes.rank == 1:
        refuse()
    processes.together(lambda: 1)


def fail_inside(processes: Processes) -> None:
    """Rank 1 fails in what all do together, after one success."""
    processes.together(lambda: 1)
    processes.together(lambda: refuse() if processes.rank == 1 else None)


def fail_main(processes: Processes) -> None:
    """The one process that decides for all fails."""
    processes.main_only(refuse)


def fail_all(processes: Processes) -> None:
    """Everybody fails, at different places."""
    if processes.rank == 1:
        refuse()
    processes.together(refuse)


def watched(case: Callable[[Processes], None], processes: Processes) -> dict[str, Any]:
    """The error that this process stopped with, and after how many seconds."""
    started = time.monotonic()
    try:
        with processes.stopping_together():
            case(processes)
    except (ValueError, RuntimeError) as error:
        return {"error": f"{type(error).__name__}: {error}", "seconds": time.monotonic() - started}
    return {"error": None}


def main() -> None:
    """Run the case that the command line names."""
    out = Path(sys.argv[1])
    processes = join_processes(cpu=True)
    seen: dict[str, Any] = {"rank": processes.rank, "world_size": processes.world_size}
    for case in (fail_before, fail_inside, fail_main, fail_all):
        seen[case.__name__] = watched(case, processes)
    with processes.stopping_together():
        seen["main_only"] = processes.main_only(lambda: f"decided by {processes.rank}")
        for number in (7, 2):
            for deviation in ("cosine", "logit_lens"):
                seen[f"{deviation}_{number}"] = scores(processes, number, deviation)
                seen[f"{deviation}_{number}_alone"] = scores(Processes(), number, deviation)
    (out / f"{processes.rank}.json").write_text(json.dumps(seen), encoding="utf-8")


if __name__ == "__main__":
    main()
