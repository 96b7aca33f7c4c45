"""What a pilot needs to know of an axolotl run: how long the run is, and how it trains."""

from __future__ import annotations

import math
from typing import Any

from axolotl_layersel.integration.log import LOG
from axolotl_layersel.integration.run_settings import RunSettings
from axolotl_layersel.method.calibration import Sample
from axolotl_layersel.method.pilot import PilotSettings


def pilot_settings(settings: RunSettings, sample: Sample, dataset: Any, *, world_size: int) -> PilotSettings | None:
    """Settings of this run's pilot, or None where the config wants none.

    Raises:
        ValueError: a pilot is demanded of preference training, whose loss it does not train with.
    """
    options = settings.options
    if options.pilot is False:
        return None
    if settings.rl:
        if options.pilot is True:
            raise ValueError(
                f"`pilot: true` with `rl: {settings.rl}`: a pilot trains on next tokens, not with the loss of this "
                "run; set `pilot: auto`, which goes on with the forward pass alone"
            )
        return None
    return PilotSettings(
        run_tokens=run_tokens(settings, sample, dataset, world_size=world_size),
        share=options.pilot_share,
        adapters=settings.adapter is not None,
        checkpointing=settings.checkpointing,
        required=options.pilot is True,
        say=lambda text: LOG.info("layersel: %s", text),
    )


def run_tokens(settings: RunSettings, sample: Sample, dataset: Any, *, world_size: int) -> float:
    """About how many tokens one process trains on in the whole run; infinite where the config gives it no end."""
    row = sum(len(r.input_ids) for r in sample.rows) / len(sample.rows)
    step = settings.rows_per_step * (settings.shape.positions if settings.packs else row)
    by_steps = settings.max_steps * step if settings.max_steps else math.inf
    by_epochs = settings.epochs * len(dataset) * row / world_size if hasattr(dataset, "__len__") else math.inf
    return float(min(by_steps, by_epochs))
