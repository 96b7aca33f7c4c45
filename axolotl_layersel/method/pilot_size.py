"""How long a pilot may be, which layers it trains, and at which ratio of rates."""

from __future__ import annotations

from dataclasses import dataclass

ROWS_PER_STEP = (8, 4)
LEAST_STEPS, MOST_STEPS = 10, 40
MOST_EPOCHS = 2.0
FIRST_RATE, RATE_STEP, MOST_RATES = 2e-3, 3.0, 4  # of adapters on all layers
FORWARD = 1 / 3  # of a forward and backward pass


@dataclass(frozen=True)
class Size:
    """How long a pilot is."""

    steps: int
    rows_per_step: int
    cost: float  # tokens, each through a forward and backward pass of all layers


def rate_ratio(first_trainable: int, num_layers: int) -> float:
    """The best learning rate of layers k..L-1 over that of all layers: one over the fourth root of their share.

    It stands between what was seen: 1.4 for half of the layers and 2.9 for the last one on tiny models (geometric means
    of their tasks), 1 and 2 on SmolLM2-135M; this gives 1.2, and 1.9 to 2.3 for the last of 12 to 30.
    """
    return float((num_layers / (num_layers - first_trainable)) ** 0.25)


def pilot_cuts(num_layers: int) -> tuple[int, int]:
    """The cuts that train half and a sixth of the layers."""
    return num_layers // 2, max(num_layers - max(round(num_layers / 6), 1), num_layers // 2)


def pilot_size(budget: float, *, row_tokens: float, train_rows: int, heldout_rows: int) -> Size | None:
    """The longest pilot that a budget pays for, or None if it pays for none.

    Args:
        budget: tokens, each through a forward and backward pass of all layers.
        row_tokens: mean length of a calibration row.
    """
    trained = 1 + 1 / 2 + MOST_RATES / 6
    evaluated = 1 + 1 / 2 + (MOST_RATES + 1) / 6
    fixed = FORWARD * row_tokens * ((train_rows + heldout_rows) * 5 / 6 + heldout_rows * evaluated)
    for rows in ROWS_PER_STEP:
        each = rows * row_tokens * trained
        steps = min(int((budget - fixed) / each), int(MOST_EPOCHS * train_rows / rows), MOST_STEPS)
        if steps >= LEAST_STEPS:
            return Size(steps=steps, rows_per_step=rows, cost=fixed + steps * each)
    return None


def least_tokens(row_tokens: float, train_rows: int, heldout_rows: int) -> float:
    """The cost of the smallest pilot."""
    low, high = 0.0, 1e3 * row_tokens * (train_rows + heldout_rows)
    for _ in range(60):
        middle = (low + high) / 2
        found = pilot_size(middle, row_tokens=row_tokens, train_rows=train_rows, heldout_rows=heldout_rows)
        low, high = (low, middle) if found else (middle, high)
    return high
