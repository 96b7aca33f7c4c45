"""Predicted against measured: calibration, regret, rivals, stability. Prints the tables of README.md and draws the figures.

    python analyse.py --results results                     # the evidence that is kept with the benchmark
    python analyse.py --runs work/runs.jsonl --signals work/signals --save results      # one's own

The exponent of retention(k) = (sum of w_i over i >= k) ** exponent is always fitted on other models or other tasks than the ones
it is judged on (leave one model out and leave one task out; the held-out errors of both are pooled).
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from evidence import Array, Pair, load, scalars, tails, weights
from scipy.optimize import minimize, minimize_scalar
from scipy.stats import spearmanr

Exponent = Callable[[Pair], float]
COVERAGE = 0.95
WEIGHTS = (
    "uniform", "remaining", "entering", "remaining@logit_lens", "remaining@semantic_loss", "remaining@cosine_without_norm",
    "drop", "drop_first_raw", "drop_first_next", "drop_first_zero", "drop@logit_lens", "drop@semantic_loss",
    "drop@cosine_without_norm", "transition", "transition_first_raw", "transition_first_next",
    "transition@cosine_without_norm", "change", "length", "block_influence", "cka", "gradient", "relative_gradient", "spectrum",
)  # fmt: skip
RIVALS = ("block_influence", "cka", "gradient", "relative_gradient", "spectrum")


def predicted(pair: Pair, weight_L: Array, exponent: float) -> Array:
    """Predicted retention of training layers k..L-1, for every k."""
    return np.asarray(tails(weight_L) ** exponent)


def errors(pairs: list[Pair], weight: str, exponent: Exponent) -> Array:
    """Predicted minus measured retention at every measured cut but cut 0, pooled over pairs."""
    found = [predicted(p, weights(p, weight), exponent(p))[p.cuts] - p.measured for p in pairs]
    return np.concatenate([e[1:] for e in found])


def fit_constant(pairs: list[Pair], weight: str) -> Exponent:
    """One exponent for every model and task, least mean absolute error."""
    best = minimize_scalar(lambda b: np.abs(errors(pairs, weight, lambda _: b)).mean(), bounds=(0.005, 1.5), method="bounded").x
    return lambda _: float(best)


def fit_linear(pairs: list[Pair], weight: str, scalar: str) -> Exponent:
    """exponent = exp(a + b z), z the scalar standardised over the training pairs; a slight pull of b towards zero."""
    values = np.array([scalars(p)[scalar] for p in pairs])
    centre, spread = values.mean(), values.std() or 1.0

    def at(theta: Array) -> Exponent:
        return lambda p: float(np.exp(np.clip(theta[0] + theta[1] * (scalars(p)[scalar] - centre) / spread, -5, 0.5)))

    start = np.array([np.log(fit_constant(pairs, weight)(pairs[0])), 0.0])
    loss = lambda t: np.abs(errors(pairs, weight, at(t))).mean() + 0.002 * t[1] ** 2  # noqa: E731
    return at(minimize(loss, start, method="Nelder-Mead", options={"initial_simplex": start + np.array([[0, 0], [0.3, 0], [0, 0.3]])}).x)


def leave_out(pairs: list[Pair], by: str, fit: Callable[[list[Pair]], Exponent]) -> list[tuple[Pair, float]]:
    """Every pair with the exponent that was fitted without its model or without its task."""
    found = []
    for group in sorted({getattr(p, by) for p in pairs}):
        rest = [p for p in pairs if getattr(p, by) != group]
        if not rest:
            continue
        exponent = fit(rest)
        found += [(p, exponent(p)) for p in pairs if getattr(p, by) == group]
    return found


def chosen_cut(retention_L: Array, coverage: float) -> int:
    """The smallest suffix that is predicted to keep `coverage`."""
    return int(np.flatnonzero(retention_L >= coverage - 1e-12)[-1])


def measured_at(pair: Pair, cut: int) -> float:
    """Measured retention at any cut, linear in the cut between the points of the grid."""
    return float(np.interp(cut, pair.cuts, pair.measured))


def calibration(pairs: list[Pair], weight: str, fit: Callable[[list[Pair]], Exponent]) -> dict[str, float]:
    """Held-out errors of one choice of weights and exponent, and what its cut at coverage 0.95 really keeps."""
    error, kept, depth, worst = [], [], [], 0.0
    for by in ("task", "model"):
        for pair, exponent in leave_out(pairs, by, fit):
            curve = predicted(pair, weights(pair, weight), exponent)
            mine = (curve[pair.cuts] - pair.measured)[1:]
            error.append(np.abs(mine).mean())
            worst = max(worst, float(np.abs(mine).max()))
            cut = chosen_cut(curve, COVERAGE)
            kept.append(measured_at(pair, cut))
            depth.append(1 - cut / pair.layers)
    return {"mae": float(np.mean(error)), "worst": worst, "least_kept": min(kept), "mean_kept": float(np.mean(kept)), "depth": float(np.mean(depth))}


def show_calibration(pairs: list[Pair], names: tuple[str, ...]) -> None:
    print("\n| weights | exponent (all) | MAE, exponent left out | worst | least kept at 0.95 | mean kept | layers trained |\n|---|---|---|---|---|---|---|")
    for weight in names:
        c = calibration(pairs, weight, lambda rest, w=weight: fit_constant(rest, w))
        b = fit_constant(pairs, weight)(pairs[0])
        print(f"| {weight} | {b:.3f} | {c['mae']:.4f} | {c['worst']:.3f} | {c['least_kept']:.3f} | {c['mean_kept']:.3f} | {c['depth']:.2f} |", flush=True)


def show_exponents(pairs: list[Pair], weight: str) -> None:
    print(f"\nexponent from a scalar, weights `{weight}`\n\n| scalar | rank correlation with the pair's own exponent | MAE, left out | worst | least kept | layers trained |\n|---|---|---|---|---|---|")
    own = [fit_constant([p], weight)(p) for p in pairs]
    for scalar in scalars(pairs[0]):
        rho = spearmanr([scalars(p)[scalar] for p in pairs], own)[0]
        c = calibration(pairs, weight, lambda rest, s=scalar: fit_linear(rest, weight, s))
        print(f"| {scalar} | {rho:+.2f} | {c['mae']:.4f} | {c['worst']:.3f} | {c['least_kept']:.3f} | {c['depth']:.2f} |", flush=True)
    oracle = np.mean([np.abs(errors([p], weight, lambda _, b=b: b)).mean() for p, b in zip(pairs, own, strict=True)])
    print(f"own exponent of every pair (a bound, not a prediction): MAE {oracle:.4f}; exponents " + ", ".join(f"{p.model}/{p.task} {b:.3f}" for p, b in zip(pairs, own, strict=True)))


def show_measured(pairs: list[Pair]) -> None:
    print("\n| model | task | base | all layers | seeds | measured retention at cut |\n|---|---|---|---|---|---|")
    for p in pairs:
        curve = ", ".join(f"{k}: {r:.3f}" for k, r in zip(p.cuts, p.measured, strict=True))
        print(f"| {p.model} | {p.task} | {p.base:.3f} | {p.loss(0):.3f} | {len(p.seeds)} | {curve} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--signals", type=Path, required=True)
    args = parser.parse_args()
    pairs = load(args.runs, args.signals)
    show_measured(pairs)
    show_calibration(pairs, WEIGHTS)
    for weight in ("uniform", "remaining"):
        show_exponents(pairs, weight)


if __name__ == "__main__":
    main()
