"""How long a pilot may be, and which layers it trains."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from axolotl_layersel.method.pilot_rates import FIRST_STEP_ROWS, FIRST_STEPS

ROWS_PER_STEP = (8, 7, 6)
LEAST_STEPS, MOST_STEPS = 8, 40  # what was measured
MOST_EPOCHS = 2.0
HELDOUT, LEAST_HELDOUT, ENOUGH_HELDOUT = 3 / 16, 12, 24  # share of the rows, and rows; beyond the last only if it pays


@dataclass(frozen=True)
class Size:
    """How long a pilot is."""

    steps: int
    rows_per_step: int
    heldout_rows: int
    cost: float  # tokens that go forward through the whole model
    with_half: bool = False  # whether it trains a half of the layers as well


@dataclass(frozen=True)
class Work:
    """What a pilot's cost depends on, beside its length."""

    num_layers: int
    head_layers: float  # the unembedding's weights over those of a decoder layer
    rows: int  # calibration rows, trained on or held out
    row_tokens: float  # their mean length
    step_passes: float  # forward passes of the trained part that a step takes, the backward pass in forward passes
    unembedded: float = 1.0  # share of the positions that a pilot unembeds; the run unembeds all

    def cost(self, steps: int, rows_per_step: int, heldout: int, *, with_half: bool = False) -> float:
        """Tokens that go forward through the whole model."""
        last, used = pilot_cut(self.num_layers), min(self.rows - heldout, steps * rows_per_step)
        arms = self._pass(last) + self._pass(0) + (self._pass(half_cut(self.num_layers)) if with_half else 0.0)
        trained = steps * rows_per_step * self.step_passes * arms
        states = (used + heldout) * last / (self.num_layers + self.head_layers)
        first = rows_per_step * self.step_passes + len(FIRST_STEPS) * FIRST_STEP_ROWS
        judged = self._pass(last) + arms + sum(map(self._pass, switched_off_cuts(self.num_layers)))
        return self.row_tokens * (trained + first * self._pass(last) + states + heldout * judged)

    def _pass(self, cut: int) -> float:
        """A forward pass that starts at a cut and unembeds what is scored, over one of the run."""
        return (self.num_layers - cut + self.head_layers * self.unembedded) / (self.num_layers + self.head_layers)


def pilot_cut(num_layers: int) -> int:
    """The cut that trains a sixth of the layers, where retention is far enough from 1 to be measured."""
    return num_layers - max(round(num_layers / 6), 1)


def half_cut(num_layers: int) -> int:
    """The cut that trains a half of the layers."""
    return round(num_layers / 2)


def switched_off_cuts(num_layers: int) -> list[int]:
    """The cuts, `pilot_cut` last, below which the adapters of all layers are switched off."""
    last = pilot_cut(num_layers)
    before = (round(num_layers * 4 / 15), half_cut(num_layers), round(num_layers * 2 / 3))
    return sorted({cut for cut in before if 0 < cut < last} | {last})


def heldout_rows(rows: int) -> list[int]:
    """How many rows may be held out, the best first: more rows measure better, and each costs some forward passes."""
    usual = max(round(HELDOUT * rows), LEAST_HELDOUT)
    return [usual] if usual <= ENOUGH_HELDOUT else [usual, ENOUGH_HELDOUT]


def pilot_size(budget: float, work: Work) -> Size | None:
    """The longest pilot that a budget of forward tokens pays for; None if none.

    A training of a half of the layers tells more than further steps, so it comes first.
    """
    halves = (True, False) if 0 < half_cut(work.num_layers) < pilot_cut(work.num_layers) else (False,)
    for with_half in halves:
        for heldout, rows in product(heldout_rows(work.rows), ROWS_PER_STEP[:1] if with_half else ROWS_PER_STEP):
            most = min(int(MOST_EPOCHS * (work.rows - heldout) / rows), MOST_STEPS)
            for steps in range(most, LEAST_STEPS - 1, -1):
                if (cost := work.cost(steps, rows, heldout, with_half=with_half)) <= budget:
                    return Size(steps, rows, heldout, cost, with_half)
    return None


def least_cost(work: Work) -> float:
    """Of the smallest pilot."""
    return work.cost(LEAST_STEPS, ROWS_PER_STEP[-1], heldout_rows(work.rows)[-1])
