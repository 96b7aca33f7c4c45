"""What a cache gives the model, batch by batch, and the check of the first one against the real layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from axolotl_layersel.model.decoder_stack import DecoderStack
from axolotl_layersel.prefix_cache.bypass import PrefixBypass, TokenInputs, compute_states
from axolotl_layersel.prefix_cache.offload import OffloadedWeights
from axolotl_layersel.prefix_cache.samples import Key, Segment, find_segments
from axolotl_layersel.prefix_cache.state_store import PrefixCacheError, StateStore, assemble

LEAVE_AGAIN = 100  # batches from the cache in a row, after one that needed the weights


@dataclass
class CachedPrefix:
    """Answers the bypass from a store, and holds the first training batch against the real layers.

    Args:
        stack: of the model in training.
        store: filled.
        first_trainable: k.
        where: of each sample, to name it in messages.
        tolerance: largest mean relative error of a sample's states that rounding explains.
        pad_token_id: of the tokenizer.
        weights: which leave the device once the first batch was checked, and come back when a batch needs them.
    """

    stack: DecoderStack
    store: StateStore
    first_trainable: int
    where: Mapping[Key, str]
    tolerance: float
    pad_token_id: int | None = None
    weights: OffloadedWeights | None = None
    hits: int = 0  # batches whose states were all here
    misses: int = 0  # batches that ran through the frozen layers
    checked: bool = False
    worst_error: float = 0.0  # of the batch that was checked

    def __post_init__(self) -> None:
        self.bypass = PrefixBypass(self.stack, first_trainable=self.first_trainable, states_of=self.states_of)
        self._to_go = 1  # hits until the weights leave

    def install(self) -> None:
        """From now on the model's frozen layers run only for batches that are not here."""
        self.bypass.install()

    def remove(self) -> None:
        """Leave the model as it was found, its weights where they were."""
        self.bypass.remove()
        if self.weights is not None:
            self.weights.come_back()

    def states_of(self, inputs: TokenInputs | None) -> Tensor | None:
        """What layer k is to be given for a batch, on the batch's device; None: the frozen layers run.

        Args:
            inputs: None for a call that no cache can answer, such as generation.

        Raises:
            PrefixCacheError: in the first training batch the frozen layers compute something else.
        """
        segments, states = [], None
        if inputs is not None:
            device = inputs.input_ids.device
            segments = find_segments(
                inputs.input_ids, inputs.attention_mask, inputs.position_ids, pad_token_id=self.pad_token_id
            )
            rows, length = inputs.input_ids.shape
            states = assemble(self.store, segments, rows=rows, length=length, pin=device.type == "cuda")
        if inputs is None or states is None:
            self.misses += 1
            self._to_go = LEAVE_AGAIN
            if self.weights is not None:
                self.weights.come_back()
            return None
        self.hits += 1
        states = states.to(device, non_blocking=True)
        if not self.checked and (torch.is_grad_enabled() or self.bypass.returns_tuple is None):
            self._check(inputs, segments, states)
            self.checked = torch.is_grad_enabled()
        elif self.checked and self.weights is not None and not self.weights.are_away:
            self._to_go -= 1
            if self._to_go <= 0:
                self.weights.leave()
        return states

    def _check(self, inputs: TokenInputs, segments: list[Segment], states_BTD: Tensor) -> None:
        """The batch as it is, in training mode, with whatever acts in training alone."""
        self.bypass.enabled = False
        try:
            with torch.random.fork_rng():
                real_BTD = compute_states(self.stack, first_trainable=self.first_trainable, inputs=inputs)
        finally:
            self.bypass.enabled = True
        if real_BTD.dtype != states_BTD.dtype or real_BTD.shape != states_BTD.shape:
            raise PrefixCacheError(
                f"in training the frozen layers hand on {tuple(real_BTD.shape)} in {real_BTD.dtype}, the cache holds "
                f"{tuple(states_BTD.shape)} in {states_BTD.dtype}: train with `prefix_cache: off`"
            )
        for segment in segments:
            if segment.key not in self.store:
                continue
            real, cached = (s[segment.row, segment.start : segment.end].float() for s in (real_BTD, states_BTD))
            error = float(relative_error(cached, real))
            self.worst_error = max(self.worst_error, error)
            if not error <= self.tolerance:
                raise PrefixCacheError(
                    f"{self.where.get(segment.key, 'a sample')}: in the first training batch the frozen layers compute "
                    f"other states than the cache holds, {error:.2g} apart on average where rounding explains "
                    f"{self.tolerance:.2g}. Something below the cut acts in training alone, attention reaches from one "
                    "packed sample to another, or the cache is wrong: clear it with `axolotl layersel cache CONFIG "
                    "--clear`, or train with `prefix_cache: off`"
                )


def relative_error(cached_nD: Tensor, real_nD: Tensor) -> Tensor:
    """Mean over tokens of |cached - real| / |real|, Euclidean norms."""
    size = real_nD.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    error: Tensor = ((cached_nD - real_nD).norm(dim=-1) / size).mean()
    return error
