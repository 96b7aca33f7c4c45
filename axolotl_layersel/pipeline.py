"""The method on one page: rows -> latent states -> deviations -> gains -> a suffix of layers.

    find the decoder stack; prove that final norm and unembedding reproduce the model's logits     stack.py
    the semantics of the labels: bases in latent space                                              semantics.py
    one forward pass over the calibration sample, state by state                                    trace.py
        how far is each state from the semantics of its label, and how much of each
        layer's factual transition misses the virtual one                                           transition.py
    deviations -> weights -> predicted retention of every suffix -> gain of every layer             gain.py
    policy, coverage, budget -> the cut, and how stable it is over rows                             selection.py

Sources and what is our own: the docstrings there. Nothing here knows axolotl.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from axolotl_layersel import gain as gains
from axolotl_layersel import selection
from axolotl_layersel.calibration import IGNORED, Batch, Row, batches
from axolotl_layersel.semantics import SemanticBases, semantic_bases, unembedding_weight
from axolotl_layersel.stack import DecoderStack, find_stack, prove_stack
from axolotl_layersel.trace import left_as_found, read_states
from axolotl_layersel.transition import (
    Deviation,
    RowStatistics,
    TransitionMeter,
    cosine_deviation,
    fit_temperature,
    logit_lens_loss,
    semantic_loss,
)

LOG = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # rows done, tokens done
Together = Callable[[Callable[[], RowStatistics]], list[RowStatistics]]  # do it everywhere, get everybody's result


class ScoringError(ValueError):
    """The model or a row gives numbers from which no layer can be selected."""


@dataclass(frozen=True)
class Scores:
    """What one scoring pass found. Lists are by decoder layer (L) or latent state (L + 1), input side first."""

    first_trainable: int  # k
    deviation: list[float]  # L + 1
    deviation_stderr: list[float]  # L + 1, rows as the independent units
    weight: list[float]  # L, sum 1
    gain: list[float]  # L, sum 1
    retention: list[float]  # L, entry 0 is 1
    stability: dict[int, float]  # cut -> share of bootstrap resamples
    row_cuts: dict[int, int]  # cut -> number of single rows
    tokens: int  # scored tokens
    loss: float  # cross-entropy of softmax(W r_L) before training, nats per token; no logit scale, soft-cap or bias
    notes: tuple[str, ...] = ()  # what the user should know about this choice


def score_layers(
    model: nn.Module,
    rows: Sequence[Row],
    *,
    deviation: str = "cosine",
    gain: str = "remaining",
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
) -> Scores:
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
    return Scores(
        first_trainable=cut,
        deviation=statistics.mean(statistics.deviation_RS).tolist(),
        deviation_stderr=statistics.stderr(statistics.deviation_RS).tolist(),
        weight=weight_L.tolist(),
        gain=gains.marginal_gain(retention_L).tolist(),
        retention=retention_L.tolist(),
        stability=stability,
        row_cuts=selection.tally(single),
        tokens=int(statistics.tokens_R.sum()),
        loss=float(statistics.mean(statistics.loss_R[:, None])[0]),
        notes=tuple(_doubts(cut, stability, retention_L=retention_L, coverage=coverage, policy=policy)),
    )


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


def measure(
    model: nn.Module,
    stack: DecoderStack,
    rows: Sequence[Row],
    indices: Sequence[int],
    *,
    deviation: str,
    batch_tokens: int,
    progress: Progress = lambda rows, tokens: None,
) -> RowStatistics:
    """Statistics of `rows[indices]` from one forward pass each; out of memory halves the batch and goes on."""
    device = next(stack.embeddings.parameters()).device
    _check_tokens(rows, indices, num_embeddings=next(stack.embeddings.parameters()).shape[0])
    bases = semantic_bases(unembedding_weight(stack.head))
    norm = copy.deepcopy(stack.final_norm).float()  # read in float32 whatever the model's dtype
    pending = list(batches(rows, indices, batch_tokens=batch_tokens))
    common = next(batches(rows, range(len(rows)), batch_tokens=batch_tokens))  # the same on every process
    parts = [RowStatistics.empty(stack.num_layers)]
    tokens = 0
    measured = None
    while pending:
        batch = pending.pop(0)
        try:
            on_device = batch.to(device)
            if measured is None:
                prove_stack(model, stack, input_ids=on_device.input_ids[:1, :64])
                measured = _deviation(deviation, stack, common.to(device), bases=bases, norm=norm)
            part = _measure_batch(stack, on_device, bases=bases, norm=norm, deviation=measured)
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            if len(batch.rows) == 1:
                raise ScoringError(
                    f"one row of {batch.input_ids.shape[1]} tokens alone is too much for the memory of {device} "
                    f"({error}); lower sequence_len, or choose the layers by hand with `layersel: {{first_layer: ...}}`"
                ) from error
            LOG.warning("out of memory with %d rows in a batch; scoring goes on with half of them", len(batch.rows))
            pending = [half for b in (batch, *pending) for half in b.halves()]
            common = common.halves()[0]
            continue
        _check_finite(part, model, rows)
        parts.append(part)
        tokens += int(batch.attention_mask.sum())
        progress(sum(len(p.rows_R) for p in parts), tokens)
    return RowStatistics.merge(parts)


def _check_tokens(rows: Sequence[Row], indices: Sequence[int], *, num_embeddings: int) -> None:
    """A GPU would stop at such a token with an assertion that names nothing."""
    for index in indices:
        largest = max(*rows[index].input_ids, *rows[index].labels)
        if largest >= num_embeddings:
            raise ScoringError(
                f"row {index} of the calibration sample holds the token id {largest}, and the model has "
                f"{num_embeddings} embeddings: the tokenizer is another model's, or its added tokens are not listed in "
                "`tokens:` or `special_tokens:`"
            )


def _measure_batch(
    stack: DecoderStack, batch: Batch, *, bases: SemanticBases, norm: nn.Module, deviation: Deviation
) -> RowStatistics:
    scored_BT = batch.targets != IGNORED
    labels_N = batch.targets[scored_BT]
    meter = TransitionMeter(
        num_layers=stack.num_layers,
        labels_N=labels_N,
        rows_N=scored_BT.nonzero()[:, 0],
        num_rows=len(batch.rows),
        bases_ND=bases.of(labels_N),
        deviation=deviation,
    )
    last: list[Tensor] = []

    def reader(state: int, hidden_BTD: Tensor) -> None:
        states_ND = _read(norm, hidden_BTD[scored_BT.to(hidden_BTD.device)])
        meter.add(state, states_ND.to(labels_N.device))
        last[:] = [states_ND]

    read_states(stack, input_ids=batch.input_ids, attention_mask=batch.attention_mask, reader=reader)
    with torch.autocast(labels_N.device.type, enabled=False):
        loss_N = logit_lens_loss(last[0].to(labels_N.device), labels_N, bases.weight_VD)
    return meter.finish(rows=list(batch.rows), loss_N=loss_N)


def _read(norm: nn.Module, hidden_ND: Tensor) -> Tensor:
    """The representation N(h), in float32 and outside of autocast."""
    parameter = next(norm.parameters())
    with torch.autocast(hidden_ND.device.type, enabled=False):
        states_ND: Tensor = norm(hidden_ND.to(parameter))
    return states_ND


def _deviation(name: str, stack: DecoderStack, batch: Batch, *, bases: SemanticBases, norm: nn.Module) -> Deviation:
    """The state deviation of that name; `semantic_loss` fits its temperature on the last space of this batch."""
    if name == "cosine":
        return lambda states_ND, labels_N, bases_ND: cosine_deviation(states_ND, bases_ND)
    if name == "logit_lens":
        return lambda states_ND, labels_N, bases_ND: logit_lens_loss(states_ND, labels_N, bases.weight_VD)
    if name != "semantic_loss":
        raise ValueError(f"deviation is {name!r}; allowed are cosine, semantic_loss, logit_lens")
    unit_bases_VD = F.normalize(bases.all(), dim=-1)
    scored_BT = batch.targets != IGNORED
    last: list[Tensor] = []

    def reader(state: int, hidden_BTD: Tensor) -> None:
        if state == stack.num_layers:
            last.append(_read(norm, hidden_BTD[scored_BT]))

    read_states(stack, input_ids=batch.input_ids, attention_mask=batch.attention_mask, reader=reader)
    temperature = fit_temperature(last[0], batch.targets[scored_BT], unit_bases_VD)
    return lambda states_ND, labels_N, bases_ND: semantic_loss(
        states_ND, labels_N, unit_bases_VD, temperature=temperature
    )


def _out_of_memory(error: Exception) -> bool:
    """Whether memory ran out; for the CPU and for cuBLAS, torch says so only in words."""
    words = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED", "bad_alloc")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error) for word in words)


def _check_finite(part: RowStatistics, model: nn.Module, rows: Sequence[Row]) -> None:
    finite_R = np.isfinite(part.deviation_RS).all(axis=1) & np.isfinite(part.miss_RL).all(axis=1)
    if finite_R.all():
        return
    broken = next((name for name, p in model.named_parameters() if not torch.isfinite(p).all()), None)
    cause = (
        f"the parameter {broken!r} holds NaN or Inf: check the checkpoint that base_model names"
        if broken
        else "all parameters are finite, so the forward pass overflows: try bf16 instead of fp16, or look at these rows"
    )
    named = ", ".join(f"{rows[i].source} ({i} of the calibration sample)" for i in part.rows_R[~finite_R].tolist())
    raise ScoringError(f"training rows give latent states that are not finite: {named}; {cause}")
