"""From the losses of a pilot's held-out rows to the retention that it measured, with its noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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


def result_of(
    base_H: Array,
    whole: Arm,
    parts: Sequence[Arm],
    off: Mapping[int, Array],
    *,
    scored: int,
    size: Size,
    rows: int,
    cost_share: float,
    seed: int,
) -> Pilot:
    """What the trainings measured.

    Args:
        base_H: summed cross-entropy of each held-out row before training.
        whole, parts: the training of all layers, and of suffixes, the shortest last.
        off: cut -> losses of `whole` with its adapters below the cut switched off.
        scored: held-out scored tokens.
        rows: trained on.
        cost_share: of the run.
        seed: of the resamples.

    Raises:
        PilotError: nothing was learnt beyond noise, or training diverged.
    """
    gained_H = base_H - whole.losses_H
    if not all(np.isfinite(arm.losses_H).all() for arm in (whole, *parts)):
        raise PilotError("training diverged")
    counts_BH = np.random.default_rng(seed).multinomial(
        len(gained_H), np.full(len(gained_H), 1 / len(gained_H)), size=RESAMPLES
    )
    gained_B = counts_BH @ gained_H
    if gained_H.sum() <= 0 or np.mean(gained_B <= 0) > 0.01:
        raise PilotError(
            f"{size.steps} steps did not improve the held-out loss beyond its noise ("
            f"{base_H.sum() / scored:.3f} to {whole.losses_H.sum() / scored:.3f} nats)"
        )
    gain = float(gained_H.sum())

    def measured(arm: Arm) -> PilotCut:
        gained_arm_H = base_H - arm.losses_H
        return PilotCut(
            arm.cut,
            arm.learning_rate,
            loss=float(arm.losses_H.sum() / scored),
            retention=float(gained_arm_H.sum()) / gain,
            retention_stderr=float((counts_BH @ gained_arm_H / gained_B).std()),
        )

    return Pilot(
        steps=size.steps,
        rows_per_step=size.rows_per_step,
        rows=rows,
        heldout_rows=len(gained_H),
        base_loss=float(base_H.sum() / scored),
        cuts=[measured(arm) for arm in (whole, *parts)],
        switched_off={cut: float((base_H - losses_H).sum()) / gain for cut, losses_H in off.items()},
        cost_share=cost_share,
    )
