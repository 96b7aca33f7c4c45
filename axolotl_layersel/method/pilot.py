"""A pilot: short trainings on the calibration rows that measure how steep retention is for this model and task.

    one sixth of the layers, at a few rates      finds the rate; its best run is the second point of the curve
    half of the layers                           the first point
    all layers                                   what both are shares of

The best rate grows as fewer layers are trained, near to one over the square root of their share (`rate_ratio`), so that
the search runs where it is cheapest. A pilot is shorter than the run it stands for, and a short training leans more
on the layers below the cut: its exponent is `SHORTER` times the run's, as measured.

The pilot costs a given share of the run (`pilot_share`), in tokens times trained layers; where that does not pay for
the smallest one, or the model cannot be piloted, the forward pass alone has to do, with a wider band (`exponent.py`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from axolotl_layersel.method import gain as gains
from axolotl_layersel.method.calibration import Row
from axolotl_layersel.method.exponent import PILOT_FACTOR, SHORTER, Exponent, combined
from axolotl_layersel.method.pilot_training import PilotError, Trainer, frozen
from axolotl_layersel.method.scoring_pass import out_of_memory
from axolotl_layersel.model.decoder_stack import DecoderStack
from axolotl_layersel.model.latent_states import left_as_found
from axolotl_layersel.plan_parts import Pilot, PilotCut

Array = NDArray[np.float64]

HELDOUT = 0.25  # of the rows
LEAST_ROWS = 32
MOST_TOKENS = 65_536  # of all rows: what enters a cut is kept for them
ROWS_PER_STEP = (8, 4)
LEAST_STEPS, MOST_STEPS = 10, 40
MOST_EPOCHS = 2.0
FIRST_RATE, RATE_STEP, MOST_RATES = 2e-3, 3.0, 4  # of adapters on all layers
FORWARD = 1 / 3  # of a forward and backward pass
RESAMPLES = 300


@dataclass(frozen=True)
class PilotSettings:
    """What a pilot needs to know of the run."""

    run_tokens: float  # that this process trains on in the whole run
    share: float = 0.02  # of the run that the pilot may cost
    checkpointing: bool = False  # recompute layers in the backward pass, as the run does
    required: bool = False  # stop where no pilot can be run
    say: Callable[[str], None] = lambda text: None  # told about each training


@dataclass(frozen=True)
class Size:
    """How long a pilot is."""

    steps: int
    rows_per_step: int
    cost: float  # tokens, each through a forward and backward pass of all layers


@dataclass(frozen=True)
class Piloted:
    """What a pilot found."""

    exponent: Exponent  # of the run, not of the pilot
    result: Pilot


def rate_ratio(first_trainable: int, num_layers: int) -> float:
    """The best learning rate of layers k..L-1 over that of all layers: one over the square root of their share.

    Tuned rates of 18 pairs of model and task: 1.4 for half of the layers and 2.9 for the last one of 12 to 30,
    geometric means, where this gives 1.4 and 3.5 to 5.5; it is for cuts that are worth choosing.
    """
    return math.sqrt(num_layers / (num_layers - first_trainable))


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
        least = _least_tokens(row_tokens, len(train), len(heldout)) / settings.share
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
    return _found(
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


@dataclass(frozen=True)
class _Arm:
    """One training."""

    cut: int
    learning_rate: float
    losses_H: Array  # summed cross-entropy of each held-out row


def _train_arms(trainer: Trainer, size: Size, *, seed: int, say: Callable[[str], None]) -> list[_Arm]:
    """Before any training, then the last sixth at its best rate, half and all layers at rates that follow from it."""
    layers = trainer.stack.num_layers
    half, sixth = pilot_cuts(layers)
    for cut in sorted({half, sixth} - {0}):
        trainer.keep_states(cut)
    base = _Arm(layers, 0.0, trainer.heldout_losses(sixth))
    _check_start(trainer, base.losses_H)
    scored = sum(trainer.rows[row].scored for row in trainer.heldout)

    def arm(cut: int, rate: float) -> _Arm:
        losses = trainer.trained(cut, learning_rate=rate * rate_ratio(cut, layers), steps=size.steps, seed=seed)
        say(
            f"pilot, layers {cut} to {layers - 1} at rate {rate * rate_ratio(cut, layers):.2g}: "
            f"{base.losses_H.sum() / scored:.3f} to {losses.sum() / scored:.3f} nats"
        )
        return _Arm(cut, rate * rate_ratio(cut, layers), losses)

    tried: dict[float, _Arm] = {rate: arm(sixth, rate) for rate in (FIRST_RATE, FIRST_RATE * RATE_STEP)}
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


def _found(
    arms: Sequence[_Arm],
    *,
    share_L: Array,
    scored: int,
    size: Size,
    rows: int,
    run_tokens: float,
    seed: int,
    seconds: float,
) -> Piloted:
    base, *trained = arms
    whole = next(arm for arm in trained if arm.cut == 0)
    gained_H = base.losses_H - whole.losses_H
    if not np.isfinite(gained_H).all():
        raise PilotError("training all layers diverged")
    counts_BH = np.random.default_rng(seed).multinomial(
        len(gained_H), np.full(len(gained_H), 1 / len(gained_H)), size=RESAMPLES
    )
    cuts = [arm for arm in trained if arm.cut and np.isfinite(arm.losses_H).all()]
    gained_B = counts_BH @ gained_H
    if gained_H.sum() <= 0 or not cuts or np.mean(gained_B <= 0) > 0.01:
        raise PilotError(
            f"{size.steps} steps did not improve the held-out loss beyond its noise ("
            f"{base.losses_H.sum() / scored:.3f} to {whole.losses_H.sum() / scored:.3f} nats)"
        )
    s_L = gains.still_to_do(share_L)
    places = [arm.cut for arm in cuts]
    kept = np.array([(base.losses_H - arm.losses_H).sum() / gained_H.sum() for arm in cuts])
    kept_B = np.stack([counts_BH @ (base.losses_H - arm.losses_H) / gained_B for arm in cuts], axis=1)
    exponent = fit_exponent(s_L[places], kept)
    resampled = [fit_exponent(s_L[places], row) for row in kept_B]
    noise = math.exp(1.645 * float(np.std(np.log(resampled))))
    # Where one point contradicts the curve through all, the band reaches it: its lower end makes the promise.
    alone = [fit_exponent(s_L[[place]], kept[[at]]) for at, place in enumerate(places)]
    apart = max(max(one / exponent, exponent / one) for one in alone)
    return Piloted(
        exponent=Exponent(exponent / SHORTER, max(combined(PILOT_FACTOR, noise), apart)),
        result=Pilot(
            steps=size.steps,
            rows_per_step=size.rows_per_step,
            rows=rows,
            heldout_rows=len(gained_H),
            base_loss=float(base.losses_H.sum() / scored),
            cuts=[
                PilotCut(
                    first_trainable=arm.cut,
                    learning_rate=arm.learning_rate,
                    loss=float(arm.losses_H.sum() / scored),
                    retention=1.0 if arm.cut == 0 else float(kept[places.index(arm.cut)]),
                    retention_stderr=0.0 if arm.cut == 0 else float(kept_B[:, places.index(arm.cut)].std()),
                )
                for arm in sorted((whole, *cuts), key=lambda arm: arm.cut)
            ],
            exponent=exponent,
            cost_share=size.cost / run_tokens,
            seconds=round(seconds, 3),
        ),
    )


def fit_exponent(left_C: Array, kept_C: Array) -> float:
    """The exponent in [0.005, 5] with the least squares of left ** exponent - kept, by trying 400 of them."""
    tried_G = np.geomspace(0.005, 5.0, 400)
    error_GC = left_C[None] ** tried_G[:, None] - kept_C[None]
    return float(tried_G[np.argmin((error_GC**2).sum(axis=1))])


def _least_tokens(row_tokens: float, train_rows: int, heldout_rows: int) -> float:
    """The cost of the smallest pilot."""
    low, high = 0.0, 1e3 * row_tokens * (train_rows + heldout_rows)
    for _ in range(60):
        middle = (low + high) / 2
        found = pilot_size(middle, row_tokens=row_tokens, train_rows=train_rows, heldout_rows=heldout_rows)
        low, high = (low, middle) if found else (middle, high)
    return high
