"""The plan: which layers to train and why, as a value that can be saved, read, shared and applied.

Computing a plan (`pipeline.py`) and applying it (`plugin.py`, `frontier.py`) meet only here. The file is versioned
JSON with a stable key order, written atomically; a reader never sees half of one.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
PLAN_FILE = "plan.json"
PLAN_FOLDER = "layersel"


class PlanError(ValueError):
    """A plan cannot be read, or it was made for something else than what it is applied to."""


@dataclass(frozen=True)
class Plan:
    """One choice of layers. What was not scored is None."""

    base_model: str
    adapter: str | None  # "lora", "qlora", or None for full fine-tuning
    num_layers: int  # L
    first_trainable: int  # k: layers k..L-1 are trained
    created_by: dict[str, str] = field(default_factory=dict)  # package -> version
    revision: str | None = None
    options: dict[str, Any] = field(default_factory=dict)  # the `layersel:` block in force
    deviation: dict[str, list[float]] | None = None  # mean and stderr, L+1 numbers each, by latent state
    weight: list[float] | None = None  # L numbers >= 0
    gain: list[float] | None = None  # L numbers, sum 1
    retention: list[float] | None = None  # entry j: predicted share kept when layers j..L-1 are trained
    stability: dict[str, float] | None = None  # cut -> share of bootstrap resamples that chose it
    row_cuts: dict[str, int] | None = None  # cut -> number of single rows that would choose it
    prediction: dict[str, Any] | None = None  # cost of the cut in the run's mode, as ratios to training every layer
    sample: dict[str, Any] | None = None  # rows, tokens, seed, fingerprints
    config_updates: dict[str, Any] = field(default_factory=dict)  # the config keys that were written
    notes: list[str] = field(default_factory=list)  # what the user should know about this choice
    seconds: float | None = None  # spent on scoring
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if not 0 <= self.first_trainable < self.num_layers:
            raise PlanError(
                f"first_trainable is {self.first_trainable}; a model of {self.num_layers} decoder layers "
                f"allows 0 to {self.num_layers - 1}"
            )

    @property
    def trainable_layers(self) -> list[int]:
        """Indices of the decoder layers that are trained, input side first."""
        return list(range(self.first_trainable, self.num_layers))
