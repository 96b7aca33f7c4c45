"""From what is known before training to a retention curve. Pure functions over numpy arrays; L layers, states 0..L.

A law has a shape s(k), 1 at k = 0 and falling towards 0 at k = L, and one exponent: retention(k) = s(k) ** gamma.
"""

from collections.abc import Callable, Mapping
from functools import cache

import numpy as np
from curves import Array, Curve
from scipy.optimize import minimize_scalar

FLOOR = 1e-3


def equal(layers: int) -> Array:
    """The share of layers that are trained: the shape that sees no data."""
    return 1 - np.arange(layers) / layers


def tails(weight_L: Array) -> Array:
    """Share of the weights of layers k..L-1, for every k, (L,)."""
    return np.asarray(np.cumsum(weight_L[::-1])[::-1] / weight_L.sum())


def descent(deviation_S: Array) -> Array:
    """The share of the fall of the deviation that layers k..L-1 have still to do, (L,).

    State k counts as no better than any later state; state 0, the embedding, is left out.
    """
    highest_S = np.maximum.accumulate(deviation_S[::-1])[::-1]
    share_S = (highest_S - deviation_S[-1]) / max(highest_S[1] - deviation_S[-1], 1e-12)
    return np.asarray(np.clip(share_S[:-1], 0, 1))


@cache
def shapes(curve: Curve) -> dict[str, Array]:
    """The shapes that one forward pass gives, means of them, and two rivals (`gradient norm` needs a backward pass)."""
    even = equal(curve.layers)
    cosine, lens = descent(curve.state_mean("cosine")), descent(curve.state_mean("logit_lens"))
    gradient = np.array(curve.signals["layers"]["gradient"])
    turned = curve.state_mean("turned" if "turned" in curve.signals["rows"] else "block_influence")
    return {
        "equal": even,
        "cosine": cosine,
        "lens": lens,
        "cosine x lens": np.sqrt(cosine * lens),
        "equal x cosine": np.sqrt(even * cosine),
        "equal x lens": np.sqrt(even * lens),
        "equal + cosine": (even + cosine) / 2,
        "equal + lens": (even + lens) / 2,
        "equal + cosine + lens": (even + cosine + lens) / 3,
        "gradient norm": tails(gradient),
        "block influence": tails(turned),
    }


def exponent(shape_L: Array, kept: Mapping[int, float]) -> float:
    """The gamma with the least mean absolute error at the given cuts (cut 0 tells nothing)."""
    return pooled_exponent([(shape_L, kept)])


def pooled_exponent(pairs: list[tuple[Array, Mapping[int, float]]]) -> float:
    """One gamma for several curves."""

    def loss(log_gamma: float) -> float:
        return float(np.mean([abs(errors(s, np.exp(log_gamma), kept)).mean() for s, kept in pairs]))

    return float(np.exp(minimize_scalar(loss, bounds=(np.log(1e-3), np.log(3.0)), method="bounded").x))


def errors(shape_L: Array, gamma: float, kept: Mapping[int, float]) -> Array:
    """Predicted minus measured retention at every measured cut but cut 0."""
    cuts = [cut for cut in sorted(kept) if cut]
    return np.maximum(shape_L[cuts], FLOOR) ** gamma - np.array([kept[cut] for cut in cuts])


def switched_off(left: Mapping[int, float], layers: int) -> Array:
    """What is left of an all-layer pilot's gain with the adapters below k switched off, for every k, (L,).

    Args:
        left: cut -> share that is left, measured at some cuts; linear in between, the last value held.
    """
    cuts = sorted(left)
    return _inside(np.interp(np.arange(layers), [0, *cuts], [1.0, *(left[cut] for cut in cuts)]))


def through_pilots(shape_L: Array, kept: Mapping[int, float], power: float = 1.0, *, beyond: Array) -> Array:
    """Retention of every cut from pilots at a few: ln retention is piecewise linear in ln shape, from (0, 0) on.

    Args:
        shape_L: shape up to the last pilot.
        kept: cut -> retention that the pilot measured; cut 0 is ignored.
        power: what a pilot's retention is raised to, because short pilots keep less than the whole run will.
        beyond: (L,) shape on the output side of the last pilot.
    """
    cuts = sorted(cut for cut in kept if cut)
    log_s, log_b = np.log(_inside(shape_L)), np.log(_inside(beyond))
    x = [0.0, *(float(-log_s[cut]) for cut in cuts)]
    y = [0.0, *(power * float(np.log(_inside(np.array(kept[cut])))) for cut in cuts)]
    curve = np.interp(-log_s, x, y)
    curve[cuts[-1] :] = y[-1] * log_b[cuts[-1] :] / log_b[cuts[-1]]
    curve[0] = 0.0
    return np.asarray(np.minimum.accumulate(np.exp(curve)))


def miss(predicted: Array, measured: Array) -> Array:
    """Difference in ln(-ln retention): the scale on which errors are as large at .95 as at .5."""
    return np.asarray(np.log(-np.log(_inside(predicted))) - np.log(-np.log(_inside(measured))))


def lower_end(predicted: Array, spread: float, z: float) -> Array:
    """Lower end of the band of `spread` (standard deviation of `miss`) and `z` standard deviations."""
    return np.asarray(predicted ** np.exp(z * spread))


def chosen_cut(retention_L: Array, coverage: float) -> int:
    """The smallest suffix that is predicted to keep `coverage`."""
    return int(np.flatnonzero(retention_L >= coverage)[-1])


def _inside(share: Array) -> Array:
    return np.asarray(np.clip(share, FLOOR, 1 - FLOOR))


def leave_out(curves: list[Curve], by: Callable[[Curve], str]) -> list[tuple[Curve, list[Curve]]]:
    """Each curve with all that share nothing with it by the given key."""
    return [(curve, [other for other in curves if by(other) != by(curve)]) for curve in curves]
