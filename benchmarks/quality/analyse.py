"""Tables from raw runs: measured retention and its noise, rates, laws judged left out, pilots, promises kept.

    python analyse.py                                # results/smollm2 beside the toys of results/fitted and heldout
    python analyse.py work/smollm2 --save results/smollm2
    python analyse.py results/smollm2 --toys results/fitted results/heldout
    python analyse.py --together results/smollm2 results/gemma-3-270m results/llama12

Works on whatever part of a grid is there; a table without runs is left out.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from curves import Curve, read
from judge import COVERAGES, KEPT_BY, fitted, kept_by, laws_of, left_out, task_errors
from laws import errors, exponent, leave_out, lower_end, pooled_exponent, shapes
from plugin_tables import show_beyond, show_coverage, show_half, show_plugin
from run_tables import show_blocks, show_equal_time, show_full, show_measured, show_pilots, show_rates, table

HERE = Path(__file__).parent


def show_laws(curves: list[Curve], toys: list[Curve]) -> None:
    """Mean absolute error of each shape: own exponent (a bound), left-out task, left-out model or family."""
    ready = [c for c in curves if len(c.retention()) > 2 and ("rows" in c.signals or "means" in c.signals)]
    every = ready + [t for t in toys if t.retention()]
    if not ready:
        return
    rows: list[list[object]] = []
    for name in shapes(ready[0]):
        shape = {id(c): shapes(c)[name] for c in every}

        def left(group: list[Curve], judged: list[Curve], by: Callable[[Curve], str], s=shape) -> str:
            found = []
            for c, rest in leave_out(group, by):
                if rest and c in judged:
                    gamma = pooled_exponent([(s[id(o)], o.retention()) for o in rest])
                    found.append(float(np.abs(errors(s[id(c)], gamma, c.retention())).mean()))
            return f"{np.mean(found):.3f}" if found else ""

        own = {id(c): exponent(shape[id(c)], c.retention()) for c in every}
        bound = [float(np.abs(errors(shape[id(c)], own[id(c)], c.retention())).mean()) for c in every]
        here = ", ".join(f"{own[id(c)]:.2f}" for c in ready)
        toy = [own[id(t)] for t in every[len(ready) :]]
        rows.append([
            name, here, f"{min(toy):.2f} to {max(toy):.2f}" if toy else "", float(np.mean(bound[: len(ready)])),
            float(np.mean(bound[len(ready) :])) if toy else "", left(ready, ready, lambda c: c.task),
            left(every, ready, lambda c: "toy" if c in toys else "real"),
            left(every, toys, lambda c: c.model if c in toys else "real"),
        ])  # fmt: skip
    table(
        "Laws s(k) ** gamma: mean absolute error of retention",
        ["shape", "own gammas", "toys' gammas", "own gamma (bound)", "toys, own gamma", "left-out task",
         "from the toys", "left-out toy model"],
        rows,
    )  # fmt: skip


def show_pilot_laws(curves: list[Curve]) -> None:
    """Every law with its power from the other tasks."""
    ready = [c for c in curves if "rows" in c.signals and len(c.retention()) > 2]
    rows: list[list[object]] = []
    control: dict[str, float] = {}
    for name, law in laws_of(ready).items():
        found = left_out(ready, law)
        if len(found) < 2:
            continue
        by_task = {c.task: float(np.abs(task_errors(c, curve)).mean()) for c, curve, _ in found}
        control = control or by_task
        every = np.concatenate([task_errors(c, curve) for c, curve, _ in found])
        high = np.concatenate([
            [e for e, k in zip(task_errors(c, curve), sorted(set(c.retention()) - {0}), strict=True)
             if c.retention()[k] >= 0.75] for c, curve, _ in found
        ])  # fmt: skip
        gains = np.array([control[task] - by_task[task] for task in by_task])
        draw = np.random.default_rng(0).integers(0, len(gains), (2000, len(gains)))
        low, top = np.percentile(gains[draw].mean(1), [2.5, 97.5])
        of_all = fitted(ready, law)
        assert of_all is not None
        rows.append([
            name, len(found), of_all[0], float(np.abs(every).mean()), f"{gains.mean():+.3f} ({low:+.3f} to {top:+.3f})",
            float(np.abs(high).mean()), f"{high.mean():+.3f}", float(np.abs(high).max()),
            max(by_task.values()), of_all[1],
        ])  # fmt: skip
    table(
        "Laws with the power of the other tasks: error of predicted retention",
        ["law", "tasks", "power", "mean error", "better than equal weights by (95 %)", "where kept >= .75",
         "bias there", "worst there", "worst task", "spread of ln(-ln r)"], rows,
    )  # fmt: skip


def show_choices(curves: list[Curve]) -> None:
    """What a coverage keeps when it is chosen by a law and the end of its band, and a fixed cut at the same cost."""
    ready = [c for c in curves if "rows" in c.signals and len(c.retention()) > 2]
    rows: list[list[object]] = []
    for name in [n for n in laws_of(ready) if n.startswith(("equal", "cosine")) or n.endswith(": plugin")]:
        found = left_out(ready, laws_of(ready)[name])
        for z in (0.0, 1.0, 1.645) if found else ():
            for coverage in COVERAGES:
                low = [(c, lower_end(curve, spread, z)) for c, curve, spread in found]
                cuts, cells = kept_by(low, coverage)
                chosen = ", ".join(f"{c.task} {k}" for (c, _), k in zip(low, cuts, strict=True))
                rows.append([name, coverage, z, chosen, *cells])
    table(
        "Coverage kept: cut chosen by the band's lower end (z standard deviations), law of the other tasks",
        ["law", "coverage", "z", "cuts", *KEPT_BY], rows,
    )  # fmt: skip


def save(source: Path, folder: Path) -> None:
    """The raw runs and signals of a worker's folder, small enough for a repository."""
    (folder / "signals").mkdir(parents=True, exist_ok=True)
    lines = []
    for c in read(source):
        order = sorted(c.runs, key=lambda r: (r["kind"], r["steps"], r["index"], r["learning_rate"], r["seed"]))
        lines += [json.dumps(run, separators=(",", ":")) for run in order]
        if "rows" in c.signals:
            found = {key: value for key, value in c.signals.items() if key != "base"}
            text = json.dumps(found, separators=(",", ":")) + "\n"
            (folder / "signals" / f"{c.model}-{c.task}.json").write_text(text, encoding="utf-8")
    (folder / "runs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evidence", type=Path, nargs="?", default=HERE / "results" / "smollm2", help="folder")
    parser.add_argument(
        "--toys", type=Path, nargs="*", default=[HERE / "results" / name for name in ("fitted", "heldout")]
    )
    parser.add_argument(
        "--together", type=Path, nargs="*", default=[], help="folders to judge as one, in one more table"
    )
    parser.add_argument("--save", type=Path, help="folder for a compact copy of the evidence")
    args = parser.parse_args()
    if args.save:
        save(args.evidence, args.save)
    curves, toys = read(args.evidence), [c for folder in args.toys for c in read(folder)]
    show_measured(curves)
    show_rates(curves)
    show_pilots(curves)
    show_laws(curves, toys)
    show_pilot_laws(curves)
    show_choices(curves)
    show_plugin(curves)
    show_coverage(curves)
    show_half(curves)
    show_beyond(curves, toys)
    show_full(curves)
    show_blocks(curves)
    show_equal_time(curves)
    show_coverage(
        [c for folder in args.together for c in read(folder)],
        f"Coverage kept over {', '.join(folder.name for folder in args.together)}",
    )


if __name__ == "__main__":
    main()
