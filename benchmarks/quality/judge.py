"""Laws judged on tasks that they have not seen: powers, spreads and curves from the other tasks."""

from collections.abc import Callable, Mapping

import numpy as np
from curves import Array, Curve
from laws import FLOOR, leave_out, miss, mixed, shapes, switched_off, through_pilots

Law = Callable[[Curve, float], Array | None]  # the curve of one task for a power or exponent, None without its runs


def pilot_law(steps: int, shape: str, anchors: tuple[int, ...]) -> Law:
    """Shape `equal`, `cosine`, `off` or `mixed`, through pilots at the anchors; without any, shape ** power."""

    def law(c: Curve, power: float) -> Array | None:
        descent = shapes(c)["cosine"]
        if shape in ("off", "mixed"):
            if steps not in c.switched_off:
                return None
            off = switched_off(c.switched_off[steps], c.layers)
            shape_L = off if shape == "off" else mixed(off, descent)
        else:
            shape_L = shapes(c)[shape]
        if not anchors:
            return np.asarray(np.maximum(shape_L, FLOOR) ** power)
        kept = {k: r for k, r in c.retention(steps=steps).items() if k in anchors}
        return through_pilots(shape_L, kept, power, beyond=descent) if set(kept) == set(anchors) else None

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
    for steps in sorted({r["steps"] for c in curves for r in c.runs if 0 < r["steps"] < c.steps}, reverse=True):
        found[f"{steps}: off"] = pilot_law(steps, "off", ())
        for anchors in ((15,), (25,), (15, 25)):
            for shape in ("equal", "cosine", "off", "mixed"):
                name = f"{steps}: {shape}, pilot at {' and '.join(map(str, anchors))}"
                found[name] = pilot_law(steps, shape, anchors)
    return found


def by_retention(kept: Mapping[int, float]) -> tuple[list[float], list[float]]:
    """(-retention, cut) for an interpolation of the cut that keeps a share."""
    cuts = sorted(kept)
    return [-r for r in np.minimum.accumulate([kept[k] for k in cuts])], [float(k) for k in cuts]


def measured_at(kept: Mapping[int, float], cut: float) -> float:
    """Measured retention at any cut, linear between the cuts that were run."""
    return float(np.interp(cut, sorted(kept), [kept[k] for k in sorted(kept)]))
