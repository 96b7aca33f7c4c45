"""The method on one page: rows -> latent states -> deviations -> gains -> a suffix of layers.

    find the decoder stack; prove that norm and unembedding reproduce the logits     decoder_stack.py, verify_stack.py
    the semantics of the labels: bases in latent space                                              label_semantics.py
    one forward pass over the calibration sample, state by state                   scoring_pass.py, latent_states.py
        how far is each state from the semantics of its label, and how much of each
        layer's factual transition misses the virtual one                                           transition.py
    deviations -> weights -> predicted retention of every suffix -> gain of every layer             gain.py
    policy, coverage, budget -> the cut, and how stable it is over rows                             selection.py

Sources and what is our own: the docstrings there. Nothing here knows axolotl.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from axolotl_layersel.method import gain as gains
from axolotl_layersel.method import selection
from axolotl_layersel.method.calibration import Row
from axolotl_layersel.method.scoring_pass import Progress, measure
from axolotl_layersel.method.transition import RowStatistics
from axolotl_layersel.model.decoder_stack import find_stack
from axolotl_layersel.model.latent_states import left_as_found
from axolotl_layersel.plan import Scores

Together = Callable[[Callable[[], RowStatistics]], list[RowStatistics]]  # do it everywhere, get everybody's result


@dataclass(frozen=True)
class ScoredCut:
    """The cut that the scores choose."""

    first_trainable: int  # k
    scores: Scores
    notes: tuple[str, ...] = ()  # what the user should know about this choice


def score_layers(
    model: nn.Module,
    rows: Sequence[Row],
    *,
    deviation: str = "cosine",
    gain: str = "transition",
    policy: str = "coverage",
    coverage: float = 0.95,
    budget: int | float = 1.0,
    min_layers: int = 1,
    seed: int = 42,
    batch_tokens: int = 4096,
    autocast: torch.dtype | None = None,
    share: tuple[int, int] = (0, 1),
    together: Together = lambda work: [work()],
    progress: Progress = lambda rows, tokens: None,
) -> ScoredCut:
    """Score every decoder layer on `rows` and choose the suffix to train.

    Args:
        model: a causal language model as transformers loads it, quantised or not, on the device to run on.
        rows: the calibration sample, the same on every process.
        deviation, gain, policy, coverage, budget, min_layers: see `args.LayerSelOptions`.
        seed: of the bootstrap.
        batch_tokens: padded tokens in one forward pass.
        autocast: the trainer's autocast dtype, None for full precision.
        share: (rank, world size); this process runs rows rank, rank + world size, ...
        together: does the measuring on all processes and collects what they measured, or the error of one.
        progress: called after each batch with the rows and tokens done here.

    Raises:
        StackError, ScoringError, ValueError: the run must stop; nothing was changed.
    """
    stack = find_stack(model)
    selection.most_layers(budget, num_layers=stack.num_layers, min_layers=min_layers)
    mine = range(share[0], len(rows), share[1])
    with left_as_found(model, autocast=autocast):
        parts = together(
            lambda: measure(model, stack, rows, mine, deviation=deviation, batch_tokens=batch_tokens, progress=progress)
        )
    statistics = RowStatistics.merge(parts)

    def curves(counts_BR: Any = None) -> tuple[Any, Any]:
        weight = gains.layer_weights(
            gain,
            deviation_S=statistics.mean(statistics.deviation_RS, counts_BR),
            miss_L=statistics.mean(statistics.miss_RL, counts_BR),
        )
        return weight, gains.retention(weight, exponent=gains.RETENTION_EXPONENT)

    def choose(weight_L: Any, retention_L: Any) -> int:
        return selection.select_cut(
            policy=policy,
            weight_L=weight_L,
            retention_L=retention_L,
            coverage=coverage,
            budget=budget,
            min_layers=min_layers,
        )

    weight_L, retention_L = curves()
    num_rows = len(statistics.rows_R)
    resampled = selection.cuts_of(*curves(selection.bootstrap_counts(num_rows, seed=seed)), choose)
    single = selection.cuts_of(*curves(np.eye(num_rows)), choose)
    cut = choose(weight_L, retention_L)
    stability = {k: count / len(resampled) for k, count in selection.tally(resampled).items()}
    scores = Scores(
        deviation=statistics.mean(statistics.deviation_RS).tolist(),
        deviation_stderr=statistics.stderr(statistics.deviation_RS).tolist(),
        weight=weight_L.tolist(),
        gain=gains.marginal_gain(retention_L).tolist(),
        retention=retention_L.tolist(),
        stability=stability,
        row_cuts=selection.tally(single),
        tokens=int(statistics.tokens_R.sum()),
        loss=float(statistics.mean(statistics.loss_R[:, None])[0]),
    )
    doubts = _doubts(cut, stability, retention_L=retention_L, coverage=coverage, policy=policy)
    return ScoredCut(first_trainable=cut, scores=scores, notes=tuple(doubts))


def _doubts(cut: int, stability: dict[int, float], *, retention_L: Any, coverage: float, policy: str) -> Iterator[str]:
    """Sentences that say why this choice may not hold."""
    if stability.get(cut, 0.0) < 0.5:
        likely = max(stability, key=lambda k: stability[k])
        yield (
            f"the cut at layer {cut} holds in {stability.get(cut, 0.0):.2f} of the bootstrap resamples (layer {likely} "
            f"in {stability[likely]:.2f}): raise num_samples for a cut that depends less on the rows drawn"
        )
    if policy == "coverage" and retention_L[cut] < coverage:
        yield (
            f"budget keeps the cut at layer {cut}, where the predicted retention is {retention_L[cut]:.3f} and "
            f"coverage asks for {coverage}: raise budget to keep the promise"
        )
