"""What a cut keeps of the improvement, and how well that is known.

Both laws take the shape s(k) of the descent (`gain.py`) and differ in what tells them how steep retention is:

    forward pass alone   retention(k) = s(k) ** exponent, the exponent from the loss before training; a wide band
    pilot                the pilot's retention at cut a is met; up to a, ln retention is proportional to ln m(k), with
                         m(k) = sqrt(off(k) * s(k)) and off(k) what the pilot of all layers keeps with its adapters
                         below k switched off; beyond a it is proportional to (-ln s(k)) ** BEYOND; where the pilot
                         trained a half of the layers, ln retention there is the mean of this and of what it measured

A band is a factor on ln retention, because errors are about as large at .95 as at .5 there. All constants stand in this
file. They come from `benchmarks/quality`: four small models of 12 and 16 layers (losses of 4.8 to 6.6 nats before
training) and SmolLM2-135M-Instruct, 30 layers (1.5 to 3.6 nats). A model that is unlike all of them gets a wider band,
and the log says so: for another family by what Gemma 3 270M wanted, 18 layers (2.0 to 3.7 nats), else by a guess.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import nn

from axolotl_layersel.method.gain import retention, still_to_do
from axolotl_layersel.plan_parts import Pilot

Array = NDArray[np.float64]

NINE_OF_TEN = 1.645  # standard deviations of a normal distribution on either side
# Forward pass alone: (loss before training, exponent, standard deviation of its logarithm), linear in between in the
# logarithms. Six tasks of SmolLM2 want .46 to 1.66 (geometric mean .81), those of Gemma 3 270M .22 to .57 (.33); with
# .70 their points lie .58 and 1.08 around the law. The other end is the geometric mean of 16 pairs of tiny models and
# tasks (.01 to .20).
FORWARD_LAW = ((3.6, 0.70, 0.8), (4.8, 0.052, 0.78))
# Steps of a pilot -> the power that its retention is raised to, because a shorter training leans more on the layers
# below the cut, and the standard deviation of ln(-ln retention) around the law: six tasks of SmolLM2, runs of 40 steps.
PILOT_STEPS, PILOT_POWER, PILOT_SPREAD = (8, 15, 40), (0.73, 0.85, 1.0), (0.30, 0.24, 0.24)
# Loss before training -> times that spread: on a tiny model at 5.4 to 6.4 nats, which had no part in the above, the
# power of pilots of 8 steps has the same mean over tasks and twice the spread.
PILOT_LOSSES, PILOT_SPREAD_FACTOR = (3.6, 4.8), (1.0, 2.0)
# The last layers lose less than the descent says: the power of ln s(k) beyond the pilot's cut that suits the 20 points
# of tiny models there best. It suits SmolLM2, Gemma 3 270M and a third tiny model, which had no part in it, as well.
BEYOND = 0.7
FLOOR = 1e-3  # a share is kept this far from 0 and 1 before its logarithm is taken
KNOWN_LAYERS, KNOWN_LOSSES, KNOWN_FAMILIES = (12, 30), (1.5, 6.6), ("llama", "gpt_neox")
# Times the band for what was never seen. For another family what Gemma 3 270M asks without the pilot's training of a
# half: 29 of 30 points of six tasks lie in the band with it (26 with 2). With that training its points lie as close to
# the law as those of SmolLM2, so there, as for another depth or loss, a guess.
OTHER_FAMILY, OTHER_FAMILY_WITH_HALF, OTHER_SIZE = 3.0, 1.5, 1.5


@dataclass(frozen=True)
class RetentionLaw:
    """Retention of every cut from the layers' shares of the descent, with a band of 90 %."""

    curve: Callable[[Array], Array]  # (..., L) shares -> (..., L) retention; entry 0 is 1, never increasing
    factor: float  # >= 1: in nine of ten cases ln retention is predicted to within this factor

    def low(self, share_L: Array) -> Array:
        """Lower end of the band, (..., L)."""
        return np.asarray(self.curve(share_L) ** self.factor)

    def high(self, share_L: Array) -> Array:
        """Upper end of the band, (..., L)."""
        return np.asarray(self.curve(share_L) ** (1 / self.factor))

    def widened(self, unlike: Mapping[str, float]) -> RetentionLaw:
        """The same with a wider band, for a model that is unlike the known ones in some things, by their factors."""
        return replace(self, factor=_combined(self.factor, *unlike.values()))


def forward_exponent(loss: float) -> float:
    """What the forward pass alone says; `loss` is that of the model before training, nats per scored token."""
    losses, exponents, _ = zip(*FORWARD_LAW, strict=True)
    return float(np.exp(np.interp(loss, losses, np.log(exponents))))


