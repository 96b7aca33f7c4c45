"""Short trainings of a suffix of layers on the calibration rows, with what enters its first layer read from memory.

The layers below a cut are frozen, so what they hand on is computed once for all trainings of that cut. Each training
has its own adapters (`low_rank.py`), rate, warm-up and decay, and is judged on rows that it has not seen. Nothing is
drawn at random but from the seed, and the model is left as it was found.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from axolotl_layersel.method.calibration import IGNORED, Batch, Row, batches
from axolotl_layersel.method.low_rank import low_rank_adapters
from axolotl_layersel.model.decoder_stack import DecoderStack, unwrap
from axolotl_layersel.model.replaced_forward import replaced_forward
from axolotl_layersel.model.start_at_layer import starting_at, states_entering

Array = NDArray[np.float64]
_GRADIENT_NORM = 1.0


class PilotError(RuntimeError):
    """The model cannot be piloted; the message says why."""


@dataclass
class Trainer:
    """Trains suffixes of one model on one split of the calibration rows.

    Args:
        model: before adapters, in eval mode, under the precision of the run, its parameters frozen.
        stack: found in it.
        rows: the calibration rows.
        train, heldout: indices into them.
        rows_per_step: rows of an optimizer step.
        batch_tokens: padded tokens in one forward pass; a step is made of as many as it takes.
        checkpointing: recompute layers in the backward pass, as the run does.
    """

    model: nn.Module
    stack: DecoderStack
    rows: Sequence[Row]
    train: Sequence[int]
    heldout: Sequence[int]
    rows_per_step: int
    batch_tokens: int
    checkpointing: bool = False
    _entering: dict[int, dict[int, Tensor]] = field(default_factory=dict)  # cut -> row -> (T, D) on the CPU
    _hands_on_tuple: bool = False  # what this model's layers return

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return next(self.stack.embeddings.parameters()).device

    def keep_states(self, cut: int, rows: Sequence[int]) -> None:
        """Compute what enters layer `cut` for some rows, from what is kept of all of them at a lower cut if it is."""
        having = (known for known, kept in self._entering.items() if known < cut and kept.keys() >= set(rows))
        below = max(having, default=0)
        kept = self._entering.setdefault(cut, {})
        with torch.no_grad(), self._noting_form():
            for batch in self._batches(rows):
                with self._starting_at(below, batch):
                    states_BTD = states_entering(
                        self.stack, cut, input_ids=batch.input_ids, attention_mask=batch.attention_mask
                    )
                for place, row in enumerate(batch.rows):
                    kept[row] = states_BTD[place, : len(self.rows[row].input_ids)].to("cpu", copy=True)

    def heldout_losses(self, cut: int, indices: Sequence[int] | None = None) -> Array:
        """Summed cross-entropy (nats) of each held-out row, as the model stands, started at `cut`."""
        chosen = list(self.heldout if indices is None else indices)
        losses: dict[int, float] = {}
        with torch.no_grad():
            for batch in self._batches(chosen):
                with self._starting_at(cut, batch):
                    losses |= dict(zip(batch.rows, self._loss_of_rows(batch).tolist(), strict=True))
        return np.array([losses[row] for row in chosen])

    def trained(
        self, cut: int, *, learning_rate: float, steps: int, seed: int, judged_from: Sequence[int] = ()
    ) -> list[Array]:
        """Train layers cut..L-1 for `steps` steps.

        Returns:
            Summed cross-entropy of each held-out row, then the same with the model started at each of `judged_from`,
            where the layers below are as they were before training; all inf where the training diverged.
        """
        adapters = low_rank_adapters(self.stack, first_trainable=cut, seed=seed)
        with adapters as parameters, self._recomputing(cut):
            optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
            for step, chosen in enumerate(self.order(steps, seed)):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * rate_at(step, steps)
                if not self._step(cut, chosen, parameters, optimizer):
                    return [np.full(len(self.heldout), np.inf)] * (1 + len(judged_from))
            return [self.heldout_losses(start) for start in (cut, *judged_from)]

    def after_first_step(self, cut: int, rates: Sequence[float], *, seed: int, indices: Sequence[int]) -> list[Array]:
        """Summed cross-entropy of some rows after the first step of AdamW on layers cut..L-1, at each of some rates.

        Only the adapters' second factors have a gradient then, and each of their entries moves by the rate.
        """
        adapters = low_rank_adapters(self.stack, first_trainable=cut, seed=seed)
        with adapters as parameters, self._recomputing(cut):
            self._backward(cut, next(self.order(1, seed)))
            losses = []
            for rate in rates:
                for up in parameters[1::2]:
                    assert up.grad is not None
                    up.data = -rate * up.grad.sign()
                losses.append(self.heldout_losses(cut, indices))
            return losses

    def _step(
        self, cut: int, chosen: Sequence[int], parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> bool:
        """One optimizer step; whether its gradient was finite."""
        self._backward(cut, chosen)
        norm = torch.nn.utils.clip_grad_norm_(parameters, _GRADIENT_NORM)
        if not torch.isfinite(norm):
            return False
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return True

    def _backward(self, cut: int, chosen: Sequence[int]) -> None:
        """Gradients of the mean loss over the scored tokens of some rows."""
        tokens = sum(self.rows[row].scored for row in chosen)
        for batch in self._batches(chosen):
            with self._starting_at(cut, batch), torch.enable_grad():
                loss = self._loss_of_rows(batch).sum() / tokens
                loss.backward()

    def order(self, steps: int, seed: int) -> Iterator[list[int]]:
        """The rows of every step: all in a new order in each epoch."""
        draw, waiting = np.random.default_rng(seed), list[int]()
        for _ in range(steps):
            while len(waiting) < self.rows_per_step:
                waiting += draw.permutation(self.train).tolist()
            yield waiting[: self.rows_per_step]
            del waiting[: self.rows_per_step]

    def _batches(self, indices: Sequence[int]) -> Iterator[Batch]:
        for batch in batches(self.rows, indices, batch_tokens=self.batch_tokens):
            yield batch.to(self.device)

    @contextmanager
    def _starting_at(self, cut: int, batch: Batch) -> Iterator[None]:
        """Within the block the backbone starts at layer `cut`, with the kept states of this batch."""
        if cut == 0:
            yield
            return
        kept = [self._entering[cut][row] for row in batch.rows]
        states_BTD = nn.utils.rnn.pad_sequence(kept, batch_first=True).to(self.device)
        with starting_at(self.stack, cut, states_BTD, as_tuple=self._hands_on_tuple):
            yield

    @contextmanager
    def _noting_form(self) -> Iterator[None]:
        def note(_module: nn.Module, _args: object, output: object) -> None:
            self._hands_on_tuple = not isinstance(output, Tensor)

        handle = self.stack.layers[0].register_forward_hook(note)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _recomputing(self, cut: int) -> Iterator[None]:
        """Within the block the trained layers keep nothing for the backward pass but what they are given."""
        layers = [unwrap(layer) for layer in self.stack.layers[cut:]] if self.checkpointing else []
        with replaced_forward(layers, lambda own: partial(checkpoint, own, use_reentrant=False)):
            yield

    def _loss_of_rows(self, batch: Batch) -> Tensor:
        """Summed cross-entropy of the model's own logits for each row, (B,) float32."""
        scored_BT = batch.targets != IGNORED
        keep_K = scored_BT.any(dim=0).nonzero()[:, 0]
        narrow = {"logits_to_keep": keep_K} if takes_positions(self.model) else {}
        output = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **narrow)
        logits_BKV = output.logits if narrow else output.logits[:, keep_K]
        targets_BK = batch.targets[:, keep_K].to(logits_BKV.device)
        with torch.autocast(logits_BKV.device.type, enabled=False):
            loss_N = F.cross_entropy(
                logits_BKV.float().flatten(0, 1), targets_BK.flatten(), ignore_index=IGNORED, reduction="none"
            )
        return loss_N.view(targets_BK.shape).sum(dim=1)


def rate_at(step: int, steps: int) -> float:
    """Share of the rate in a step: a warm-up over the first tenth, then a cosine to zero."""
    warmup = max(1, round(steps / 10))
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def takes_positions(model: nn.Module) -> bool:
    """Whether the model can be asked to unembed some positions alone."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within the block no parameter of the model asks for a gradient."""
    asked = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in asked:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, wanted in asked:
            parameter.requires_grad_(wanted)
