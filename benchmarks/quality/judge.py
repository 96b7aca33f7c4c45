"""Laws judged on tasks that they have not seen: powers, spreads and curves from the other tasks."""

from collections.abc import Callable, Mapping

import numpy as np
from curves import Array, Curve
from laws import FLOOR, chosen_cut, leave_out, miss, shapes, switched_off, through_pilots
from scipy.stats import spearmanr

from axolotl_layersel.method.gain import descent as descent_shares
from axolotl_layersel.method.pilot_size import pilot_cut, switched_off_cuts
from axolotl_layersel.method.retention import through_pilot

COVERAGES = (0.90, 0.95, 0.98)
KEPT_BY = (
    "kept, mean", "least", "step cost", "fixed cut at that cost keeps (mean, least)",
    "rank correlation with the measured cut",
)  # fmt: skip

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


def _chosen(found: list[tuple[Curve, Array]], coverage: float) -> tuple[list[int], list[float]]:
    """The cuts that retentions choose, and the shares of the depth that these are."""
    cuts = [chosen_cut(retention_L, coverage) for _, retention_L in found]
    return cuts, [cut / c.layers for (c, _), cut in zip(found, cuts, strict=True)]


def kept_by(found: list[tuple[Curve, Array]], coverage: float) -> tuple[list[int], list[object]]:
    """The cuts that retentions choose, and cells: what they keep, and what a fixed cut at the same cost keeps.

    Args:
        found: a measured curve and the (L,) retention that can be relied on for it, lower end of a band or not.
    """
    cuts, shares = _chosen(found, coverage)
    kept = [measured_at(c.retention(), cut) for (c, _), cut in zip(found, cuts, strict=True)]
    own = [float(np.interp(-coverage, *by_retention(c.retention()))) / c.layers for c, _ in found]
    fixed = float(np.mean(shares))
    same = [measured_at(c.retention(), fixed * c.layers) for c, _ in found]
    rho = spearmanr(shares, own)[0] if len(set(shares)) > 1 else float("nan")
    fixed_cells = f"{np.mean(same):.3f}, {min(same):.3f}"
    return cuts, [float(np.mean(kept)), min(kept), 1 - fixed / 2, fixed_cells, f"{rho:.2f}"]


def costs_a_half(found: list[tuple[Curve, Array]]) -> float:
    """The coverage whose cuts cost as much in the mean as a half of the layers, as nearly as there is one."""
    levels = np.unique(np.concatenate([retention_L for _, retention_L in found]))
    shares = [np.mean(_chosen(found, level)[1]) for level in levels]
    return float(levels[int(np.argmin(np.abs(np.array(shares) - 0.5)))])
