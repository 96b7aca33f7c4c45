"""Laws judged on tasks that they have not seen: powers, spreads and curves from the other tasks."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from curves import Array, Curve
from laws import FLOOR, leave_out, miss, shapes, switched_off, through_pilots
from pydantic import TypeAdapter
from run_tables import table

from axolotl_layersel.method.gain import descent as descent_shares
from axolotl_layersel.method.pilot_size import pilot_cut, switched_off_cuts
from axolotl_layersel.method.retention import pilot_law as shipped_law
from axolotl_layersel.method.retention import through_pilot
from axolotl_layersel.plan_parts import Pilot

Law = Callable[[Curve, float], Array | None]  # the curve of one task for a power or exponent, None without its runs


def pilot_law(steps: int, shape: str, anchors: tuple[int, ...]) -> Law:
    """Shape `equal`, `cosine` or `off`, through pilots at the anchors; without any, shape ** power."""

    def law(c: Curve, power: float) -> Array | None:
        descent = shapes(c)["cosine"]
        if shape == "off":
            if steps not in c.switched_off:
                return None
            shape_L = switched_off(c.switched_off[steps], c.layers)
        else:
            shape_L = shapes(c)[shape]
        if not anchors:
            return np.asarray(np.maximum(shape_L, FLOOR) ** power)
        kept = {k: r for k, r in c.retention(steps=steps).items() if k in anchors}
        return through_pilots(shape_L, kept, power, beyond=descent) if set(kept) == set(anchors) else None

    return law


def plugin_law(steps: int) -> Law:
    """The plugin's own law, from the runs of a grid that are as short as its pilot."""

    def law(c: Curve, power: float) -> Array | None:
        cut, kept = pilot_cut(c.layers), c.retention(steps=steps)
        if steps not in c.switched_off or cut not in kept:
            return None
        off = {k: c.switched_off[steps][k] for k in switched_off_cuts(c.layers)}
        share_L = descent_shares(c.state_mean("cosine"))
        return through_pilot(share_L, off, cut=cut, kept=float(np.clip(kept[cut], FLOOR, 1 - FLOOR)) ** power)

    return law


def task_errors(c: Curve, curve_L: Array) -> Array:
    kept = c.retention()
    return np.array([curve_L[k] - kept[k] for k in sorted(kept) if k])


def fitted(curves: list[Curve], law: Law) -> tuple[float, float] | None:
    """The power with the least mean error over the curves, and the spread of ln(-ln retention) around it."""
    grid = np.geomspace(0.02, 2.0, 120)
    have = [c for c in curves if law(c, 1.0) is not None]
    if not have:
        return None
    power = float(min(grid, key=lambda p: np.mean([np.abs(task_errors(c, _of(law, c, p))).mean() for c in have])))
    misses = []
    for c in have:
        cuts, curve_L = [k for k in sorted(c.retention()) if k], _of(law, c, power)
        misses.append(miss(curve_L[cuts], np.array([c.retention()[k] for k in cuts])))
    return power, float(np.sqrt(np.mean(np.concatenate(misses) ** 2)))


def _of(law: Law, c: Curve, power: float) -> Array:
    found = law(c, power)
    assert found is not None
    return found


def left_out(curves: list[Curve], law: Law) -> list[tuple[Curve, Array, float]]:
    """Each task's curve, with the power and the spread of the other tasks."""
    found = []
    for c, rest in leave_out(curves, lambda c: c.task):
        of_others = fitted(rest, law)
        curve = law(c, of_others[0]) if of_others else None
        if of_others and curve is not None:
            found.append((c, curve, of_others[1]))
    return found


def laws_of(curves: list[Curve]) -> dict[str, Law]:
    found = {"equal weights, one exponent": pilot_law(0, "equal", ()), "cosine": pilot_law(0, "cosine", ())}
    for steps in sorted({steps for c in curves for steps in c.switched_off if steps < c.steps}, reverse=True):
        found[f"{steps}: off"] = pilot_law(steps, "off", ())
        for anchors in ((15,), (25,), (15, 25)):
            name = f"{steps}: cosine, pilot at {' and '.join(map(str, anchors))}"
            found[name] = pilot_law(steps, "cosine", anchors)
        found[f"{steps}: plugin"] = plugin_law(steps)
    return found


def by_retention(kept: Mapping[int, float]) -> tuple[list[float], list[float]]:
    """(-retention, cut) for an interpolation of the cut that keeps a share."""
    cuts = sorted(kept)
    return [-r for r in np.minimum.accumulate([kept[k] for k in cuts])], [float(k) for k in cuts]


def measured_at(kept: Mapping[int, float], cut: float) -> float:
    """Measured retention at any cut, linear between the cuts that were run."""
    return float(np.interp(cut, sorted(kept), [kept[k] for k in sorted(kept)]))


def pilot_of(scores: dict[str, Any]) -> Pilot:
    """What a pilot measured, as a run keeps it."""
    return TypeAdapter(Pilot).validate_json(json.dumps(scores["pilot"]))


def show_half(curves: list[Curve]) -> None:
    """What a pilot's training of a half of the layers adds to its training of a sixth."""
    rows: list[list[object]] = []
    for c in curves:
        for run in (run for run in c.runs if run["kind"] == "choice" and len(c.retention()) > 1):
            scores = run["scores"]["pilot"]
            pilot, share_L = pilot_of(scores), np.array(scores["descent"])
            if (half := pilot.half) is None:
                continue
            with_it = shipped_law(pilot).curve(share_L)
            without = shipped_law(replace(pilot, cuts=[pilot.cuts[0], pilot.cuts[-1]])).curve(share_L)
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
