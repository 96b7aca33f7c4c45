"""Figures of merit, from the evidence: what a choice of weights promises and keeps. Pure functions.

The exponent of retention(k) = (sum of w_i over i >= k) ** exponent is always fitted on other models or other tasks than
the one that it is judged on.
"""

import math
from collections.abc import Callable

import numpy as np
from evidence import Array, Pair, scalars, tails, weights
from scipy.optimize import minimize, minimize_scalar
from scipy.stats import spearmanr

Exponent = Callable[[Pair], float]
Fit = Callable[[list[Pair]], Exponent]


def predicted(pair: Pair, weight_L: Array, exponent: float) -> Array:
    """Predicted retention of training layers k..L-1, for every k."""
    return np.asarray(tails(weight_L) ** exponent)


def errors(pairs: list[Pair], weight: str, exponent: Exponent) -> Array:
    """Predicted minus measured retention at every measured cut but cut 0, pooled over pairs."""
    found = [predicted(p, weights(p, weight), exponent(p))[p.cuts] - p.measured for p in pairs]
    return np.concatenate([e[1:] for e in found])


def fit_constant(pairs: list[Pair], weight: str) -> Exponent:
    """One exponent for every model and task, least mean absolute error."""
    curves = [(tails(weights(p, weight))[p.cuts[1:]], p.measured[1:]) for p in pairs]

    def loss(exponent: float) -> float:
        return float(np.mean(np.concatenate([np.abs(tail**exponent - measured) for tail, measured in curves])))

    best = float(minimize_scalar(loss, bounds=(0.005, 1.5), method="bounded").x)
    return lambda _: best


def fit_scalar(pairs: list[Pair], weight: str, scalar: str) -> Exponent:
    """Exponent exp(a + b z), z the scalar standardised over the training pairs; a slight pull of b towards zero."""
    values = np.array([scalars(p)[scalar] for p in pairs])
    centre, spread = float(values.mean()), float(values.std()) or 1.0
    z_P = (values - centre) / spread
    curves = [(tails(weights(p, weight))[p.cuts[1:]], p.measured[1:]) for p in pairs]

    def at(theta: Array, z: float) -> float:
        return float(np.exp(np.clip(theta[0] + theta[1] * z, -5.0, 0.5)))

    def loss(theta: Array) -> float:
        misses = [np.abs(tail ** at(theta, z) - seen) for (tail, seen), z in zip(curves, z_P, strict=True)]
        return float(np.concatenate(misses).mean() + 0.002 * theta[1] ** 2)

    start = np.array([np.log(fit_constant(pairs, weight)(pairs[0])), 0.0])
    simplex = start + np.array([[0, 0], [0.3, 0], [0, 0.3]])
    best = minimize(loss, start, method="Nelder-Mead", options={"initial_simplex": simplex}).x
    return lambda p: at(best, (scalars(p)[scalar] - centre) / spread)


def leave_out(pairs: list[Pair], by: str, fit: Fit) -> list[tuple[Pair, float]]:
    """Every pair with the exponent that was fitted without its model (`by="model"`) or without its task."""
    found = []
    for group in sorted({getattr(p, by) for p in pairs}):
        rest = [p for p in pairs if getattr(p, by) != group]
        if rest:
            exponent = fit(rest)
            found += [(p, exponent(p)) for p in pairs if getattr(p, by) == group]
    return found


def chosen_cut(retention_L: Array, coverage: float) -> int:
    """The smallest suffix that is predicted to keep `coverage`."""
    return int(np.flatnonzero(retention_L >= coverage - 1e-12)[-1])


def measured_at(pair: Pair, cut: float, seeds: list[int] | None = None) -> float:
    """Measured retention at any cut, linear in the cut between the points of the grid."""
    curve = pair.measured if seeds is None else [pair.retention(k, seeds) for k in pair.cuts]
    return float(np.interp(cut, pair.cuts, curve))


def regret(pair: Pair, cut: float) -> float:
    """(loss at the cut - best loss of any cut) / (base - best loss)."""
    best = max(pair.measured)
    return float((best - measured_at(pair, cut)) / best)


def step_cost(pair: Pair, cut: float) -> float:
    """FLOPs of a LoRA step without checkpointing, as a ratio to all layers: 1 - f/2, share f of the layers frozen."""
    return 1 - cut / pair.layers / 2


