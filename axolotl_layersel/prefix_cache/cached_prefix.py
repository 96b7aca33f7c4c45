"""The cache of one run: which samples it needs, what it holds, and what it gives the model batch by batch."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from axolotl_layersel.model.decoder_stack import DecoderStack
from axolotl_layersel.prefix_cache.bypass import PrefixBypass, PrefixCacheError, TokenInputs, compute_states
from axolotl_layersel.prefix_cache.fill import Sample
from axolotl_layersel.prefix_cache.samples import Key, Segment, find_segments
from axolotl_layersel.prefix_cache.state_store import StateStore, assemble


@dataclass
class Counts:
    """What the cache was asked for."""

    hits: int = 0  # batches whose states were all here
    misses: int = 0  # batches that ran through the frozen layers
    not_asked: int = 0  # generation, hidden states: nothing that a cache could answer


@dataclass
class CachedPrefix:
    """Answers the bypass from a store, and holds the first training batch against the real layers.

    Args:
        stack: of the model in training.
        store: filled.
        first_trainable: k.
        width: D.
        dtype: in which layer k is handed its states.
        where: of each sample, to name it in messages.
        tolerance: largest mean relative error of a sample's states that rounding explains.
        pad_token_id: of the tokenizer.
    """

    stack: DecoderStack
    store: StateStore
    first_trainable: int
    width: int
    dtype: torch.dtype
    where: dict[Key, str]
    tolerance: float
    pad_token_id: int | None = None
    counts: Counts = field(default_factory=Counts)
    checked: bool = False
    worst_error: float = 0.0  # of the batch that was checked

    def __post_init__(self) -> None:
        self.bypass = PrefixBypass(self.stack, first_trainable=self.first_trainable, states_of=self.states_of)

    def install(self, model: nn.Module) -> None:
        """From now on the model's frozen layers run only for batches that are not here."""
        self.bypass.install()

    def remove(self) -> None:
        """Leave the model as it was found."""
        self.bypass.remove()

    def states_of(self, inputs: TokenInputs) -> Tensor | None:
        """What layer k is to be given for a batch, on the batch's device; None if a sample is not here.

        Raises:
            PrefixCacheError: in the first training batch the frozen layers compute something else.
        """
        device = inputs.input_ids.device
        segments = find_segments(
            inputs.input_ids, inputs.attention_mask, inputs.position_ids, pad_token_id=self.pad_token_id
        )
        rows, length = inputs.input_ids.shape
        states = assemble(
            self.store,
            segments,
            shape=(rows, length, self.width),
            dtype=self.dtype,
            pin=device.type == "cuda",
        )
        if states is None:
            self.counts.misses += 1
            return None
        self.counts.hits += 1
        states = states.to(device, non_blocking=True)
        if not self.checked and torch.is_grad_enabled():
            self._check(inputs, segments, states)
        return states

    def _check(self, inputs: TokenInputs, segments: list[Segment], states_BTD: Tensor) -> None:
        self.bypass.enabled = False
        try:
            real_BTD = compute_states(self.stack, first_trainable=self.first_trainable, inputs=inputs)
        finally:
            self.bypass.enabled = True
        if real_BTD.dtype != self.dtype or real_BTD.shape != states_BTD.shape:
            raise PrefixCacheError(
                f"the frozen layers hand on {tuple(real_BTD.shape)} in {real_BTD.dtype}, the cache holds "
                f"{tuple(states_BTD.shape)} in {self.dtype}: clear the cache"
            )
        for segment in segments:
            if segment.key not in self.store:
                continue
            real, cached = (s[segment.row, segment.start : segment.end].float() for s in (real_BTD, states_BTD))
            error = float(relative_error(cached, real))
            self.worst_error = max(self.worst_error, error)
            if not error <= self.tolerance:
                raise PrefixCacheError(
                    f"{self.where.get(segment.key, 'a sample')}: the frozen layers compute other states in the first "
                    f"training batch than the cache holds, {error:.2g} apart on average where rounding explains "
                    f"{self.tolerance:.2g}. Something below the cut acts in training alone, or attention reaches from "
                    "one packed sample to another, or the cache is wrong: clear it with `axolotl layersel cache CONFIG "
                    "--clear`, or train with `prefix_cache: off`"
                )
        self.checked = True


def relative_error(cached_nD: Tensor, real_nD: Tensor) -> Tensor:
    """Mean over tokens of |cached - real| / |real|, Euclidean norms."""
    size = real_nD.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    error: Tensor = ((cached_nD - real_nD).norm(dim=-1) / size).mean()
    return error


def needed_samples(samples: list[Sample], store: StateStore) -> list[Sample]:
    """The samples that are not in the store, each once."""
    seen: dict[Key, Sample] = {}
    for sample in samples:
        if sample.key not in store:
            seen.setdefault(sample.key, sample)
    return list(seen.values())
