"""A pilot: short trainings on the calibration rows that measure how steep retention is for this model and task.

    a sixth of the layers    the point that the curve goes through, where retention is neither near 1 nor near 0
    a half, where it pays    a second point, which corrects the curve below it
    all layers               what that is a share of; then, with its adapters below a cut switched off, how much of the
                             work lies above, for a few forward passes

The rates follow from the hidden size and from how far the first step of the sixth may go. `retention.py` makes a curve
of what is found here.

The pilot costs a given share of the run (`pilot_share`), in forward passes of the model; where that does not pay for
the smallest one, or the model cannot be piloted, the forward pass alone has to do, with a wider band.
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

from axolotl_layersel.method.calibration import IGNORED, Row
from axolotl_layersel.method.low_rank import linear_modules
from axolotl_layersel.method.pilot_rates import (
    FIRST_STEP_ROWS,
    FIRST_STEPS,
    first_step_factor,
    rate_ratio,
    usual_rate,
)
from axolotl_layersel.method.pilot_result import Arm, result_of
from axolotl_layersel.method.pilot_size import (
    Size,
    Work,
    half_cut,
    least_cost,
    pilot_cut,
    pilot_size,
    switched_off_cuts,
)
from axolotl_layersel.method.pilot_training import PilotError, Trainer, frozen, takes_positions
from axolotl_layersel.model.decoder_stack import DecoderStack
from axolotl_layersel.model.latent_states import left_as_found
from axolotl_layersel.model.memory import out_of_memory
from axolotl_layersel.plan_parts import Pilot

Array = NDArray[np.float64]

LEAST_ROWS = 40  # two epochs of the shortest pilot, and the held-out ones
MOST_TOKENS = 262_144  # of all rows: what enters each cut is kept for them in main memory


@dataclass(frozen=True)
class PilotSettings:
    """What a pilot needs to know of the run."""

    run_tokens: float  # that this process trains on in the whole run
    share: float = 0.02  # of the run that the pilot may cost
    adapters: bool = True  # whether the run trains adapters alone, which saves it the gradients of the weights
    checkpointing: bool = False  # recompute layers in the backward pass, as the run does
    required: bool = False  # stop where no pilot can be run
    say: Callable[[str], None] = lambda text: None  # told about each training


def head_size(stack: DecoderStack) -> tuple[int, float]:
    """The hidden size, and the unembedding's weights over those of a decoder layer, as linear modules count them.

    Raises:
        PilotError: one of them has no linear module.
    """
    head = next(iter(linear_modules([stack.head])), None)
    weights = sum(inputs * outputs for _, inputs, outputs in linear_modules(stack.layers))
    if head is None or not weights:
        raise PilotError(f"the {'decoder layers have' if head else 'unembedding has'} no linear module")
    _, width, vocabulary = head
    return width, width * vocabulary * stack.num_layers / weights


def affordable_rows(rows: Sequence[Row], *, seed: int) -> list[int]:
    """Indices of the rows to train on or to hold out, as many as `MOST_TOKENS` allows, in a drawn order.

    Raises:
        PilotError: there are too few.
    """
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    tokens = np.cumsum([len(rows[row].input_ids) for row in order])
    chosen: list[int] = order[: int(np.searchsorted(tokens, MOST_TOKENS, side="right"))]
    if len(chosen) < LEAST_ROWS:
        raise PilotError(
            f"{len(chosen)} calibration rows of at most {MOST_TOKENS} tokens together are too few, at least "
            f"{LEAST_ROWS} are needed: raise num_samples, or lower sequence_len"
        )
    return chosen


def _unembedded(rows: Sequence[Row]) -> float:
    """The share of positions from the first scored one of a row on, which are unembedded."""
    first = [next(place for place, label in enumerate(row.labels) if label != IGNORED) for row in rows]
    return 1 - sum(first) / sum(len(row.labels) for row in rows)


def run_pilot(
    model: nn.Module,
    stack: DecoderStack,
    rows: Sequence[Row],
    *,
    settings: PilotSettings,
    seed: int,
    batch_tokens: int,
    autocast: torch.dtype | None = None,
) -> Pilot:
    """Measure on this model and data how much a suffix keeps.

    Args:
        model: before adapters; left as it was found, to the last bit.
        rows: the calibration sample.
        settings: of the run.
        seed: of the split, the adapters and the order of rows.
        batch_tokens: padded tokens in one forward pass.

    Raises:
        PilotError: it does not pay, or this model or data cannot be piloted.
    """
    if stack.num_layers == 1:
        raise PilotError("one decoder layer leaves nothing to choose")
    if autocast is torch.float16 or next(model.parameters()).dtype is torch.float16:
        raise PilotError("small gradients vanish in float16; use bf16")
    chosen = affordable_rows(rows, seed=seed)
    width, head_layers = head_size(stack)
    # A backward pass to inputs alone is about one forward pass, one to weights as well two; recomputing is another.
    step_passes = 2.0 + settings.checkpointing
    work = Work(
        num_layers=stack.num_layers,
        head_layers=head_layers,
        rows=len(chosen),
        row_tokens=float(np.mean([len(rows[row].input_ids) for row in chosen])),
        step_passes=step_passes,
        unembedded=_unembedded([rows[row] for row in chosen]) if takes_positions(model) else 1.0,
    )
    run_cost = settings.run_tokens * (step_passes if settings.adapters else step_passes + 1)
    size = pilot_size(settings.share * run_cost, work)
    if size is None:
        least = round(least_cost(work) / run_cost + 5e-4, 3)
        way = f"raise pilot_share to {least:.3f} to have one" if least <= 1 else f"the smallest costs {least:.3f} of it"
        raise PilotError(
            f"a run of {settings.run_tokens:,.0f} tokens is too short for a pilot that costs {settings.share:g} of it: "
            f"{way}"
        )
    started = time.perf_counter()
    while True:
        trainer = Trainer(
            model=model,
            stack=stack,
            rows=rows,
            train=sorted(chosen[size.heldout_rows :]),
            heldout=sorted(chosen[: size.heldout_rows]),
            rows_per_step=size.rows_per_step,
            batch_tokens=batch_tokens,
            checkpointing=settings.checkpointing,
        )
        try:
            with left_as_found(model, autocast=autocast), frozen(model), _uncached(autocast, trainer.device):
                found = _train_arms(trainer, size, size.cost / run_cost, usual_rate(width), seed=seed, say=settings.say)
            break
        except (RuntimeError, MemoryError) as error:
            longest = max(len(rows[row].input_ids) for row in chosen)
            if isinstance(error, PilotError) or not out_of_memory(error):
                raise
            if batch_tokens <= longest:
                raise PilotError(f"a row of {longest} tokens alone is too much for the memory") from error
            batch_tokens //= 2
            settings.say(f"out of memory; the pilot starts again with {batch_tokens} tokens at a time")
    settings.say(f"pilot of {size.steps} steps done in {time.perf_counter() - started:.0f} s")
    return found


def _uncached(autocast: torch.dtype | None, device: torch.device) -> AbstractContextManager[object]:
    """Autocast keeps its copies of weights until its outermost block ends, and so would miss every optimizer step."""
    return nullcontext() if autocast is None else torch.autocast(device.type, dtype=autocast, cache_enabled=False)


def _train_arms(
    trainer: Trainer, size: Size, cost_share: float, usual: float, *, seed: int, say: Callable[[str], None]
) -> Pilot:
    """A sixth of the layers, a half, then all of them, at rates that follow from the first step of the sixth."""
    layers = trainer.stack.num_layers
    sixth, cuts = pilot_cut(layers), switched_off_cuts(layers)
    for cut in cuts:
        trainer.keep_states(cut, trainer.heldout)
    used = list(dict.fromkeys(row for step in trainer.order(size.steps, seed) for row in step))
    parts = [half_cut(layers), sixth] if size.with_half else [sixth]
    for cut in parts:
        trainer.keep_states(cut, used)
    base_H = trainer.heldout_losses(sixth)
    _check_start(trainer, base_H)
    scored = sum(trainer.rows[row].scored for row in trainer.heldout)
    usual = _rate_here(trainer, base_H, sixth, usual, seed=seed, say=say)

    def train(cut: int, judged_from: Sequence[int] = ()) -> tuple[Arm, list[Array]]:
        rate = usual * rate_ratio(cut, layers)
        losses_H, *off = trainer.trained(cut, learning_rate=rate, steps=size.steps, seed=seed, judged_from=judged_from)
        say(
            f"pilot, layers {cut} to {layers - 1} at rate {rate:.2g}: "
            f"{base_H.sum() / scored:.3f} to {losses_H.sum() / scored:.3f} nats"
        )
        return Arm(cut, rate, losses_H), off

    trained = [train(cut)[0] for cut in parts]
    whole, off = train(0, cuts)
    return result_of(
        base_H,
        whole,
        trained,
        dict(zip(cuts, off, strict=True)),
        scored=scored,
        size=size,
        rows=len(used),
        cost_share=cost_share,
        seed=seed,
    )


def _rate_here(
    trainer: Trainer, base_H: Array, cut: int, usual: float, *, seed: int, say: Callable[[str], None]
) -> float:
    """The rate of all layers for this model and data, from how far the first step of layers cut..L-1 may go."""
    lengths = [times * usual * rate_ratio(cut, trainer.stack.num_layers) for times in FIRST_STEPS]
    judges = trainer.heldout[:FIRST_STEP_ROWS]
    after = trainer.after_first_step(cut, lengths, seed=seed, indices=judges)
    gained = [float(base_H[: len(judges)].sum() - losses_H.sum()) for losses_H in after]
    rate = usual * first_step_factor(dict(zip(FIRST_STEPS, gained, strict=True)))
    say(f"pilot, rate by the first step {rate:.2g} (by the hidden size alone {usual:.2g})")
    return rate


def _check_start(trainer: Trainer, base_H: Array) -> None:
    """A training that starts at a cut must compute what the whole model computes."""
    some = trainer.heldout[:4]
    whole, started = trainer.heldout_losses(0, some), base_H[: len(some)]
    if not np.allclose(whole, started, rtol=0.02):
        raise PilotError(
            f"layers that start from stored states compute another loss than the whole model ({started.sum():.4g} and "
            f"{whole.sum():.4g} nats over {len(some)} rows)"
        )
