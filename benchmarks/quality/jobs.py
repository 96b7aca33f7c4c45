"""The runs of a grid file in their order, and the folder that remembers which are done: one file for each run.

A grid file lists entries; each is expanded over tasks, seeds and cuts, in the order in which it should be known:
{"kind": "cut", "tasks": ["gsm8k"], "rates": {"0": 0.003, "29": 0.012}, "seeds": [0], "steps": 40}
`blocks` ([[0, 4], [5, 9]]) with one `rate` takes the place of `rates` for layers trained alone; `{"kind": "signals"}`
is what is measured before training; `{"kind": "choice"}` is what the plugin itself says before a run of so many steps,
its pilot included. Any number of workers may share a folder: a run is claimed by a lock that its
process holds, so that a killed one is free again.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


@dataclass(frozen=True)
class Job:
    """One fine-tuning run: layers `index`..`last` of the model, everything above and below frozen."""

    model: str
    task: str
    kind: str  # `cut`, `block`, `full`, `signals`, `choice`
    index: int = 0
    last: int | None = None
    learning_rate: float = 0.0
    seed: int = 0
    steps: int = 0
    switched_off: bool = False  # also the loss with the adapters below each cut switched off

    @property
    def name(self) -> str:
        if self.kind == "signals":
            return f"{self.task}/signals"
        if self.kind == "choice":
            return f"{self.task}/choice-s{self.seed}-n{self.steps}"
        layers = f"{self.index}" if self.last is None else f"{self.index}-{self.last}"
        return f"{self.task}/{self.kind}-{layers}-lr{self.learning_rate:g}-s{self.seed}-n{self.steps}"


def expand(grid: dict[str, Any], model: str) -> list[Job]:
    """Every run of the grid, in order, each once."""
    found: dict[str, Job] = {}
    for entry in grid["jobs"]:
        for seed in entry.get("seeds", [0]):
            for task in entry["tasks"]:
                for job in _of_entry(entry, model, task, seed):
                    found.setdefault(job.name, job)
    return list(found.values())


def _of_entry(entry: dict[str, Any], model: str, task: str, seed: int) -> Iterator[Job]:
    if entry["kind"] == "signals":
        yield Job(model, task, "signals")
        return
    common = {"seed": seed, "steps": entry["steps"]}
    if entry["kind"] == "choice":
        yield Job(model, task, "choice", **common)
    for first, last in entry.get("blocks", []):
        yield Job(model, task, entry["kind"], first, last, entry["rate"], **common)
    for index, rates in entry.get("rates", {}).items():
        for rate in rates if isinstance(rates, list) else [rates]:
            off = bool(entry.get("switched_off")) and int(index) == 0
            yield Job(model, task, entry["kind"], int(index), None, rate, **common, switched_off=off)


class Folder:
    """Results and locks of one model's runs."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def result(self, job: Job) -> Path:
        return self.path / "runs" / f"{job.name}.json"

    def write(self, job: Job, found: dict[str, Any]) -> None:
        target = self.result(job)
        target.parent.mkdir(parents=True, exist_ok=True)
        run = {key: value for key, value in asdict(job).items() if value is not None and key != "switched_off"}
        target.with_suffix(".part").write_text(json.dumps(run | found) + "\n", encoding="utf-8")
        target.with_suffix(".part").rename(target)

    @contextmanager
    def claimed(self, name: str, *, wait: bool = False) -> Iterator[bool]:
        """Whether this process got the run (or anything else with a name); others don't get it meanwhile."""
        lock = self.path / "locks" / f"{name.replace('/', '--')}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(lock, timeout=-1 if wait else 0):
                yield True
        except Timeout:
            yield False
