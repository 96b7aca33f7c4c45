"""From gains to a suffix of decoder layers, and how stable that choice is under resampling of the rows.

A cut k means: layers 0..k-1 are frozen, k..L-1 are trained. Ties go to the input side (more is trained).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
RESAMPLES = 1_000


def most_layers(budget: int | float, *, num_layers: int, min_layers: int) -> int:
    """The largest number of layers that a budget allows.

    Args:
        budget: an int counts layers, a float in (0, 1] is a fraction of them (rounded down).

    Raises:
        ValueError: the budget allows fewer than `min_layers`, or `min_layers` more than there are.
    """
    if min_layers > num_layers:
        raise ValueError(
            f"min_layers is {min_layers}; the model has {num_layers} decoder layers: lower it to {num_layers} or less"
        )
    # 1e-9 keeps a fraction such as 0.7 of 10 layers from being rounded down to 6.
    allowed = min(budget, num_layers) if isinstance(budget, int) else math.floor(budget * num_layers + 1e-9)
    if allowed < min_layers:
        raise ValueError(
            f"budget is {budget}, which is {allowed} of {num_layers} decoder layers, and min_layers is {min_layers}: "
            f"allowed is a budget of at least {min_layers} layers; raise budget or lower min_layers"
        )
    return int(allowed)


def select_cut(
    *, policy: str, retention_L: Array, gain_L: Array | None, coverage: float, budget: int | float, min_layers: int
) -> int:
    """The first trainable layer.

    Args:
        policy: `coverage`, the smallest suffix whose retention is at least `coverage`; `peak_gain`, freeze through the
            layer of maximum gain (SALF's end of freezing); `budget`, the largest suffix allowed.
        retention_L: retention of training layers k..L-1 that can be relied on: the lower end of its band.
        gain_L: what SALF calls the gain of a layer; `peak_gain` alone needs it.
        budget, min_layers: bounds of the suffix in every policy.

    Raises:
        ValueError: unknown policy, values that are not finite, or bounds that leave no suffix.
    """
    if not np.isfinite(retention_L).all() or (gain_L is not None and not np.isfinite(gain_L).all()):
        raise ValueError("a gain is not finite; a run stops here because no layer can be selected from it")
    num_layers = len(retention_L)
    largest = most_layers(budget, num_layers=num_layers, min_layers=min_layers)
    first, last = num_layers - largest, num_layers - min_layers  # the cuts that the bounds allow
    if policy == "coverage":
        wanted = int(np.flatnonzero(retention_L >= coverage)[-1])
    elif policy == "peak_gain" and gain_L is not None:
        wanted = int(np.argmax(gain_L)) + 1
    elif policy == "budget":
        wanted = first
    else:
        raise ValueError(f"policy is {policy!r}; allowed are coverage, peak_gain, budget")
    return max(min(wanted, last), first)


def bootstrap_counts(num_rows: int, *, seed: int, resamples: int = RESAMPLES) -> Array:
    """How often each row occurs in each resample, (B, R), drawn with replacement; equal seeds, equal draws."""
    counts_BR = np.random.default_rng(seed).multinomial(num_rows, np.full(num_rows, 1.0 / num_rows), size=resamples)
    return counts_BR.astype(np.float64)


def tally(cuts: Sequence[int]) -> dict[int, int]:
    """How often each cut occurs, by cut."""
    return dict(sorted(Counter(cuts).items()))
