"""Virtual and factual transition, the deviations between them, and their running statistics.

A representation is r_s = N(h_s): the latent state read through the model's final norm, the space where the semantic
bases live (applying N in every space is our choice; SALF does not mention it). From there

    virtual transition  u_s = |r_s| b/|b| - r_s    the ideal move to the semantics b of the label (idea: SALF)
    factual transition  f_i = r_{i+1} - r_i        the move that decoder layer i makes (SALF)

All functions are pure, take float32 or better, and return one number for each scored token.
Suffixes: N scored tokens, D hidden size, V vocabulary, S = L + 1 latent states, L layers, R rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

_TINY = 1e-12  # keeps the direction of a zero vector defined; far below the norm of any latent state
_VOCABULARY_BLOCK = 4_096  # vocabulary entries in one product with float32 states

Deviation = Callable[[Tensor, Tensor, Tensor], Tensor]  # (states_ND, labels_N, bases_ND) -> (N,)


def cosine_deviation(states_ND: Tensor, bases_ND: Tensor) -> Tensor:
    """1 - cos(r, b) in [0, 2]; larger = further from the semantics of the label. (SALF; third-party reading.)"""
    return 1.0 - F.cosine_similarity(states_ND, bases_ND, dim=-1, eps=_TINY)


def virtual_transition(states_ND: Tensor, bases_ND: Tensor) -> Tensor:
    """|r| b/|b| - r, (N, D): from where the representation stands to the semantics of its label, at its own length."""
    length_N1: Tensor = torch.linalg.vector_norm(states_ND, dim=-1, keepdim=True)
    ideal_ND = length_N1 * F.normalize(bases_ND, dim=-1, eps=_TINY)
    return ideal_ND - states_ND


def factual_transition(states_ND: Tensor, next_states_ND: Tensor) -> Tensor:
    """r_{i+1} - r_i, (N, D): the move that layer i makes."""
    return next_states_ND - states_ND


def transition_deviation(factual_ND: Tensor, virtual_ND: Tensor) -> Tensor:
    """1 - cos(f, u) in [0, 2]; larger = the layer moves further away from the ideal direction."""
    return 1.0 - F.cosine_similarity(factual_ND, virtual_ND, dim=-1, eps=_TINY)


def transition_miss(factual_ND: Tensor, virtual_ND: Tensor) -> Tensor:
    """|f| (1 - cos(f, u)) / |u|, (N,) >= 0: how much of a layer's move misses the virtual transition.

    The length of the factual transition, weighted by its deviation and taken relative to what is left to go, so that
    a long move in a wrong direction near the goal counts most.
    """
    left_N: Tensor = torch.linalg.vector_norm(virtual_ND, dim=-1).clamp(min=_TINY)
    moved_N: Tensor = torch.linalg.vector_norm(factual_ND, dim=-1)
    missed_N = moved_N * transition_deviation(factual_ND, virtual_ND)
    return missed_N / left_N


def logit_lens_loss(states_ND: Tensor, labels_N: Tensor, weight_VD: Tensor) -> Tensor:
    """Cross-entropy (nats) of softmax(W r), float32: the logit-lens control that the cosine is compared with.

    Neither W nor the logits are ever whole in float32: the log of the sum is gathered over blocks of the vocabulary.
    """
    total_N = torch.full((len(labels_N),), -torch.inf, device=states_ND.device)
    for block_CD in weight_VD.split(_VOCABULARY_BLOCK):
        logits_NC = states_ND @ block_CD.to(states_ND).T
        total_N = torch.logaddexp(total_N, logits_NC.logsumexp(dim=-1))
    own_N = (states_ND * weight_VD[labels_N].to(states_ND)).sum(dim=-1)
    return total_N - own_N


@dataclass(frozen=True)
class RowStatistics:
    """Sums over the scored tokens of each calibration row, float64; rows are what the bootstrap resamples."""

    rows_R: NDArray[np.int64]  # index of each row in the calibration sample
    tokens_R: NDArray[np.float64]  # scored tokens
    deviation_RS: NDArray[np.float64]  # state deviation, all latent states
    miss_RL: NDArray[np.float64]  # transition miss, all decoder layers
    loss_R: NDArray[np.float64]  # cross-entropy of the model itself, nats

    def ordered(self) -> RowStatistics:
        """The same statistics with rows in the order of the sample, whoever measured them."""
        order = np.argsort(self.rows_R, kind="stable")
        return RowStatistics(*(getattr(self, name)[order] for name in self.__dataclass_fields__))

    @staticmethod
    def empty(num_layers: int) -> RowStatistics:
        """No rows: what a process measured that had none."""
        return RowStatistics(
            np.zeros(0, dtype=np.int64),
            np.zeros(0),
            np.zeros((0, num_layers + 1)),
            np.zeros((0, num_layers)),
            np.zeros(0),
        )

    @staticmethod
    def merge(parts: list[RowStatistics]) -> RowStatistics:
        """Statistics of all parts together, ordered by row: parts may come from other batches or processes."""
        names = RowStatistics.__dataclass_fields__
        return RowStatistics(*(np.concatenate([getattr(p, n) for p in parts]) for n in names)).ordered()

    def mean(self, sums: NDArray[np.float64], counts_BR: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
        """Token-weighted mean of `sums` over rows: (columns,), or (B, columns) for row multiplicities (B, R)."""
        weights = np.ones(len(self.tokens_R)) if counts_BR is None else counts_BR
        total = weights @ self.tokens_R
        return np.asarray(weights @ sums / (total if counts_BR is None else total[:, None]))

    def stderr(self, sums: NDArray[np.float64]) -> NDArray[np.float64]:
        """Standard error of `mean`, with rows as the independent units; 0 for a single row."""
        residual = sums - self.tokens_R[:, None] * self.mean(sums)
        rows = len(self.tokens_R)
        correction = rows / (rows - 1) if rows > 1 else 0.0
        return np.asarray(np.sqrt(correction * (residual**2).sum(axis=0)) / self.tokens_R.sum())


class TransitionMeter:
    """Turns the latent states of one batch, handed over in order, into sums for each row. Keeps one state only."""

    def __init__(
        self,
        *,
        num_layers: int,
        labels_N: Tensor,
        rows_N: Tensor,
        num_rows: int,
        bases_ND: Tensor,
        deviation: Deviation,
        transitions: bool = True,
    ) -> None:
        self._labels_N, self._rows_N, self._num_rows = labels_N, rows_N, num_rows
        self._bases_ND, self._deviation = bases_ND, deviation
        self._transitions = transitions
        self._before_ND: Tensor | None = None
        self._waiting_ND: Tensor | None = None  # the bases in main memory, while they are needed on the device
        self._deviation_RS = torch.zeros(num_rows, num_layers + 1, dtype=torch.float64)
        self._miss_RL = torch.zeros(num_rows, num_layers, dtype=torch.float64)

    def add(self, state: int, states_ND: Tensor) -> None:
        """Measure latent state `state` (0..L) of the scored tokens, already read through the final norm, float32."""
        self._deviation_RS[:, state] = self._sum(self._deviation(states_ND, self._labels_N, self._bases_ND))
        if self._before_ND is not None:
            virtual_ND = virtual_transition(self._before_ND, self._bases_ND)
            miss_N = transition_miss(factual_transition(self._before_ND, states_ND), virtual_ND)
            self._miss_RL[:, state - 1] = self._sum(miss_N)
        if self._transitions:
            self._before_ND = states_ND

    def to(self, device: torch.device) -> None:
        """Move what is kept of the scored tokens: their bases, and their last state where moves are measured."""
        if device.type == "cpu":
            self._bases_ND = self._bases_ND.cpu() if self._waiting_ND is None else self._waiting_ND
        else:
            self._waiting_ND = self._bases_ND if self._bases_ND.device.type == "cpu" else None
            self._bases_ND = self._bases_ND.to(device, non_blocking=True)
        if self._before_ND is not None:
            self._before_ND = self._before_ND.to(device, non_blocking=device.type != "cpu")

    @property
    def nbytes(self) -> int:
        """Of what `to` moves."""
        return self._bases_ND.nbytes * (2 if self._transitions else 1)

    def _sum(self, values_N: Tensor) -> Tensor:
        # Reduced on the CPU: atomics on a GPU would add in a new order in every run.
        sums = torch.zeros(self._num_rows, dtype=torch.float64)
        return sums.index_add_(0, self._rows_N.cpu(), values_N.double().cpu())

    def finish(self, *, rows: list[int], loss_N: Tensor) -> RowStatistics:
        """The sums of this batch; `rows` are the indices of its rows in the calibration sample."""
        return RowStatistics(
            rows_R=np.asarray(rows, dtype=np.int64),
            tokens_R=self._sum(torch.ones_like(loss_N)).numpy(),
            deviation_RS=self._deviation_RS.numpy(),
            miss_RL=self._miss_RL.numpy(),
            loss_R=self._sum(loss_N).numpy(),
        )
