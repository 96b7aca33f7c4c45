"""From the trainings of a pilot to the exponent of the retention, and how well it is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from axolotl_layersel.method import gain as gains
from axolotl_layersel.method.exponent import PILOT_FACTOR, SHORTER, Exponent, combined
from axolotl_layersel.method.pilot_size import Size
from axolotl_layersel.method.pilot_training import PilotError
from axolotl_layersel.plan_parts import Pilot, PilotCut

Array = NDArray[np.float64]

RESAMPLES = 300


@dataclass(frozen=True)
class Arm:
    """One training."""

    cut: int
    learning_rate: float
    losses_H: Array  # summed cross-entropy of each held-out row


@dataclass(frozen=True)
class Piloted:
    """What a pilot found."""

    exponent: Exponent  # of the run, not of the pilot
    result: Pilot


def curve_of(
    arms: Sequence[Arm],
    *,
    share_L: Array,
    scored: int,
    size: Size,
    rows: int,
    run_tokens: float,
    seed: int,
    seconds: float,
) -> Piloted:
    """The exponent that the trainings show, its band from held-out rows, lengths and contradictions.

    Args:
        arms: the state before training first, then each training.
        share_L: each layer's share of the descent.
        scored: held-out scored tokens.
        rows: trained on.

    Raises:
        PilotError: nothing was learnt beyond noise, or training diverged.
    """
    base, *trained = arms
    whole = next(arm for arm in trained if arm.cut == 0)
    gained_H = base.losses_H - whole.losses_H
    if not np.isfinite(gained_H).all():
        raise PilotError("training all layers diverged")
    counts_BH = np.random.default_rng(seed).multinomial(
        len(gained_H), np.full(len(gained_H), 1 / len(gained_H)), size=RESAMPLES
    )
    cuts = [arm for arm in trained if arm.cut and np.isfinite(arm.losses_H).all()]
    gained_B = counts_BH @ gained_H
    if gained_H.sum() <= 0 or not cuts or np.mean(gained_B <= 0) > 0.01:
        raise PilotError(
            f"{size.steps} steps did not improve the held-out loss beyond its noise ("
            f"{base.losses_H.sum() / scored:.3f} to {whole.losses_H.sum() / scored:.3f} nats)"
        )
    s_L = gains.still_to_do(share_L)
    places = [arm.cut for arm in cuts]
    kept = np.array([(base.losses_H - arm.losses_H).sum() / gained_H.sum() for arm in cuts])
    kept_B = np.stack([counts_BH @ (base.losses_H - arm.losses_H) / gained_B for arm in cuts], axis=1)
    exponent = fit_exponent(s_L[places], kept)
    resampled = [fit_exponent(s_L[places], row) for row in kept_B]
    noise = math.exp(1.645 * float(np.std(np.log(resampled))))
    # Where one point contradicts the curve through all, the band reaches it: its lower end makes the promise.
    alone = [fit_exponent(s_L[[place]], kept[[at]]) for at, place in enumerate(places)]
    apart = max(max(one / exponent, exponent / one) for one in alone)
    return Piloted(
        exponent=Exponent(exponent / SHORTER, max(combined(PILOT_FACTOR, noise), apart)),
        result=Pilot(
            steps=size.steps,
            rows_per_step=size.rows_per_step,
            rows=rows,
            heldout_rows=len(gained_H),
            base_loss=float(base.losses_H.sum() / scored),
            cuts=[
                PilotCut(
                    first_trainable=arm.cut,
                    learning_rate=arm.learning_rate,
                    loss=float(arm.losses_H.sum() / scored),
                    retention=1.0 if arm.cut == 0 else float(kept[places.index(arm.cut)]),
                    retention_stderr=0.0 if arm.cut == 0 else float(kept_B[:, places.index(arm.cut)].std()),
                )
                for arm in sorted((whole, *cuts), key=lambda arm: arm.cut)
            ],
            exponent=exponent,
            cost_share=size.cost / run_tokens,
            seconds=round(seconds, 3),
        ),
    )


def fit_exponent(left_C: Array, kept_C: Array) -> float:
    """The exponent in [0.005, 5] with the least squares of left ** exponent - kept, by trying 400 of them."""
    tried_G = np.geomspace(0.005, 5.0, 400)
    error_GC = left_C[None] ** tried_G[:, None] - kept_C[None]
    return float(tried_G[np.argmin((error_GC**2).sum(axis=1))])
