"""Measure the calibration sample: one forward pass, its latent states read as they come, sums for each row.

The first batch proves the stack before anything is believed. Out of memory halves the batches and goes on; a row whose
states are not finite stops the run with its number and the likely cause.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from axolotl_layersel.method.batch_reader import BatchReader, ReadOut
from axolotl_layersel.method.calibration import Batch, Row, batches
from axolotl_layersel.method.transition import RowStatistics
from axolotl_layersel.model.decoder_stack import DecoderStack
from axolotl_layersel.model.latent_states import read_states
from axolotl_layersel.model.memory import TooLargeError, halving_batches
from axolotl_layersel.model.verify_stack import prove_stack
from axolotl_layersel.model.weights_here import whole_shape

Progress = Callable[[int, int], None]  # rows done, tokens done


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
    check_tokens(rows, indices, stack)
    read_out = ReadOut.of(stack, deviation=deviation, transitions=transitions)
    parts = [RowStatistics.empty(stack.num_layers)]
    tokens, proved = 0, False

    def measured(batch: Batch) -> RowStatistics:
        nonlocal proved
        if not proved:
            prove_stack(model, stack, input_ids=batch.input_ids[:1, :64].to(device))
            proved = True
        batch = batch.to(device)
        reader = BatchReader(read_out, batch)
        read_states(stack, input_ids=batch.input_ids, attention_mask=batch.attention_mask, reader=reader.read)
        return reader.finish()

    drawn = batches(rows, indices, batch_tokens=batch_tokens)
    try:
        for batch, part in halving_batches(drawn, measured, halves=Batch.halves):
            check_finite(part, model, rows)
            parts.append(part)
            tokens += int(batch.attention_mask.sum())
            progress(sum(len(p.rows_R) for p in parts), tokens)
    except TooLargeError as error:
        raise row_too_long(error, device) from error
    return RowStatistics.merge(parts)


def row_too_long(error: TooLargeError, device: torch.device) -> ScoringError:
    """What to say where memory does not suffice for one row."""
    return ScoringError(
        f"one row of {error.batch.input_ids.shape[1]} tokens alone is too much for the memory of {device} "
        f"({error}); lower sequence_len, or choose the layers by hand with `layersel: {{first_layer: ...}}`"
    )


def check_tokens(rows: Sequence[Row], indices: Sequence[int], stack: DecoderStack) -> None:
    """A GPU would stop at a token that has no embedding with an assertion that names nothing.

    Raises:
        ScoringError: with the row and the token.
    """
    num_embeddings = whole_shape(next(stack.embeddings.parameters()))[0]
    for index in indices:
        largest = max(*rows[index].input_ids, *rows[index].labels)
        if largest >= num_embeddings:
            raise ScoringError(
                f"row {index} of the calibration sample holds the token id {largest}, and the model has "
                f"{num_embeddings} embeddings: the tokenizer is another model's, or its added tokens are not listed in "
                "`tokens:` or `special_tokens:`"
            )


def scoring_bytes(stack: DecoderStack, *, batch_tokens: int) -> int:
    """About what scoring needs beside the weights: a layer's activations, read states, the unembedding's Gram matrix.

    Args:
        batch_tokens: padded tokens in one forward pass.
    """
    embeddings = next(stack.embeddings.parameters())
    hidden, itemsize = whole_shape(embeddings)[-1], max(2, embeddings.itemsize)
    sizes = [getattr(m, name, 0) for m in stack.layers[0].modules() for name in ("in_features", "out_features")]
    widest = max(4 * hidden, *(size for size in sizes if isinstance(size, int)))
    return batch_tokens * (6 * widest * itemsize + 4 * hidden * 4) + 8 * hidden * (2 * hidden + 4_096) + 2**27


def check_finite(part: RowStatistics, model: nn.Module, rows: Sequence[Row]) -> None:
    """Stop at rows whose states are not finite, and say why they may not be.

    Raises:
        ScoringError: with the rows.
    """
    finite_R = np.isfinite(part.deviation_RS).all(axis=1) & np.isfinite(part.miss_RL).all(axis=1)
    if finite_R.all():
        return
    seen = [(name, p) for name, p in model.named_parameters() if not p.is_meta and p.shape == whole_shape(p)]
    broken = next((name for name, p in seen if not torch.isfinite(p).all()), None)
    at_hand = "all parameters are finite" if len(seen) == len(list(model.parameters())) else "no such parameter is here"
    cause = (
        f"the parameter {broken!r} holds NaN or Inf: check the checkpoint that base_model names"
        if broken
        else f"{at_hand}, so the forward pass overflows: try bf16 instead of fp16, or look at these rows"
    )
    named = ", ".join(f"{rows[i].source} ({i} of the calibration sample)" for i in part.rows_R[~finite_R].tolist())
    raise ScoringError(f"training rows give latent states that are not finite: {named}; {cause}")
