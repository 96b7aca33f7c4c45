"""What the plugin said before a run, with the pilots that it ran, against what was measured."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from curves import Array, Curve, Run
from judge import COVERAGES, KEPT_BY, costs_a_half, kept_by, measured_at, task_errors
from laws import FLOOR, chosen_cut, shapes
from pydantic import TypeAdapter
from run_tables import table

from axolotl_layersel.method.gain import still_to_do
from axolotl_layersel.method.pilot_size import pilot_cut
from axolotl_layersel.method.retention import RetentionLaw, forward_law, pilot_law, unlike_the_known
from axolotl_layersel.plan_parts import Pilot

FAMILIES = {"gemma-3-270m": "gemma3_text", "qwen2.5-coder-0.5b": "qwen2"}  # of models that the law does not know
BEYOND_POWERS = (0.3, 0.5, 0.7, 0.85, 1.0)


def pilot_of(scores: dict[str, Any]) -> Pilot:
    """What a pilot measured, as a run keeps it."""
    return TypeAdapter(Pilot).validate_json(json.dumps(scores["pilot"]))


def laws_now(c: Curve, scores: dict[str, Any]) -> RetentionLaw:
    """The law that ships, through what a pilot measured when it ran, or from the loss alone."""
    pilot = None if scores["pilot"] is None else pilot_of(scores)
    law = pilot_law(pilot) if pilot else forward_law(scores["loss"])
    family = FAMILIES.get(c.model, "llama")
    return law.widened(unlike_the_known(num_layers=c.layers, loss=scores["loss"], family=family, pilot=pilot))


def _choices(curves: list[Curve]) -> Iterator[tuple[Curve, Run]]:
    """What the plugin said before runs, where there are runs to compare it with."""
    for c in curves:
        if len(c.retention()) > 2:
            yield from ((c, run) for run in c.runs if run["kind"] == "choice")


def show_plugin(curves: list[Curve]) -> None:
    """What the plugin says before runs of some lengths, from the pilots that it ran, against what was measured."""
    rows: list[list[object]] = []
    for c, run in _choices(curves):
        kept, pilot = {k: r for k, r in c.retention().items() if k}, run["scores"]["pilot"]["pilot"]
        for name, scores in run["scores"].items():
            law, share_L = laws_now(c, scores), np.array(scores["descent"])
            curve_L, low_L, high_L = law.curve(share_L), law.low(share_L), law.high(share_L)
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


def show_coverage(curves: list[Curve], title: str = "Coverage kept by the plugin's choice") -> None:
    """What its choices keep, over tasks and models, also at the cost of a fixed half; a cut is a share of the depth."""
    by_length: dict[tuple[str, int], list[tuple[Curve, Array]]] = {}
    for c, run in _choices(curves):
        for name, scores in run["scores"].items():
            low_L = laws_now(c, scores).low(np.array(scores["descent"]))
            by_length.setdefault((name, run["steps"]), []).append((c, low_L))
    rows = [
        [name, steps, coverage, len(found), *kept_by(found, coverage)[1]]
        for (name, steps), found in sorted(by_length.items())
        for coverage in (*COVERAGES, costs_a_half(found))
    ]
    table(title, ["law", "steps of the run", "coverage", "choices", *KEPT_BY], rows)


def show_half(curves: list[Curve]) -> None:
    """What a pilot's training of a half of the layers adds to its training of a sixth."""
    rows: list[list[object]] = []
    for c, run in _choices(curves):
        scores = run["scores"]["pilot"]
        pilot, share_L = pilot_of(scores), np.array(scores["descent"])
        if (half := pilot.half) is None:
            continue
        with_it = pilot_law(pilot).curve(share_L)
        without = pilot_law(replace(pilot, cuts=[pilot.cuts[0], pilot.cuts[-1]])).curve(share_L)
        mean = [float(np.abs(task_errors(c, curve_L)).mean()) for curve_L in (without, with_it)]
        place = half.first_trainable
        rows.append([
            c.task, run["steps"], pilot.steps, f"{half.retention:.3f} +- {half.retention_stderr:.3f}",
            measured_at(c.retention(), place), float(without[place]), float(with_it[place]), *mean,
        ])  # fmt: skip
    table(
        "A pilot's training of a half of the layers",
        ["task", "steps of the run", "of the pilot", "kept by the half then", "in the whole run", "curve without it",
         "with it", "mean error without it", "with it"], rows,
    )  # fmt: skip
    for steps in sorted({row[1] for row in rows}):  # type: ignore[type-var]
        without, with_it = (np.mean([row[-place] for row in rows if row[1] == steps]) for place in (2, 1))  # type: ignore[misc]
        print(f"\nRuns of {steps} steps: mean error {without:.3f} without it, {with_it:.3f} with it")


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