def forward_law(loss: float) -> RetentionLaw:
    """Retention as far as the forward pass alone knows it."""
    exponent = forward_exponent(loss)
    losses, _, spreads = zip(*FORWARD_LAW, strict=True)
    spread = float(np.interp(loss, losses, spreads))
    return RetentionLaw(lambda share_L: retention(share_L, exponent=exponent), math.exp(NINE_OF_TEN * spread))


def pilot_law(pilot: Pilot) -> RetentionLaw:
    """Retention through what a pilot measured; the band counts the noise of its held-out rows as well."""
    point = pilot.cuts[-1]
    power = float(np.interp(math.log(pilot.steps), np.log(PILOT_STEPS), PILOT_POWER))
    kept = _inside(point.retention)
    half = (pilot.half.first_trainable, _inside(pilot.half.retention)) if pilot.half else None

    def curve(share_L: Array) -> Array:
        return through_pilot(share_L, pilot.switched_off, cut=point.first_trainable, kept=kept**power, half=half)

    return RetentionLaw(curve, _combined(_law_factor(pilot), _noise_factor(pilot)))


def mostly_noise(pilot: Pilot) -> bool:
    """Whether the held-out rows make the band wider than the law does."""
    return _noise_factor(pilot) > _law_factor(pilot)


def _law_factor(pilot: Pilot) -> float:
    spread = float(np.interp(math.log(pilot.steps), np.log(PILOT_STEPS), PILOT_SPREAD))
    return math.exp(NINE_OF_TEN * spread * float(np.interp(pilot.base_loss, PILOT_LOSSES, PILOT_SPREAD_FACTOR)))


def _noise_factor(pilot: Pilot) -> float:
    point = pilot.cuts[-1]
    at_least = _inside(point.retention - NINE_OF_TEN * point.retention_stderr)
    return math.log(at_least) / math.log(_inside(point.retention))


def through_pilot(
    share_L: Array, off: Mapping[int, float], *, cut: int, kept: float, half: tuple[int, float] | None = None
) -> Array:
    """Retention of every cut, (..., L), from the one at `cut`.

    Args:
        share_L: (..., L) each layer's share of the descent.
        off: cut -> what the pilot of all layers keeps of its improvement with the adapters below switched off; linear
            in between.
        cut: of the other pilot, > 0.
        kept: retention there, within (0, 1).
        half: another cut between 0 and `cut`, and the retention that the pilot measured there, within (0, 1).
    """
    left_L = np.clip(still_to_do(share_L), FLOOR, 1 - FLOOR)
    cuts = sorted(off)
    off_L = np.interp(np.arange(left_L.shape[-1]), [0, *cuts], [1.0, *(_inside(off[k]) for k in cuts)])
    below_L, beyond_L = -(np.log(off_L) + np.log(left_L)) / 2, (-np.log(left_L)) ** BEYOND
    log_L = np.where(np.arange(left_L.shape[-1]) <= cut, below_L / below_L[..., [cut]], beyond_L / beyond_L[..., [cut]])
    log_L[..., 0] = 0.0
    log_L *= math.log(kept)
    if half:
        place, kept_half = half
        factor_1 = (1 + math.log(max(kept_half, kept)) / log_L[..., [place]]) / 2  # makes it the mean of both there
        weight_L = np.interp(np.arange(log_L.shape[-1]), [place, cut], [1.0, 0.0])  # as much below, nothing at `cut`
        log_L *= 1 + weight_L * (factor_1 - 1)
    return np.minimum.accumulate(np.exp(log_L), axis=-1)


def _inside(share: float) -> float:
    return min(max(share, FLOOR), 1 - FLOOR)


def _combined(*factors: float) -> float:
    """The factor of independent errors together."""
    return math.exp(math.hypot(*(math.log(factor) for factor in factors)))


def family_of(model: nn.Module) -> str | None:
    """What transformers calls the architecture."""
    return getattr(getattr(model, "config", None), "model_type", None)


def unlike_the_known(
    *, num_layers: int, loss: float, family: str | None, pilot: Pilot | None = None
) -> dict[str, float]:
    """In what a model is unlike those that the constants come from -> the factor by which that widens a band."""
    found = {}
    if not KNOWN_LAYERS[0] <= num_layers <= KNOWN_LAYERS[1]:
        found[f"{num_layers} layers (known are {KNOWN_LAYERS[0]} to {KNOWN_LAYERS[1]})"] = OTHER_SIZE
    if not KNOWN_LOSSES[0] <= loss <= KNOWN_LOSSES[1]:
        known = f"known are {KNOWN_LOSSES[0]} to {KNOWN_LOSSES[1]}"
        found[f"a loss of {loss:.2f} nats before training ({known})"] = OTHER_SIZE
    if family not in KNOWN_FAMILIES:
        found[f"the model family {family} (known are {', '.join(KNOWN_FAMILIES)})"] = (
            OTHER_FAMILY_WITH_HALF if pilot and pilot.half else OTHER_FAMILY
        )
    return found
