"""How steep retention is, and how well that is known: what was measured on other models (`benchmarks/quality`).

The constants stand here and nowhere else. They come from 18 pairs of model and task: four small models of 12 and 16
layers (losses of 4.8 to 6.6 nats before training) and SmolLM2-135M-Instruct, 30 layers (1.6 and 2.6 nats). A model that
is unlike all of them gets a wider band, and the log says so; by how much is a guess.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

# Forward pass alone: log(exponent) = a + b * loss, by least squares over the 18 pairs, whose exponents run from .01 to
# .68; the errors have a standard deviation of .90, and the band holds 90 % of a normal distribution with it.
FORWARD_LAW = (-0.26, -0.46)
FORWARD_FACTOR = math.exp(1.645 * 0.90)
# A pilot's exponent over the run's, and the error of that ratio.
SHORTER = 1.3
PILOT_FACTOR = 1.4
KNOWN_LAYERS, KNOWN_LOSSES, KNOWN_FAMILIES = (12, 30), (1.5, 6.7), ("llama", "gpt_neox")
UNFAMILIAR_FACTOR = 1.5  # for each thing that was never seen; a guess


@dataclass(frozen=True)
class Exponent:
    """How steep retention falls with what is left to do, and how well that is known."""

    value: float
    factor: float  # >= 1: in nine of ten cases the true one lies between value / factor and value * factor

    @property
    def low(self) -> float:
        """The lower end, which gives the upper end of the retention."""
        return self.value / self.factor

    @property
    def high(self) -> float:
        """The upper end, which gives the lower end of the retention."""
        return self.value * self.factor


def forward_exponent(loss: float, *, num_layers: int, family: str | None) -> Exponent:
    """What the forward pass alone says; `loss` is that of the model before training, nats per scored token."""
    lowest, highest = KNOWN_LOSSES
    a, b = FORWARD_LAW
    known = Exponent(math.exp(a + b * min(max(loss, lowest), highest)), FORWARD_FACTOR)
    return widened(known, unlike_the_known(num_layers=num_layers, loss=loss, family=family))


def widened(exponent: Exponent, unlike: Sequence[str]) -> Exponent:
    """The same with a wider band, for a model that is unlike the known ones in some things."""
    return Exponent(exponent.value, combined(exponent.factor, *[UNFAMILIAR_FACTOR] * len(unlike)))


def family_of(model: nn.Module) -> str | None:
    """What transformers calls the architecture."""
    return getattr(getattr(model, "config", None), "model_type", None)


def combined(*factors: float) -> float:
    """The factor of independent errors together."""
    return math.exp(math.hypot(*(math.log(factor) for factor in factors)))


def unlike_the_known(*, num_layers: int, loss: float, family: str | None) -> list[str]:
    """In what a model is unlike those that the constants come from."""
    found = []
    if not KNOWN_LAYERS[0] <= num_layers <= KNOWN_LAYERS[1]:
        found.append(f"{num_layers} layers (known are {KNOWN_LAYERS[0]} to {KNOWN_LAYERS[1]})")
    if not KNOWN_LOSSES[0] <= loss <= KNOWN_LOSSES[1]:
        found.append(f"a loss of {loss:.2f} nats before training (known are {KNOWN_LOSSES[0]} to {KNOWN_LOSSES[1]})")
    if family not in KNOWN_FAMILIES:
        found.append(f"the model family {family} (known are {', '.join(KNOWN_FAMILIES)})")
    return found
