"""A pilot: short trainings on the calibration rows that measure how steep retention is for this model and task.

    one sixth of the layers, at a few rates      finds the rate; its best run is the second point of the curve
    half of the layers                           the first point
    all layers                                   what both are shares of

The best rate grows a little as fewer layers are trained (`rate_ratio`), so the search runs where it is cheapest.
A pilot is shorter than the run it stands for, and a short training leans more on the layers below the cut: its exponent
is `SHORTER` times the run's, as measured.

The pilot costs a given share of the run (`pilot_share`), in tokens times trained layers; where that does not pay for
the smallest one, or the model cannot be piloted, the forward pass alone has to do, with a wider band (`exponent.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from axolotl_layersel.method.calibration import Row
from axolotl_layersel.method.pilot_curve import Arm, Piloted, curve_of
from axolotl_layersel.method.pilot_size import (
    FIRST_RATE,
    MOST_RATES,
    RATE_STEP,
    Size,
    least_tokens,
    pilot_cuts,
    pilot_size,
    rate_ratio,
)
from axolotl_layersel.method.pilot_training import PilotError, Trainer, frozen
from axolotl_layersel.method.scoring_pass import out_of_memory
from axolotl_layersel.model.decoder_stack import DecoderStack
from axolotl_layersel.model.latent_states import left_as_found

Array = NDArray[np.float64]

HELDOUT = 0.25  # of the rows
LEAST_ROWS = 32
MOST_TOKENS = 65_536  # of all rows: what enters a cut is kept for them


@dataclass(frozen=True)
class PilotSettings:
    """What a pilot needs to know of the run."""

    run_tokens: float  # that this process trains on in the whole run
    share: float = 0.02  # of the run that the pilot may cost
    checkpointing: bool = False  # recompute layers in the backward pass, as the run does
    required: bool = False  # stop where no pilot can be run
    say: Callable[[str], None] = lambda text: None  # told about each training


def split_rows(rows: Sequence[Row], *, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the rows to train and of those held out, as many as `MOST_TOKENS` allows.

    Raises:
        PilotError: there are too few.
    """
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    tokens = np.cumsum([len(rows[row].input_ids) for row in order])
    chosen = order[: int(np.searchsorted(tokens, MOST_TOKENS, side="right"))]
    if len(chosen) < LEAST_ROWS:
        raise PilotError(
            f"{len(chosen)} calibration rows of at most {MOST_TOKENS} tokens together are too few, at least "
            f"{LEAST_ROWS} are needed: raise num_samples, or lower sequence_len"
        )
    heldout = round(HELDOUT * len(chosen))
    return sorted(chosen[heldout:]), sorted(chosen[:heldout])


