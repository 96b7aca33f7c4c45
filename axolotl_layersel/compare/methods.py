"""Which cut every method would choose on the same sample, what finding it costs, and how far the methods agree.

Ours with each deviation, SALF's as read here, the signals of `other_signals.py`, fixed shares of the layers. All
weights go through the policy of the run. The first row is the run's own choice, which the others are compared with.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich import box
from rich.table import Table
from torch import nn

from axolotl_layersel.compare import other_signals as baselines
from axolotl_layersel.compare.other_signals import BaselineError
from axolotl_layersel.method import gain as gains
from axolotl_layersel.method import selection
from axolotl_layersel.method.calibration import Row
from axolotl_layersel.method.retention import RetentionLaw, family_of, forward_law, unlike_the_known
from axolotl_layersel.method.scoring_pass import measure
from axolotl_layersel.model.decoder_stack import DecoderStack, find_stack
from axolotl_layersel.model.latent_states import left_as_found

Array = NDArray[np.float64]
DEVIATIONS = ("cosine", "logit_lens")
UNIFORM = "uniform"
TRANSITION = "transition"
RELATIVE = "relative gradient norm"
FIXED_SHARES = (0.25, 0.5, 0.75)  # of the layers, at the output side: what people choose without a tool


@dataclass(frozen=True)
class Choice:
    """What one method chooses; None where it has no such thing."""

    method: str
    source: str
    first_trainable: int | None = None  # k
    weight: list[float] | None = None  # L, sum 1
    seconds: float | None = None  # to find the weights
    step: float | None = None  # predicted cost of a training step, as a ratio to training every layer
    overlap: float | None = None  # layers trained by both over layers trained by either, with the run's own choice
    rank_correlation: float | None = None  # Spearman's, of the weights with the run's own
    skipped: str | None = None  # why this method chose nothing


@dataclass(frozen=True)
class Rule:
    """How weights become a cut: the options of the run."""

    policy: str
    coverage: float
    budget: int | float
    min_layers: int

    def cut(self, weight_L: Array, *, law: RetentionLaw) -> int:
        """The first trainable layer for weights that sum to 1."""
        return selection.select_cut(
            policy=self.policy,
            retention_L=law.low(weight_L),
            gain_L=weight_L,
            coverage=self.coverage,
            budget=self.budget,
            min_layers=self.min_layers,
        )


@dataclass(frozen=True)
class _Found:
    """The weights of one method, or why it has none."""

    method: str
    source: str
    weight_L: Array | None
    seconds: float = 0.0
    skipped: str | None = None


def compare_methods(
    model: nn.Module,
    rows: Sequence[Row],
    *,
    deviation: str,
    rule: Rule,
    seed: int,
    batch_tokens: int = 4096,
    autocast: torch.dtype | None = None,
    step_of_cut: Sequence[float] | None = None,
) -> list[Choice]:
    """The choices of all methods, the run's own first, each as far as the forward pass alone knows: no pilot is run.

    Args:
        model: as it will be trained, before adapters.
        rows: the calibration sample.
        deviation: of the run.
        seed: of the random weights.
        step_of_cut: predicted step ratio of every cut 0..L-1, where known.

    Raises:
        StackError, ScoringError, ValueError: the run's own method cannot score this model.
    """
    stack = find_stack(model)
    found, loss = _ours(model, stack, rows, batch_tokens=batch_tokens, autocast=autocast)
    found += _rivals(model, stack, rows, seed=seed, batch_tokens=batch_tokens, autocast=autocast)
    unlike = unlike_the_known(loss=loss, num_layers=stack.num_layers, family=family_of(model))
    law = forward_law(loss).widened(unlike)
    own_name = TRANSITION if rule.policy == "peak_gain" else f"{deviation}, descent"
    found.sort(key=lambda f: f.method != own_name)  # stable: the run's own comes first
    own_L = found[0].weight_L
    assert own_L is not None
    own_cut = rule.cut(own_L, law=law)
    choices = [_choice(f, own_L, rule=rule, law=law) for f in found]
    for share in FIXED_SHARES:
        kept = max(round(share * stack.num_layers), 1)
        choices.append(
            Choice(f"last {kept} layers", "fixed share", first_trainable=stack.num_layers - kept, seconds=0.0)
        )
    return [_completed(c, own_cut, num_layers=stack.num_layers, step_of_cut=step_of_cut) for c in choices]


def _ours(
    model: nn.Module, stack: DecoderStack, rows: Sequence[Row], *, batch_tokens: int, autocast: torch.dtype | None
) -> tuple[list[_Found], float]:
    """One forward pass for each deviation, the transitions with the last one; and the loss of the model."""
    found = []
    for deviation in DEVIATIONS:
        started = time.perf_counter()
        with left_as_found(model, autocast=autocast):
            statistics = measure(
                model,
                stack,
                rows,
                range(len(rows)),
                deviation=deviation,
                batch_tokens=batch_tokens,
                transitions=deviation == DEVIATIONS[-1],
            )
        seconds = time.perf_counter() - started
        share_L = gains.descent(statistics.mean(statistics.deviation_RS))
        found.append(_Found(f"{deviation}, descent", "layersel", share_L, seconds))
    gain_L = gains.transition_gain(statistics.mean(statistics.miss_RL))  # whatever the deviation
    loss = float(statistics.mean(statistics.loss_R[:, None])[0])
    return [*found, _Found(TRANSITION, "SALF, as read here", gain_L, seconds)], loss


def _rivals(
    model: nn.Module,
    stack: DecoderStack,
    rows: Sequence[Row],
    *,
    seed: int,
    batch_tokens: int,
    autocast: torch.dtype | None,
) -> Iterator[_Found]:
    """Other signals and the controls; one that this model does not allow says why."""
    batched: dict[str, Any] = {"batch_tokens": batch_tokens, "autocast": autocast}

    @cache
    def gradient_norm() -> Array:
        return baselines.gradient_norm(model, stack, rows, autocast=autocast)

    gradient_seconds = 0.0
    signals: list[tuple[str, str, Callable[[], Array]]] = [
        ("gradient norm", "AutoFreeze", gradient_norm),
        (RELATIVE, "Auto-RGN", lambda: baselines.relative_gradient_norm(stack, gradient_norm())),
        ("weight SNR", "Spectrum", lambda: baselines.weight_snr(stack)),
        ("block influence", "ShortGPT", lambda: baselines.block_influence(model, stack, rows, **batched)),
        ("1 - CKA", "minibatch CKA", lambda: baselines.state_change(model, stack, rows, **batched)),
        ("random", "control", lambda: baselines.random_weights(stack.num_layers, seed=seed)),
        (UNIFORM, "control", lambda: baselines.equal_weights(stack.num_layers)),
    ]
    for method, source, signal in signals:
        started = time.perf_counter()
        try:
            weight_L = signal()
        except BaselineError as error:
            yield _Found(method, source, None, skipped=str(error))
        else:
            if not np.isfinite(weight_L).all() or weight_L.sum() <= 0:
                yield _Found(method, source, None, skipped=f"its weights order no layers: {weight_L.tolist()}")
                continue
            seconds = time.perf_counter() - started
            if method == "gradient norm":
                gradient_seconds = seconds
            elif method == RELATIVE:  # on its own it would need the same backward passes
                seconds += gradient_seconds
            yield _Found(method, source, weight_L / weight_L.sum(), seconds)


def _choice(found: _Found, own_L: Array, *, rule: Rule, law: RetentionLaw) -> Choice:
    if found.weight_L is None:
        return Choice(found.method, found.source, skipped=found.skipped)
    return Choice(
        found.method,
        found.source,
        first_trainable=rule.cut(found.weight_L, law=law),
        weight=found.weight_L.tolist(),
        seconds=round(found.seconds, 3),
        rank_correlation=spearman(found.weight_L, own_L),
    )


def _completed(choice: Choice, own_cut: int, *, num_layers: int, step_of_cut: Sequence[float] | None) -> Choice:
    """With what follows from the cut alone."""
    if choice.first_trainable is None:
        return choice
    kept, own_kept = num_layers - choice.first_trainable, num_layers - own_cut
    step = None if step_of_cut is None else step_of_cut[choice.first_trainable]
    return replace(choice, overlap=min(kept, own_kept) / max(kept, own_kept), step=step)


def spearman(one_L: Array, other_L: Array) -> float | None:
    """Spearman's rank correlation in [-1, 1], ties at their mean rank; None where one of both is constant."""
    ranks = []
    for values in (one_L, other_L):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts + 1) / 2)[inverse])
    if any(np.ptp(r) == 0 for r in ranks):
        return None
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def table(choices: Sequence[Choice], *, num_layers: int) -> Table:
    """The comparison as a rich table, readable at 80 columns; what was skipped has its reason below."""
    rich_table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    rich_table.add_column("method", no_wrap=True)
    for name in ("cut", "trained", "step", "overlap", "rank corr.", "seconds"):
        rich_table.add_column(name, justify="right", no_wrap=True)
    for place, choice in enumerate(choices):
        cut = choice.first_trainable
        rich_table.add_row(
            choice.method,
            "skipped" if cut is None else str(cut),
            "" if cut is None else f"{num_layers - cut}/{num_layers}",
            *(_two_digits(v) for v in (choice.step, choice.overlap, choice.rank_correlation, choice.seconds)),
            style="bold" if place == 0 else "",
        )
    return rich_table


def _two_digits(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def as_json(choices: Sequence[Choice], **about: Any) -> dict[str, Any]:
    """The comparison as JSON values; `about` comes first."""
    return {**about, "methods": [asdict(choice) for choice in choices]}
