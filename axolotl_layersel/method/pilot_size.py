"""How long a pilot may be, which layers it trains, and at which rates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

ROWS_PER_STEP = (8, 7, 6)
LEAST_STEPS, MOST_STEPS = 8, 40  # what was measured
MOST_EPOCHS = 2.0
HELDOUT, LEAST_HELDOUT, ENOUGH_HELDOUT = 3 / 16, 12, 24  # share of the rows, and rows; beyond the last only if it pays
RATES = ((0.5, 1.0), (1.0,))  # that are tried where the budget allows, times the usual one
CLEARLY = 1.05  # times the gain at a lower rate; less says little, since few layers gain nearly as much at many rates


@dataclass(frozen=True)
class Size:
    """How long a pilot is."""

    steps: int
    rows_per_step: int
    heldout_rows: int
    rates: tuple[float, ...]  # that the few layers try, times the usual one; all layers take the better
    cost: float  # tokens that go forward through the whole model


@dataclass(frozen=True)
class Work:
    """What a pilot's cost depends on, beside its length."""

    num_layers: int
    head_layers: float  # the unembedding's weights over those of a decoder layer
    rows: int  # calibration rows, trained on or held out
    row_tokens: float  # their mean length
    step_passes: float  # forward passes of the trained part that a step takes, the backward pass in forward passes
    unembedded: float = 1.0  # share of the positions that a pilot unembeds; the run unembeds all

    def cost(self, steps: int, rows_per_step: int, rates: int, heldout: int) -> float:
        """Tokens that go forward through the whole model."""
        last, used = pilot_cut(self.num_layers), min(self.rows - heldout, steps * rows_per_step)
        arms = rates * self._pass(last) + self._pass(0)
        trained = steps * rows_per_step * self.step_passes * arms
        states = (used + heldout) * last / (self.num_layers + self.head_layers)
        judged = self._pass(last) + arms + sum(map(self._pass, switched_off_cuts(self.num_layers)))
        return self.row_tokens * (trained + states + heldout * judged)

    def _pass(self, cut: int) -> float:
        """A forward pass that starts at a cut and unembeds what is scored, over one of the run."""
        return (self.num_layers - cut + self.head_layers * self.unembedded) / (self.num_layers + self.head_layers)


def usual_rate(width: int) -> float:
    """The learning rate of adapters on all layers around which a pilot tries, for a hidden size.

    1.5e-3 or 3e-3 was best on SmolLM2-135M (hidden size 576), about 1e-2 on tiny models (256), 5e-4 or 1e-3 on Gemma 3
    270M (640), in 40 steps; shorter trainings want more. That wider models want less is common experience; one over the
    square root stands between what is reported of them.
    """
    return 3e-3 * math.sqrt(576 / width)


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


def better_rate(gained: Mapping[float, float]) -> float:
    """The rate to go on with: the lowest, unless another is clearly better.

    Too high a rate takes more from all layers than one that is as much too low, and few layers want a higher one.

    Args:
        gained: rate, times the usual one -> what the held-out rows gained with it.
    """
    best, lowest = max(gained, key=gained.__getitem__), min(gained)
    return lowest if gained[best] < CLEARLY * gained[lowest] else best


def pilot_cut(num_layers: int) -> int:
    """The cut that trains a sixth of the layers, where retention is far enough from 1 to be measured."""
    return num_layers - max(round(num_layers / 6), 1)


def switched_off_cuts(num_layers: int) -> list[int]:
    """The cuts, `pilot_cut` last, below which the adapters of all layers are switched off."""
    last = pilot_cut(num_layers)
    before = (round(num_layers * share) for share in (4 / 15, 1 / 2, 2 / 3))
    return sorted({cut for cut in before if 0 < cut < last} | {last})


def heldout_rows(rows: int) -> list[int]:
    """How many rows may be held out, the best first: more rows measure better, and each costs some forward passes."""
    usual = max(round(HELDOUT * rows), LEAST_HELDOUT)
    return [usual] if usual <= ENOUGH_HELDOUT else [usual, ENOUGH_HELDOUT]


def pilot_size(budget: float, work: Work) -> Size | None:
    """The longest pilot that a budget of forward tokens pays for, with more than one rate if it can; None if none."""
    for rates, heldout, rows in product(RATES, heldout_rows(work.rows), ROWS_PER_STEP):
        most = min(int(MOST_EPOCHS * (work.rows - heldout) / rows), MOST_STEPS)
        for steps in range(most, LEAST_STEPS - 1, -1):
            if (cost := work.cost(steps, rows, len(rates), heldout)) <= budget:
                return Size(steps=steps, rows_per_step=rows, heldout_rows=heldout, rates=rates, cost=cost)
    return None


def least_cost(work: Work) -> float:
    """Of the smallest pilot."""
    return work.cost(LEAST_STEPS, ROWS_PER_STEP[-1], len(RATES[-1]), heldout_rows(work.rows)[-1])
