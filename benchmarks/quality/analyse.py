"""Tables from raw runs: measured retention and its noise, rates, laws judged left out, pilots, promises kept.

    python analyse.py                                # results/smollm2 beside the toys of results/fitted and heldout
    python analyse.py work/smollm2 --save results/smollm2
    python analyse.py results/smollm2 --toys results/fitted results/heldout

Works on whatever part of a grid is there; a table without runs is left out.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from curves import Array, Curve, read
from judge import by_retention, fitted, laws_of, left_out, measured_at, pilot_of, show_half, task_errors
from laws import FLOOR, chosen_cut, errors, exponent, leave_out, lower_end, pooled_exponent, shapes
from run_tables import show_blocks, show_equal_time, show_full, show_measured, show_pilots, show_rates, table
from scipy.stats import spearmanr

from axolotl_layersel.method.gain import still_to_do
from axolotl_layersel.method.pilot_size import pilot_cut
from axolotl_layersel.method.retention import RetentionLaw, forward_law, pilot_law, unlike_the_known

HERE = Path(__file__).parent
FAMILIES = {"gemma-3-270m": "gemma3_text"}  # models whose family is another than the law's
COVERAGES = (0.90, 0.95, 0.98)
BEYOND_POWERS = (0.3, 0.5, 0.7, 0.85, 1.0)
KEPT_BY = (
    "kept, mean", "least", "step cost", "fixed cut at that cost keeps (mean, least)",
    "rank correlation with the measured cut",
)  # fmt: skip


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


def kept_by(found: list[tuple[Curve, Array]], coverage: float) -> tuple[list[int], list[object]]:
    """The cuts that retentions choose, and cells: what they keep, and what a fixed cut at the same cost keeps.

    Args:
        found: a measured curve and the (L,) retention that can be relied on for it, lower end of a band or not.
    """
    cuts = [chosen_cut(retention_L, coverage) for _, retention_L in found]
    kept = [measured_at(c.retention(), cut) for (c, _), cut in zip(found, cuts, strict=True)]
    fixed = float(np.mean(cuts))
    same = [measured_at(c.retention(), fixed) for c, _ in found]
    own = [float(np.interp(-coverage, *by_retention(c.retention()))) for c, _ in found]
    rho = spearmanr(cuts, own)[0] if len(set(cuts)) > 1 else float("nan")
    step = 1 - fixed / found[0][0].layers / 2
    return cuts, [float(np.mean(kept)), min(kept), step, f"{np.mean(same):.3f}, {min(same):.3f}", f"{rho:.2f}"]


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


def laws_now(c: Curve, scores: dict[str, Any]) -> RetentionLaw:
    """The law that ships, through what a pilot measured when it ran, or from the loss alone."""
    pilot = None if scores["pilot"] is None else pilot_of(scores)
    law = pilot_law(pilot) if pilot else forward_law(scores["loss"])
    family = FAMILIES.get(c.model, "llama")
    return law.widened(unlike_the_known(num_layers=c.layers, loss=scores["loss"], family=family, pilot=pilot))


def show_plugin(curves: list[Curve]) -> None:
    """What the plugin says before runs of some lengths, from the pilots that it ran, against what was measured."""
    by_length: dict[tuple[str, int], list[tuple[Curve, Array]]] = {}
    rows: list[list[object]] = []
    for c in curves:
        kept = {k: r for k, r in c.retention().items() if k}
        for run in (run for run in c.runs if run["kind"] == "choice" and len(kept) > 1):
            pilot = run["scores"]["pilot"]["pilot"]
            for name, scores in run["scores"].items():
                law, share_L = laws_now(c, scores), np.array(scores["descent"])
                curve_L, low_L, high_L = law.curve(share_L), law.low(share_L), law.high(share_L)
                by_length.setdefault((name, run["steps"]), []).append((c, low_L))
                missed = np.array([curve_L[k] - r for k, r in kept.items()])
                inside = [low_L[k] <= r <= high_L[k] for k, r in kept.items()]
                rows.append([
                    c.task, run["seed"], run["steps"], pilot["steps"] if name == "pilot" else "none",
                    pilot["cost_share"] if name == "pilot" else 0.0, run["cpu_seconds"][name],
                    float(np.abs(missed).mean()), f"{missed.mean():+.3f}", f"{sum(inside)} of {len(inside)}",
                    *(chosen_cut(low_L, coverage) for coverage in COVERAGES),
                ])  # fmt: skip
    table(
        "What the plugin says before a run, against what was measured",
        ["task", "seed", "steps of the run", "of the pilot", "planned cost", "CPU s", "mean error", "bias",
         "within the band", *(f"cut at {x:.2f}" for x in COVERAGES)], rows,
    )  # fmt: skip
    rows = []
    for (name, steps), found in sorted(by_length.items()):
        for coverage in COVERAGES:
            rows.append([name, steps, coverage, len(found), *kept_by(found, coverage)[1]])
    table(
        "Coverage kept by the plugin's choice",
        ["law", "steps of the run", "coverage", "choices", *KEPT_BY], rows,
    )  # fmt: skip


def show_beyond(curves: list[Curve], toys: list[Curve]) -> None:
    """How fast retention falls beyond the pilot's cut: the power of ln s(k), with the measured retention at the cut."""
    rows: list[list[object]] = []
    for name, group in {"evidence": curves, "toys": toys}.items():
        found = []
        for c in group:
            kept, cut = c.retention(), pilot_cut(c.layers)
            if (shape_L := known_descent(c)) is not None and 0 < kept.get(cut, 0) < 1:
                steepness_L = np.log(np.clip(shape_L, FLOOR, 1 - FLOOR))
                found += [(kept[cut], steepness_L[k] / steepness_L[cut], kept[k]) for k in kept if k > cut]
        if found:
            misses = [np.mean([abs(at**ratio**power - r) for at, ratio, r in found]) for power in BEYOND_POWERS]
            rows.append([name, len(found), *map(float, misses)])
    table(
        "Beyond the pilot's cut: mean error by the power of ln s(k)",
        ["models", "points", *(f"{power:g}" for power in BEYOND_POWERS)], rows,
    )  # fmt: skip


def known_descent(c: Curve) -> Array | None:
    """s(k) of the cosine deviation, from the signals of a pair or from what the plugin said."""
    if "rows" in c.signals or "means" in c.signals:
        return shapes(c)["cosine"]
    said = [run["scores"]["forward"] for run in c.runs if run["kind"] == "choice"]
    return still_to_do(np.array(said[0]["descent"])) if said else None


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
    show_half(curves)
    show_beyond(curves, toys)
    show_full(curves)
    show_blocks(curves)
    show_equal_time(curves)


if __name__ == "__main__":
    main()
