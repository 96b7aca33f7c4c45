"""Read the latent states of one batch: how far each is from the semantics of its labels, as sums for each row."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from axolotl_layersel.method.calibration import IGNORED, Batch
from axolotl_layersel.method.label_semantics import SemanticBases, semantic_bases, unembedding_weight
from axolotl_layersel.method.transition import (
    Deviation,
    RowStatistics,
    TransitionMeter,
    cosine_deviation,
    logit_lens_loss,
)
from axolotl_layersel.model.decoder_stack import DecoderStack

_LOGITS = 2**24  # at once: 16 M logits are 64 MB in float32


@dataclass(frozen=True)
class ReadOut:
    """How the states of a model are read; its final norm and unembedding are on the device that computes."""

    stack: DecoderStack
    bases: SemanticBases
    norm: nn.Module  # a float32 copy, whatever the model's dtype
    deviation: Deviation
    transitions: bool  # whether the layers' moves are held against the virtual ones; else their sums are zero

    @staticmethod
    def of(stack: DecoderStack, *, deviation: str, transitions: bool) -> ReadOut:
        """Prepare it for a model; O(V D^2).

        Raises:
            ValueError: the unembedding has no semantics, or there is no deviation of that name.
        """
        bases = semantic_bases(unembedding_weight(stack.head))
        norm = copy.deepcopy(stack.final_norm).float()
        return ReadOut(stack, bases, norm, _deviation(deviation, bases), transitions)


class BatchReader:
    """Reads the states 0..L of a batch as they come. Keeps one state of its scored tokens, where moves are measured.

    Args:
        read_out: of the model.
        batch: on the device that computes.
    """

    def __init__(self, read_out: ReadOut, batch: Batch) -> None:
        self._read_out, self._batch = read_out, batch
        self._scored_BT = batch.targets != IGNORED
        self._labels_N = batch.targets[self._scored_BT]
        self._meter = TransitionMeter(
            num_layers=read_out.stack.num_layers,
            labels_N=self._labels_N,
            rows_N=self._scored_BT.nonzero()[:, 0],
            num_rows=len(batch.rows),
            bases_ND=read_out.bases.of(self._labels_N),
            deviation=read_out.deviation,
            transitions=read_out.transitions,
        )
        self._loss_N: Tensor | None = None

    def read(self, state: int, hidden_BTD: Tensor) -> None:
        """Measure latent state `state`; they come in order, each once."""
        states_ND = _read(self._read_out.norm, hidden_BTD[self._scored_BT.to(hidden_BTD.device)])
        self._meter.add(state, states_ND.to(self._labels_N.device))
        if state == self._read_out.stack.num_layers:
            vocabulary = len(self._read_out.bases.weight_VD)
            self._loss_N = _head_loss(self._read_out.stack.head, states_ND, self._labels_N, vocabulary=vocabulary)

    def to(self, device: torch.device) -> None:
        """Move what is kept between two states."""
        self._meter.to(device)

    @property
    def nbytes(self) -> int:
        """Of what is kept between two states."""
        return self._meter.nbytes

    def finish(self) -> RowStatistics:
        """The sums of this batch, when all states were read."""
        assert self._loss_N is not None, "the last state was not read"
        return self._meter.finish(rows=list(self._batch.rows), loss_N=self._loss_N)


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