def run_pilot(
    model: nn.Module,
    stack: DecoderStack,
    rows: Sequence[Row],
    *,
    share_L: Array,
    settings: PilotSettings,
    seed: int,
    batch_tokens: int,
    autocast: torch.dtype | None = None,
) -> Piloted:
    """Measure the exponent on this model and data.

    Args:
        model: before adapters; left as it was found, to the last bit.
        rows: the calibration sample.
        share_L: each layer's share of the descent, which gives the curve its shape.
        settings: of the run.
        seed: of the split, the adapters and the order of rows.
        batch_tokens: padded tokens in one forward pass.

    Raises:
        PilotError: it does not pay, or this model or data cannot be piloted.
    """
    started = time.perf_counter()
    if autocast is torch.float16 or next(model.parameters()).dtype is torch.float16:
        raise PilotError("small gradients vanish in float16; use bf16")
    train, heldout = split_rows(rows, seed=seed)
    row_tokens = float(np.mean([len(rows[row].input_ids) for row in (*train, *heldout)]))
    size = pilot_size(
        settings.share * settings.run_tokens, row_tokens=row_tokens, train_rows=len(train), heldout_rows=len(heldout)
    )
    if size is None:
        least = least_tokens(row_tokens, len(train), len(heldout)) / settings.share
        raise PilotError(
            f"a run of {settings.run_tokens:,.0f} tokens is too short for a pilot that costs {settings.share:g} of it, "
            f"which takes {least:,.0f} tokens: raise pilot_share to "
            f"{settings.share * least / settings.run_tokens:.2g} to have one"
        )
    while True:
        trainer = Trainer(
            model=model,
            stack=stack,
            rows=rows,
            train=train,
            heldout=heldout,
            rows_per_step=size.rows_per_step,
            batch_tokens=batch_tokens,
            checkpointing=settings.checkpointing,
        )
        try:
            with left_as_found(model, autocast=autocast), frozen(model), _uncached(autocast, trainer.device):
                arms = _train_arms(trainer, size, seed=seed, say=settings.say)
            break
        except (RuntimeError, MemoryError) as error:
            longest = max(len(rows[row].input_ids) for row in (*train, *heldout))
            if isinstance(error, PilotError) or not out_of_memory(error):
                raise
            if batch_tokens <= longest:
                raise PilotError(f"a row of {longest} tokens alone is too much for the memory") from error
            batch_tokens //= 2
            settings.say(f"out of memory; the pilot starts again with {batch_tokens} tokens at a time")
    scored = sum(rows[row].scored for row in heldout)
    return curve_of(
        arms,
        share_L=share_L,
        scored=scored,
        size=size,
        rows=len(train),
        run_tokens=settings.run_tokens,
        seed=seed,
        seconds=time.perf_counter() - started,
    )


def _uncached(autocast: torch.dtype | None, device: torch.device) -> AbstractContextManager[object]:
    """Autocast keeps its copies of weights until its outermost block ends, and so would miss every optimizer step."""
    return nullcontext() if autocast is None else torch.autocast(device.type, dtype=autocast, cache_enabled=False)


def _train_arms(trainer: Trainer, size: Size, *, seed: int, say: Callable[[str], None]) -> list[Arm]:
    """Before any training, then the last sixth at its best rate, half and all layers at rates that follow from it."""
    layers = trainer.stack.num_layers
    half, sixth = pilot_cuts(layers)
    for cut in sorted({half, sixth} - {0}):
        trainer.keep_states(cut)
    base = Arm(layers, 0.0, trainer.heldout_losses(sixth))
    _check_start(trainer, base.losses_H)
    scored = sum(trainer.rows[row].scored for row in trainer.heldout)

    def arm(cut: int, rate: float) -> Arm:
        own_rate = rate * rate_ratio(cut, layers)
        losses = trainer.trained(cut, learning_rate=own_rate, steps=size.steps, seed=seed)
        say(
            f"pilot, layers {cut} to {layers - 1} at rate {own_rate:.2g}: "
            f"{base.losses_H.sum() / scored:.3f} to {losses.sum() / scored:.3f} nats"
        )
        return Arm(cut, own_rate, losses)

    tried: dict[float, Arm] = {rate: arm(sixth, rate) for rate in (FIRST_RATE, FIRST_RATE * RATE_STEP)}
    best = min(tried, key=lambda rate: tried[rate].losses_H.sum())
    step = RATE_STEP if best > FIRST_RATE else 1 / RATE_STEP
    while len(tried) < MOST_RATES:
        tried[best * step] = arm(sixth, best * step)
        if not tried[best * step].losses_H.sum() < tried[best].losses_H.sum():
            break
        best *= step
    others = [arm(cut, best) for cut in dict.fromkeys((half, 0)) if cut != sixth]
    return [base, tried[best], *others]


def _check_start(trainer: Trainer, base_H: Array) -> None:
    """A training that starts at a cut must compute what the whole model computes."""
    some = trainer.heldout[:4]
    whole, started = trainer.heldout_losses(0, some), base_H[: len(some)]
    if not np.allclose(whole, started, rtol=0.02):
        raise PilotError(
            f"layers that start from stored states compute another loss than the whole model ({started.sum():.4g} and "
            f"{whole.sum():.4g} nats over {len(some)} rows)"
        )