def calibration(pairs: list[Pair], weight: str, fit: Fit, coverage: float = 0.95) -> dict[str, float]:
    """Held-out errors of one choice of weights and exponent, and what its cut at `coverage` really keeps."""
    error, kept, cost, missed, worst = [], [], [], [], 0.0
    for by in ("task", "model"):
        for pair, exponent in leave_out(pairs, by, fit):
            curve = predicted(pair, weights(pair, weight), exponent)
            mine = (curve[pair.cuts] - pair.measured)[1:]
            error.append(float(np.abs(mine).mean()))
            worst = max(worst, float(np.abs(mine).max()))
            cut = chosen_cut(curve, coverage)
            kept.append(measured_at(pair, cut))
            missed.append(regret(pair, cut))
            cost.append(step_cost(pair, cut))
    return {
        "mae": float(np.mean(error)),
        "worst": worst,
        "least_kept": min(kept),
        "mean_kept": float(np.mean(kept)),
        "cost": float(np.mean(cost)),
        "regret": float(np.median(missed)),
        "worst_regret": max(missed),
    }


def at_equal_cost(pairs: list[Pair], weight: str, cost: float, exponent: float = 0.2) -> tuple[float, float]:
    """Mean and least retention when the threshold is set so that the mean step cost over pairs is `cost`.

    With suffixes alone, cost and cut are the same thing for one pair; signals differ in where they spend it. Between
    two thresholds the result is interpolated, so that signals whose cuts move in jumps are not flattered.
    """
    points = []
    for threshold in np.linspace(0.3, 0.9999, 400):
        cuts = [chosen_cut(predicted(p, weights(p, weight), exponent), threshold) for p in pairs]
        kept = [measured_at(p, cut) for p, cut in zip(pairs, cuts, strict=True)]
        points.append(
            (float(np.mean([step_cost(p, c) for p, c in zip(pairs, cuts, strict=True)])), np.mean(kept), min(kept))
        )
    table = np.array(sorted(set(points)))
    return float(np.interp(cost, table[:, 0], table[:, 1])), float(np.interp(cost, table[:, 0], table[:, 2]))


def best_cuts(pairs: list[Pair], cost: float, seeds: list[int] | None = None) -> list[int]:
    """The cuts that keep most on average at a mean step cost of at most `cost`: nobody can know them before training.

    Args:
        seeds: the seeds whose measured curves are known; all of them where not given.
    """
    units = 2 * math.lcm(*(p.layers for p in pairs))  # the cost of every cut is a whole number of these parts
    spare = math.floor(len(pairs) * (cost * units) + 1e-6)
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for pair in pairs:
        options = [(units - cut * units // pair.layers // 2, cut) for cut in range(pair.layers)]
        extended: dict[int, tuple[float, list[int]]] = {}
        for spent, (kept, cuts) in best.items():
            for price, cut in options:
                total, value = spent + price, kept + measured_at(pair, cut, seeds)
                if total <= spare and value > extended.get(total, (-math.inf, []))[0]:
                    extended[total] = (value, [*cuts, cut])
        best = extended
    return max(best.values())[1]


def across_seeds(pairs: list[Pair], cost: float) -> tuple[float, float]:
    """What `best_cuts` of one seed keep in the other seeds, and what a fixed cut at the same cost keeps there.

    The most that any signal can gain by moving depth between models and tasks: it knows everything but the noise.
    """
    known, fixed = [], []
    for seed in pairs[0].seeds:
        cuts = best_cuts(pairs, cost, [seed])
        for pair, cut in zip(pairs, cuts, strict=True):
            others = [other for other in pair.seeds if other != seed]
            known.append(measured_at(pair, cut, others))
            fixed.append(measured_at(pair, 2 * (1 - cost) * pair.layers, others))
    return float(np.mean(known)), float(np.mean(fixed))


def bootstrap(values: list[float], *, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean over pairs, pairs drawn with replacement."""
    draw = np.random.default_rng(seed).integers(0, len(values), (draws, len(values)))
    low, high = np.percentile(np.array(values)[draw].mean(1), [2.5, 97.5])
    return float(low), float(high)


def single_layer_correlation(pair: Pair, weight: str) -> float:
    """Spearman correlation of the weights with the measured gains of fine-tuning one layer alone."""
    layers = sorted(pair.single)
    gains = [pair.base - pair.single[layer] for layer in layers]
    return float(spearmanr(weights(pair, weight)[layers], gains)[0])


def stability(
    pair: Pair, weight: str, exponent: float, rows: int, *, draws: int = 200, seed: int = 0
) -> tuple[float, float]:
    """Share of samples of `rows` rows that choose the cut of all rows, and the spread of the chosen cut."""
    available = len(pair.signals["rows"]["tokens"])  # type: ignore[index]
    whole = chosen_cut(predicted(pair, weights(pair, weight, np.ones(available)), exponent), 0.95)
    generator = np.random.default_rng(seed)
    cuts = []
    for _ in range(draws):
        counts = np.bincount(generator.integers(0, available, rows), minlength=available).astype(float)
        cuts.append(chosen_cut(predicted(pair, weights(pair, weight, counts), exponent), 0.95))
    return float(np.mean(np.array(cuts) == whole)), float(np.std(cuts))
