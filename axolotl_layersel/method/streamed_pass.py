"""Measure the calibration sample layer by layer, where the model does not fit the device: the scores of `measure`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn

from axolotl_layersel.method.batch_reader import BatchReader, ReadOut
from axolotl_layersel.method.calibration import Batch, Row, batches
from axolotl_layersel.method.scoring_pass import Progress, check_finite, check_tokens, row_too_long
from axolotl_layersel.method.transition import RowStatistics
from axolotl_layersel.model.decoder_stack import DecoderStack
from axolotl_layersel.model.layer_by_layer import LayerByLayer, run_layers
from axolotl_layersel.model.memory import TooLargeError
from axolotl_layersel.model.verify_layers import Proof, read_out_here


def measure_streamed(
    model: nn.Module,
    stack: DecoderStack,
    rows: Sequence[Row],
    indices: Sequence[int],
    *,
    way: LayerByLayer,
    deviation: str,
    batch_tokens: int,
    transitions: bool = False,
    progress: Progress = lambda rows, tokens: None,
) -> RowStatistics:
    """Statistics of `rows[indices]`, equal to those of `scoring_pass.measure`; the other arguments are described there.

    Args:
        rows: the same on all processes; the first of them proves the stack.
        indices: of this process, perhaps none.
        way: to the layers.
        progress: called after each layer with the share of rows and tokens that the work done so far stands for.

    Raises:
        StackError: the layers of this model cannot be run one by one.
        ScoringError: the model or a row gives numbers from which no layer can be selected.
    """
    check_tokens(rows, indices, stack)
    tokens = sum(len(rows[index].input_ids) for index in indices)
    way = dataclasses.replace(way, passed=lambda share: progress(int(share * len(indices)), int(share * tokens)))
    parts = [RowStatistics.empty(stack.num_layers)]
    with read_out_here(stack, way.device):
        proof = Proof(model, stack, input_ids=torch.tensor([rows[0].input_ids[:64]]), way=way)
        read_out = ReadOut.of(stack, deviation=deviation, transitions=transitions)

        def enter(batch: Batch | Proof) -> BatchReader | Proof:
            return batch if isinstance(batch, Proof) else BatchReader(read_out, batch.to(way.device))

        drawn: list[Batch | Proof] = [proof, *batches(rows, indices, batch_tokens=batch_tokens)]
        try:
            for _, reader in run_layers(stack, drawn, way=way, enter=enter, as_tuple=proof.as_tuple):
                if isinstance(reader, BatchReader):
                    parts.append(reader.finish())
                    check_finite(parts[-1], model, rows)
        except TooLargeError as error:
            raise row_too_long(error, way.device) from error
    return RowStatistics.merge(parts)
