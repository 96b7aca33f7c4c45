"""Raw runs as curves: measured retention of every cut, its noise, and the signals that were measured before training.

Retention(k) = (base - loss_k) / (base - loss_0): the share of the improvement of training all layers that a cut keeps.
Every cut has the rate that was best for its first seed; works on whatever part of a grid is there.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Run = dict[str, Any]


@dataclass(eq=False)
class Curve:
    """One model on one task: everything that was run; nothing of it changes, so what is derived is kept."""

    model: str
    task: str
    layers: int
    base: float  # held-out loss before fine-tuning
    runs: list[Run]
    signals: dict[str, Any] = field(default_factory=dict)

    def of(self, *, kind: str = "cut", steps: int, seed: int | None = None) -> list[Run]:
        return [
            run for run in self.runs
            if run["kind"] == kind and run["steps"] == steps and (seed is None or run["seed"] == seed)
        ]  # fmt: skip

    @property
    def steps(self) -> int:
        """The number of steps that most runs have."""
        lengths = [run["steps"] for run in self.runs if run["kind"] == "cut"]
        return max(set(lengths), key=lengths.count, default=0)

    def rate(self, cut: int, *, kind: str = "cut", steps: int | None = None) -> float:
        """The best of the rates tried: the lowest loss of the lowest seed there is."""
        found = [run for run in self.of(kind=kind, steps=steps or self.steps) if run["index"] == cut]
        first = [run for run in found if run["seed"] == min(r["seed"] for r in found)]
        return float(min(first, key=lambda run: run["loss"])["learning_rate"])

    def best(self, *, kind: str = "cut", steps: int | None = None) -> dict[int, dict[int, Run]]:
        """Cut -> seed -> the run at the best rate."""
        steps = steps or self.steps
        found: dict[int, dict[int, Run]] = {}
        for cut in sorted({run["index"] for run in self.of(kind=kind, steps=steps)}):
            rate = self.rate(cut, kind=kind, steps=steps)
            mine = [r for r in self.of(kind=kind, steps=steps) if (r["index"], r["learning_rate"]) == (cut, rate)]
            found[cut] = {run["seed"]: run for run in mine}
        return found

    @cache  # noqa: B019  # curves live as long as the program
    def retention(self, *, kind: str = "cut", steps: int | None = None, seed: int | None = None) -> dict[int, float]:
        """Cut -> retention, each seed against its own run of all layers, mean over the seeds that both have."""
        best = self.best(kind=kind, steps=steps)
        if 0 not in best:
            return {}
        kept = {}
        for cut, by_seed in best.items():
            seeds = set(by_seed) & set(best[0]) & ({seed} if seed is not None else set(by_seed))
            ratios = [(self.base - by_seed[s]["loss"]) / (self.base - best[0][s]["loss"]) for s in seeds]
            if ratios:
                kept[cut] = float(np.mean(ratios))
        return kept

    def seed_spreads(self) -> list[float]:
        """Standard deviation of retention over seeds, for every cut and rate that has more than one beside cut 0.

        Against all layers at the rate that has most seeds, each seed against its own.
        """
        kept: dict[tuple[int, float], list[float]] = {}
        by_rate: dict[float, dict[int, Run]] = {}
        for run in self.of(steps=self.steps):
            if run["index"] == 0:
                by_rate.setdefault(run["learning_rate"], {})[run["seed"]] = run
        whole = max(by_rate.values(), key=len, default={})
        for run in self.of(steps=self.steps):
            if run["index"] and run["seed"] in whole:
                ratio = (self.base - run["loss"]) / (self.base - whole[run["seed"]]["loss"])
                kept.setdefault((run["index"], run["learning_rate"]), []).append(ratio)
        return [float(np.std(ratios, ddof=1)) for ratios in kept.values() if len(ratios) > 1]

    def row_noise(self, cut: int, *, steps: int | None = None, draws: int = 400) -> float:
        """Standard error of retention that comes from the choice of held-out rows: bootstrap over rows, paired."""
        best, tokens = self.best(steps=steps), np.array(self.signals["base"]["row_tokens"], float)
        seed = min(best[cut])
        rows = [np.array(values) for values in (self.signals["base"]["row_loss"],
                best[0][seed]["row_loss"], best[cut][seed]["row_loss"])]  # fmt: skip
        draw = np.random.default_rng(0).integers(0, len(tokens), (draws, len(tokens)))
        base, whole, mine = (values[draw].sum(1) / tokens[draw].sum(1) for values in rows)
        return float(np.std((base - mine) / (base - whole)))

    @cache  # noqa: B019  # curves live as long as the program
    def state_mean(self, name: str, rows: int | None = None) -> Array:
        """Token-weighted mean of a signal over the calibration rows."""
        if "rows" in self.signals and name in self.signals["rows"]:
            table = np.array(self.signals["rows"][name])[:rows]
            return np.asarray(table.sum(0) / np.array(self.signals["rows"]["tokens"])[:rows].sum())
        return np.array(self.signals["means"][name])

    @property
    def switched_off(self) -> dict[int, dict[int, float]]:
        """Steps of an all-layer run -> cut -> what is left of its improvement with the adapters below switched off."""
        found = {}
        for run in self.runs:
            if "switched_off" in run and run["index"] == 0:
                gain = self.base - run["loss"]
                found[run["steps"]] = {int(k): (self.base - x) / gain for k, x in run["switched_off"].items()}
        return found


def read(folder: Path) -> list[Curve]:
    """Curves of a folder with `runs.jsonl` and `signals/`, or of a worker's folder with one file for each run."""
    if (folder / "runs.jsonl").exists():
        runs = [json.loads(line) for line in (folder / "runs.jsonl").read_text(encoding="utf-8").splitlines()]
        files = sorted((folder / "signals").glob("*.json"))
        signals = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    else:
        found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((folder / "runs").glob("*/*.json"))]
        runs = [run for run in found if run["kind"] != "signals"]
        signals = [run for run in found if run["kind"] == "signals"]
        for file in sorted((folder / "states").glob("*/base.json")):
            base = json.loads(file.read_text(encoding="utf-8"))
            name = found[0]["model"] if found else ""
            runs.append({"model": name, "task": file.parent.name, "kind": "base", "index": -1, "steps": 0,
                         "seed": 0, "learning_rate": 0.0, **base})  # fmt: skip
    return list(curves(runs, signals))


def curves(runs: list[Run], signals: list[dict[str, Any]]) -> Iterable[Curve]:
    by_pair = {(found["model"], found["task"]): found for found in signals}
    for model, task in sorted({(run["model"], run["task"]) for run in runs}):
        mine = [run for run in runs if (run["model"], run["task"]) == (model, task)]
        base = next((run for run in mine if run["kind"] == "base"), None)
        if base is None:
            continue
        found = dict(by_pair.get((model, task), {}))
        if "row_loss" in base:
            found["base"] = base
        yield Curve(model, task, _layers(mine, found), base["loss"], mine, found)


def _layers(runs: list[Run], signals: dict[str, Any]) -> int:
    """Of the model, by what was measured at every layer; without that by the runs, one of which trains the last."""
    if "rows" in signals:
        return len(signals["rows"]["cosine"][0]) - 1
    said = (len(run["scores"]["forward"]["descent"]) for run in runs if run["kind"] == "choice")
    return next(said, 1 + max(run["index"] for run in runs))
