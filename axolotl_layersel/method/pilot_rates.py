"""The learning rates of a pilot's trainings."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

FIRST_STEPS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)  # lengths of the first step that are tried, times the usual rate
FIRST_STEP_ROWS = 8  # held-out rows that judge them
BEST_FIRST_STEP = 1.6  # times the usual rate, on SmolLM2-135M, where that rate is good


def usual_rate(width: int) -> float:
    """The learning rate of adapters on all layers around which a pilot tries, for a hidden size.

    1.5e-3 or 3e-3 was best on SmolLM2-135M (hidden size 576), about 1e-2 on tiny models (256), 5e-4 or 1e-3 on Gemma 3
    270M (640), in 40 steps. That wider models want less is common experience; one over the square root stands between
    what is reported of them.
    """
    return 2e-3 * math.sqrt(576 / width)


def sixth_ratio(first_trainable: int, num_layers: int) -> float:
    """The rate of layers k..L-1 over that of all layers in a pilot, from the share of the layers that they are.

    One over its square root: the first step of a sixth may go 2.6 times as far as that of all layers (1.9 to 5 on four
    tasks each of SmolLM2-135M and Gemma 3 270M), and in 8 steps a sixth wants two to three times the rate.
    """
    return math.sqrt(num_layers / (num_layers - first_trainable))


def first_step_factor(gained: Mapping[float, float]) -> float:
    """Times the usual rate: half of the way, in logarithms, to where the first optimizer step is best.

    How far a model can go along its first step tells models apart that the hidden size does not.

    Args:
        gained: length of the first step, times the usual rate, ascending by equal ratios -> what held-out rows gain.
    """
    lengths, gains = list(gained), np.array(list(gained.values()))
    gains[~np.isfinite(gains)] = -np.inf
    place = int(np.argmax(gains))
    best = math.log(lengths[place])
    if 0 < place < len(lengths) - 1 and np.isfinite(around := gains[place - 1 : place + 2]).all():
        before, top, after = around
        best += math.log(lengths[1] / lengths[0]) * (before - after) / (2 * (before - 2 * top + after) or 1)
    return math.sqrt(math.exp(best) / BEST_FIRST_STEP)


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
