"""How long a pilot may be, which layers it trains, and at which ratio of rates."""

from __future__ import annotations

from dataclasses import dataclass

ROWS_PER_STEP = 8
LEAST_STEPS, MOST_STEPS = 8, 40  # what was measured
MOST_EPOCHS = 2.0
FIRST_RATE, RATE_STEP, MOST_RATES = 3e-3, 3.0, 3  # of adapters on all layers
FORWARD = 1 / 3  # of a forward and backward pass


@dataclass(frozen=True)
class Size:
    """How long a pilot is."""

    steps: int
    cost: float  # tokens, each through a forward and backward pass of all layers


def rate_ratio(first_trainable: int, num_layers: int) -> float:
    """The best learning rate of layers k..L-1 over that of all layers: one over the fourth root of their share.

    It stands between what was seen: 1.4 for half of the layers and 2.9 for the last one on tiny models (geometric means
    of their tasks), 1 and 2 on SmolLM2-135M; this gives 1.2, and 1.9 to 2.3 for the last of 12 to 30.
    """
    return float((num_layers / (num_layers - first_trainable)) ** 0.25)


def pilot_cut(num_layers: int) -> int:
    """The cut that trains a sixth of the layers, where retention is far enough from 1 to be measured."""
    return num_layers - max(round(num_layers / 6), 1)


def switched_off_cuts(num_layers: int) -> list[int]:
    """The cuts, `pilot_cut` last, below which the adapters of all layers are switched off."""
    last = pilot_cut(num_layers)
    before = (round(num_layers * share) for share in (4 / 15, 1 / 2, 2 / 3))
    return sorted({cut for cut in before if 0 < cut < last} | {last})


def pilot_cost(steps: int, *, row_tokens: float, train_rows: int, heldout_rows: int) -> float:
    """Tokens, each through a forward and backward pass of all layers.

    Args:
        row_tokens: mean length of a calibration row.
    """
    trained = steps * ROWS_PER_STEP * (1 + MOST_RATES / 6)
    states = (min(train_rows, steps * ROWS_PER_STEP) + heldout_rows) * 5 / 6
    evaluated = heldout_rows * (1 + (1 + MOST_RATES) / 6 + 11 / 15 + 1 / 2 + 1 / 3 + 1 / 6)
    return row_tokens * (trained + FORWARD * (states + evaluated))


def pilot_size(budget: float, *, row_tokens: float, train_rows: int, heldout_rows: int) -> Size | None:
    """The longest pilot that a budget pays for, or None if it pays for none.

    Args:
        budget: tokens, each through a forward and backward pass of all layers.
        row_tokens: mean length of a calibration row.
    """
    most = min(int(MOST_EPOCHS * train_rows / ROWS_PER_STEP), MOST_STEPS)
    for steps in range(most, LEAST_STEPS - 1, -1):
        cost = pilot_cost(steps, row_tokens=row_tokens, train_rows=train_rows, heldout_rows=heldout_rows)
        if cost <= budget:
            return Size(steps=steps, cost=cost)
    return None
