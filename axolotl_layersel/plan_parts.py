"""What a plan carries: scores, pilot, prediction and sample, as scoring and prediction make them.

Plain values, checked by pydantic when a plan file is read (`plan.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import ConfigDict

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)  # for a file that was edited by hand


@dataclass(frozen=True)
class PilotCut:
    """One training of a pilot."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    first_trainable: int  # k: layers k..L-1 were trained
    learning_rate: float
    loss: float  # on the held-out rows afterwards, nats per token
    retention: float  # share of the improvement of training all layers
    retention_stderr: float  # over the held-out rows


@dataclass(frozen=True)
class Pilot:
    """Short trainings on the calibration rows, which the retention is made to agree with."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    steps: int
    rows_per_step: int
    rows: int  # trained on
    heldout_rows: int
    base_loss: float  # on the held-out rows before training, nats per token
    cuts: list[PilotCut]  # all layers, a half where that paid, and a sixth
    switched_off: dict[int, float]  # cut k -> share of the gain that is left with the adapters below k switched off
    cost_share: float  # of the run, as planned, in forward passes of the model

    @property
    def half(self) -> PilotCut | None:
        """The training of a half of the layers, where there was one."""
        return self.cuts[1] if len(self.cuts) > 2 else None


@dataclass(frozen=True)
class Scores:
    """What scoring found. Lists are by decoder layer (L) or latent state (L + 1), input side first."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    deviation: list[float]  # L + 1
    deviation_stderr: list[float]  # L + 1, rows as the independent units
    descent: list[float]  # L, >= 0, sum 1: each layer's share of the fall of the deviation
    retention: list[float]  # L; entry k: predicted share of the improvement when layers k..L-1 are trained
    stability: dict[int, float]  # cut -> share of the bootstrap resamples that choose it
    row_cuts: dict[int, int]  # cut -> number of single rows that would choose it
    tokens: int  # scored tokens
    loss: float | None = None  # cross-entropy before training, nats per token; no logit scale, no soft-cap
    retention_low: list[float] | None = None  # L; lower end of a 90 % band around the retention; what coverage asks
    retention_high: list[float] | None = None  # L; upper end
    gain_source: Literal["forward", "pilot"] = "forward"  # what tells how steep the retention is
    exponent: float | None = None  # forward: retention(k) = (sum of descent over i >= k) ** exponent
    pilot: Pilot | None = None


@dataclass(frozen=True)
class CostOfCuts:
    """Ratios to training every layer in the same mode, for every cut k = 0..L-1."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    forward: list[float]  # FLOPs
    backward: list[float]  # FLOPs
    step: list[float]  # FLOPs
    saved_activation_bytes: list[float]
    trainable_parameters: list[float]
    frozen_forward: list[float] | None = None  # FLOPs that a prefix cache saves in later epochs; None in older files
    whole_run: list[float] | None = None  # FLOPs of all epochs with a prefix cache, filling included; None without one


@dataclass(frozen=True)
class StepAmounts:
    """What one micro batch of the run takes, with the plan's cut."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    rows: int
    positions: int
    forward_flops: float
    backward_flops: float
    all_layers_backward_flops: float  # when every layer is trained
    saved_activation_bytes: float
    trainable_parameters: int


@dataclass(frozen=True)
class CacheCosts:
    """What a prefix cache costs and saves; ratios of FLOPs to training every layer, as if the cache were empty now."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    asked: Literal["auto", "ram", "disk"]
    epochs: float  # how often training reads each sample
    first_epoch: float  # filling included
    later_epochs: float
    whole_run: float  # filling included; compare with `Prediction.step`, which is that without a cache
    bytes_per_token: int
    tokens: int | None  # of all samples; None where rows become tokens after the plan is made
    offloaded_bytes: int  # weights that leave the device's memory

    @property
    def state_bytes(self) -> int | None:
        """In RAM or on the disk."""
        return None if self.tokens is None else self.tokens * self.bytes_per_token


@dataclass(frozen=True)
class PeakMemory:
    """The most that a training step holds on its device, in bytes; with the plan's cut."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    weights: int  # of the model and its adapters, less `offloaded`
    offloaded: int  # frozen weights that a prefix cache lets leave the device
    gradients: int
    optimizer: int  # its state
    activations: int  # saved for backward
    passing: int  # beyond these: logits while the loss is computed, or what one recomputed layer saves
    total: int
    all_layers: int  # the same when every layer is trained, without a cache


@dataclass(frozen=True)
class Prediction:
    """What a training step will cost; ratios are to training every layer in the same mode."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    forward: float  # FLOPs
    backward: float  # FLOPs
    step: float  # FLOPs
    saved_activation_bytes: float
    trainable_parameters: float  # and of the optimizer state, which is proportional to them
    head_share: float  # share of this cut's step that the unembedding takes, whatever the cut
    floor: float  # step ratio that no cut can go below
    gradient_checkpointing: bool
    why: str | None  # why nothing below the cut is saved, or None
    per_cut: CostOfCuts
    absolute: StepAmounts
    cache: CacheCosts | None = None  # None: the run uses none, or an older file
    memory: PeakMemory | None = None  # None: not predicted in this mode, or an older file


@dataclass(frozen=True)
class ScoredSample:
    """The rows that were scored."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    rows: int
    seed: int
    dataset_fingerprint: str
    tokenizer_fingerprint: str
    datasets: list[str]  # their paths or names
