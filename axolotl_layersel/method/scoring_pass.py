"""Measure the calibration sample: one forward pass, its latent states read as they come, sums for each row.

The first batch proves the stack before anything is believed. Out of memory halves the batches and goes on; a row whose
states are not finite stops the run with its number and the likely cause.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from axolotl_layersel.method.calibration import IGNORED, Batch, Row, batches
from axolotl_layersel.method.label_semantics import SemanticBases, semantic_bases, unembedding_weight
from axolotl_layersel.method.transition import (
    Deviation,
    RowStatistics,
    TransitionMeter,
    cosine_deviation,
    logit_lens_loss,
)
from axolotl_layersel.model.decoder_stack import DecoderStack
from axolotl_layersel.model.latent_states import read_states
from axolotl_layersel.model.memory import TooLargeError, halving_batches
from axolotl_layersel.model.verify_stack import prove_stack

Progress = Callable[[int, int], None]  # rows done, tokens done


_LOGITS = 2**24  # at once: 16 M logits are 64 MB in float32


class ScoringError(ValueError):
    """The model or a row gives numbers from which no layer can be selected."""


def measure(
    model: nn.Module,
    stack: DecoderStack,
    rows: Sequence[Row],
    indices: Sequence[int],
    *,
    deviation: str,
    batch_tokens: int,
    transitions: bool = False,
    progress: Progress = lambda rows, tokens: None,
) -> RowStatistics:
    """Statistics of `rows[indices]` from one forward pass each; out of memory halves the batch and goes on.

    Without `transitions` the layers' moves are not held against the virtual ones, and their sums are zero.
    """
    device = next(stack.embeddings.parameters()).device
    _check_tokens(rows, indices, num_embeddings=next(stack.embeddings.parameters()).shape[0])
    bases = semantic_bases(unembedding_weight(stack.head))
    norm = copy.deepcopy(stack.final_norm).float()  # read in float32 whatever the model's dtype
    of_states = _deviation(deviation, bases)
    parts = [RowStatistics.empty(stack.num_layers)]
    tokens, proved = 0, False

    def measured(batch: Batch) -> RowStatistics:
        nonlocal proved
        if not proved:
            prove_stack(model, stack, input_ids=batch.input_ids[:1, :64].to(device))
            proved = True
        return _measure_batch(
            stack, batch.to(device), bases=bases, norm=norm, deviation=of_states, transitions=transitions
        )

    drawn = batches(rows, indices, batch_tokens=batch_tokens)
    try:
        for batch, part in halving_batches(drawn, measured, halves=Batch.halves):
            _check_finite(part, model, rows)
            parts.append(part)
            tokens += int(batch.attention_mask.sum())
            progress(sum(len(p.rows_R) for p in parts), tokens)
    except TooLargeError as error:
        raise ScoringError(
            f"one row of {error.batch.input_ids.shape[1]} tokens alone is too much for the memory of {device} "
            f"({error}); lower sequence_len, or choose the layers by hand with `layersel: {{first_layer: ...}}`"
        ) from error
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
    stack: DecoderStack, batch: Batch, *, bases: SemanticBases, norm: nn.Module, deviation: Deviation, transitions: bool
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
        transitions=transitions,
    )
    last: list[Tensor] = []

    def reader(state: int, hidden_BTD: Tensor) -> None:
        states_ND = _read(norm, hidden_BTD[scored_BT.to(hidden_BTD.device)])
        meter.add(state, states_ND.to(labels_N.device))
        last[:] = [states_ND]

    read_states(stack, input_ids=batch.input_ids, attention_mask=batch.attention_mask, reader=reader)
    return meter.finish(
        rows=list(batch.rows), loss_N=_head_loss(stack.head, last[0], labels_N, vocabulary=len(bases.weight_VD))
    )


def _read(norm: nn.Module, hidden_ND: Tensor) -> Tensor:
    """The representation N(h), in float32 and outside of autocast."""
    parameter = next(norm.parameters(), None)  # some norms have no weights
    with torch.autocast(hidden_ND.device.type, enabled=False):
        states_ND: Tensor = norm(hidden_ND.float() if parameter is None else hidden_ND.to(parameter))
    return states_ND


def _deviation(name: str, bases: SemanticBases) -> Deviation:
    """The state deviation of that name."""
    if name == "cosine":
        return lambda states_ND, labels_N, bases_ND: cosine_deviation(states_ND, bases_ND)
    if name == "logit_lens":
        return lambda states_ND, labels_N, bases_ND: logit_lens_loss(states_ND, labels_N, bases.weight_VD)
    raise ValueError(f"deviation is {name!r}; allowed are cosine, logit_lens")


def _head_loss(head: nn.Module, states_ND: Tensor, labels_N: Tensor, *, vocabulary: int) -> Tensor:
    """Cross-entropy (nats) of the unembedding's own logits, (N,) float32: in its precision, a few tokens at a time."""
    weight = next(head.parameters())
    dtype = weight.dtype if weight.is_floating_point() else states_ND.dtype  # a 4-bit head is stored as integers
    some = max(1, _LOGITS // vocabulary)
    return torch.cat(
        [
            F.cross_entropy(head(states_nD.to(weight.device, dtype)).float(), labels_n, reduction="none")
            for states_nD, labels_n in zip(states_ND.split(some), labels_N.to(weight.device).split(some), strict=True)
        ]
    )


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
