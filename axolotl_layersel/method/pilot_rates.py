"""The learning rates of a pilot, and how the best one rises with a cut, which the run itself is told as well."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

FIRST_STEPS = (0.0625, 0.125, 0.25, 0.5, 1.0, 2.0)  # lengths of the first step that are tried, times the usual rate
FIRST_STEP_ROWS = 8  # held-out rows that judge them
# The best first step of SmolLM2-135M, where the usual rate is good, times that rate (geometric mean of six tasks), and
# the power of what is missing to it that suits Gemma 3 270M: in 8 steps it wants a third of the rate, for a first step
# of a seventh to a fifth.
FAR_ENOUGH, FIRST_STEP_POWER = 1.7, 0.75


def usual_rate(width: int) -> float:
    """The learning rate of adapters on all layers that a pilot takes at most, for a hidden size.

    1.5e-3 or 3e-3 was best on SmolLM2-135M (hidden size 576), about 1e-2 on tiny models (256), 5e-4 or 1e-3 on Gemma 3
    270M (640), in 40 steps; shorter trainings want more. That wider models want less is common experience; one over the
    square root stands between what is reported of them.
    """
    return 3e-3 * math.sqrt(576 / width)


def first_step_factor(gained: Mapping[float, float]) -> float:
    """What to multiply the usual rate by, at most 1, from how far the first optimizer step may go.

    That tells models apart which are as wide: it may go six times as far in SmolLM2-135M as in Gemma 3 270M.

    Args:
        gained: length of the first step, times the usual rate, ascending by equal ratios -> what held-out rows gain.
    """
    lengths, gains = list(gained), np.array(list(gained.values()))
    gains[~np.isfinite(gains)] = -np.inf
    place = int(np.argmax(gains))
    best = math.log(lengths[place])
    if 0 < place < len(lengths) - 1 and np.isfinite(around := gains[place - 1 : place + 2]).all():
        before, top, after = around  # the peak of a parabola through the three
        best += math.log(lengths[1] / lengths[0]) * (before - after) / (2 * (before - 2 * top + after) or 1)
    return float(min(math.exp(best) / FAR_ENOUGH, 1.0) ** FIRST_STEP_POWER)


def rate_ratio(first_trainable: int, num_layers: int, *, adapters: bool = True) -> float:
    """The best learning rate of layers k..L-1 over that of all layers, from the share of the layers that they are.

    With adapters one over its fourth root, the careful side of what was seen for half of the layers and for the last
    one (geometric means of the tasks): 1.4 and 2.9 on tiny models, 1.3 and 2.8 on SmolLM2-135M, 1.4 and 2.6 on Gemma
    3 270M; this gives 1.2, and 1.9 to 2.3 for the last of 12 to 30.
    In full fine-tuning one over its 3/4th power, the careful side of what was seen on one task: 2, 4, 8 and 16 for a
    half, a third, a sixth and the last of the 30 layers of SmolLM2-135M, 3, 5 and 11 for 7, 2 and 1 of the 12 of a tiny
    model.
    """
    return float((num_layers / (num_layers - first_trainable)) ** (0.25 if adapters else 0.75))
