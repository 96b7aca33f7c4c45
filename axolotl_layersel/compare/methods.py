"""Which cut every method would choose on the same sample, what finding it costs, and how far the methods agree.

Ours with each deviation, SALF's as read here, the signals of `other_signals.py`, fixed shares of the layers. All
weights go through the policy of the run. The first row is the run's own choice, which the others are compared with.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from rich import box
from rich.table import Table
from torch import nn

from axolotl_layersel.compare import other_signals
from axolotl_layersel.compare.other_signals import SignalError
from axolotl_layersel.method.calibration import Row
from axolotl_layersel.method.gain import descent, transition_gain
from axolotl_layersel.method.retention import RetentionLaw, family_of, forward_law, unlike_the_known
from axolotl_layersel.method.scoring_pass import measure
from axolotl_layersel.method.selection import select_cut
from axolotl_layersel.model.decoder_stack import DecoderStack, find_stack
from axolotl_layersel.model.latent_states import left_as_found

Array = NDArray[np.float64]
DEVIATIONS = ("cosine", "logit_lens")
TRANSITION = "transition"
GRADIENT, RELATIVE = "gradient norm", "relative gradient norm"
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
    run: float | None = None  # the same for the whole run with its prefix cache; None where it has none
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
        return select_cut(
            policy=self.policy,
            retention_L=law.low(weight_L),
            gain_L=weight_L,
            coverage=self.coverage,
            budget=self.budget,
            min_layers=self.min_layers,
        )


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
    run_of_cut: Sequence[float] | None = None,
) -> list[Choice]:
    """The choices of all methods, the run's own first, each as far as the forward pass alone knows: no pilot is run.

    Args:
        model: as it will be trained, before adapters; left as it was found.
        rows: the calibration sample.
        deviation: of the run.
        seed: of the random weights.
        step_of_cut: predicted step ratio of every cut 0..L-1, where known.
        run_of_cut: the same for the whole run with a prefix cache.

    Raises:
        StackError, ScoringError, ValueError: the run's own method cannot score this model.
    """
    stack = find_stack(model)
    with left_as_found(model, autocast=autocast):
        found, loss = _ours(model, stack, rows, batch_tokens=batch_tokens)
        found += _rivals(model, stack, rows, seed=seed, batch_tokens=batch_tokens)
    own_name = TRANSITION if rule.policy == "peak_gain" else f"{deviation}, descent"
    found.sort(key=lambda choice: choice.method != own_name)  # stable: the run's own comes first
    for share in FIXED_SHARES:
        kept = max(round(share * stack.num_layers), 1)
        found.append(Choice(f"last {kept} layers", "fixed share", stack.num_layers - kept, seconds=0.0))
    unlike = unlike_the_known(loss=loss, num_layers=stack.num_layers, family=family_of(model))
    law = forward_law(loss).widened(unlike)
    own_L = np.asarray(found[0].weight)
    own_kept = stack.num_layers - rule.cut(own_L, law=law)

    def judged(choice: Choice) -> Choice:
        """With its cut, what that costs, and how far it agrees with the run's own choice."""
        cut, correlation = choice.first_trainable, None
        if choice.weight is not None:
            weight_L = np.asarray(choice.weight)
            cut, correlation = rule.cut(weight_L, law=law), spearman(weight_L, own_L)
        if cut is None:
            return choice
        kept = stack.num_layers - cut
        return replace(
            choice,
            first_trainable=cut,
            step=None if step_of_cut is None else step_of_cut[cut],
            run=None if run_of_cut is None else run_of_cut[cut],
            overlap=min(kept, own_kept) / max(kept, own_kept),
            rank_correlation=correlation,
        )

    return [judged(choice) for choice in found]


def _ours(
    model: nn.Module, stack: DecoderStack, rows: Sequence[Row], *, batch_tokens: int
) -> tuple[list[Choice], float]:
    """One forward pass for each deviation, the transitions with the last one; and the loss of the model."""
    found = []
    for deviation in DEVIATIONS:
        started = time.perf_counter()
        statistics = measure(
            model,
            stack,
            rows,
            range(len(rows)),
            deviation=deviation,
            batch_tokens=batch_tokens,
            transitions=deviation == DEVIATIONS[-1],
        )
        seconds = round(time.perf_counter() - started, 3)
        share_L = descent(statistics.mean(statistics.deviation_RS))
        found.append(Choice(f"{deviation}, descent", "layersel", weight=share_L.tolist(), seconds=seconds))
    gain_L = transition_gain(statistics.mean(statistics.miss_RL))  # whatever the deviation
    found.append(Choice(TRANSITION, "SALF, as read here", weight=gain_L.tolist(), seconds=seconds))
    return found, float(statistics.mean(statistics.loss_R[:, None])[0])


def _rivals(
    model: nn.Module, stack: DecoderStack, rows: Sequence[Row], *, seed: int, batch_tokens: int
) -> Iterator[Choice]:
    """Other signals and the controls; one that this model does not allow says why."""

    @cache
    def gradient_norm() -> Array:
        return other_signals.gradient_norm(model, stack, rows)

    signals: list[tuple[str, str, Callable[[], Array]]] = [
        (GRADIENT, "AutoFreeze", gradient_norm),
        (RELATIVE, "Auto-RGN", lambda: other_signals.relative_gradient_norm(stack, gradient_norm())),
        ("weight SNR", "Spectrum", lambda: other_signals.weight_snr(stack)),
        ("block influence", "ShortGPT", lambda: other_signals.block_influence(stack, rows, batch_tokens=batch_tokens)),
        ("1 - CKA", "minibatch CKA", lambda: other_signals.state_change(stack, rows, batch_tokens=batch_tokens)),
        ("random", "control", lambda: other_signals.random_weights(stack.num_layers, seed=seed)),
        ("uniform", "control", lambda: other_signals.equal_weights(stack.num_layers)),
    ]
    spent = {}
    for method, source, signal in signals:
        started = time.perf_counter()
        try:
            weight_L = _shares(signal())
        except SignalError as error:
            yield Choice(method, source, skipped=str(error))
            continue
        spent[method] = time.perf_counter() - started
        if method == RELATIVE:  # on its own it would need the same backward passes
            spent[method] += spent[GRADIENT]
        yield Choice(method, source, weight=weight_L.tolist(), seconds=round(spent[method], 3))


def _shares(weight_L: Array) -> Array:
    if not np.isfinite(weight_L).all() or weight_L.sum() <= 0:
        raise SignalError(f"its weights order no layers: {weight_L.tolist()}")
    return np.asarray(weight_L / weight_L.sum())


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
    costs = ("step", "run") if any(choice.run is not None for choice in choices) else ("step",)
    rich_table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    rich_table.add_column("method", no_wrap=True)
    for name in ("cut", "trained", *costs, "overlap", "rank corr.", "seconds"):
        rich_table.add_column(name, justify="right", no_wrap=True)
    for place, choice in enumerate(choices):
        cut = choice.first_trainable
        rich_table.add_row(
            choice.method,
            "skipped" if cut is None else str(cut),
            "" if cut is None else f"{num_layers - cut}/{num_layers}",
            *(_two_digits(getattr(choice, name)) for name in (*costs, "overlap", "rank_correlation", "seconds")),
            style="bold" if place == 0 else "",
        )
    return rich_table


def _two_digits(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
