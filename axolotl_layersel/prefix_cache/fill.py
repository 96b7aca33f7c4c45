"""Compute the states of samples, at the batch sizes of inference, and put them into a store."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from axolotl_layersel.model.decoder_stack import DecoderStack
from axolotl_layersel.model.latent_states import left_as_found
from axolotl_layersel.model.memory import TooLargeError, halving_batches
from axolotl_layersel.prefix_cache.bypass import TokenInputs, compute_states
from axolotl_layersel.prefix_cache.samples import Integers, Key, find_segments, sample_key, token_inputs
from axolotl_layersel.prefix_cache.state_store import PrefixCacheError, StateStore

Collate = Callable[[list[Any]], Mapping[str, Any]]

_COLLATED = 64  # rows at a time; no more than one padded batch of them is in memory


@dataclass(frozen=True)
class Sample:
    """Tokens whose states are wanted, and where they come from."""

    key: Key
    ids: Integers  # (n,)
    where: str  # "row 17 of the training set"


def gather_samples(rows: Any, *, of: str, collate: Collate) -> Iterator[Sample]:
    """All samples of a prepared data set, as the trainer will give them to the model, repeated ones too.

    Args:
        rows: a `datasets.Dataset` or a list; rows with `input_ids` are read as they are, and split where their position
            ids start again.
        of: what it is called in messages, for example "the training set".
        collate: the trainer's collator, for all other rows.
    """
    names = getattr(rows, "column_names", None) or (list(rows[0]) if len(rows) else [])
    if "input_ids" in names:
        yield from _read(rows, names, of=of)
        return
    place, source = 0, iter(rows)
    while some := list(islice(source, _COLLATED)):
        for ids_BT, mask_BT, positions_BT in token_inputs(collate(some)):
            ids = ids_BT.numpy()
            for s in find_segments(ids_BT, mask_BT, positions_BT):
                yield Sample(s.key, ids[s.row, s.start : s.end], f"row {place + s.row % len(some)} of {of}")
        place += len(some)


def _read(rows: Any, names: Sequence[str], *, of: str) -> Iterator[Sample]:
    wanted = [name for name in ("input_ids", "attention_mask", "position_ids") if name in names]
    if hasattr(rows, "with_format"):
        rows = rows.select_columns(wanted).with_format("numpy")
    for place, row in enumerate(rows):
        ids = np.asarray(row["input_ids"], dtype=np.int64).reshape(-1)
        if "attention_mask" in row:
            real = np.asarray(row["attention_mask"]).reshape(-1) != 0
        else:
            real = np.ones(len(ids), dtype=bool)
        starts = [0]
        if "position_ids" in row:
            positions = np.asarray(row["position_ids"]).reshape(-1)
            starts += [int(i) for i in np.flatnonzero(positions == 0) if i]
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            part = ids[start:end][real[start:end]]
            if len(part):
                yield Sample(sample_key(part), part, f"row {place} of {of}")


def batches_of(samples: Iterable[Sample], *, batch_tokens: int) -> list[list[Sample]]:
    """Samples of similar length together, at most `batch_tokens` padded tokens in a batch (one sample at least)."""
    batches: list[list[Sample]] = []
    for sample in sorted(samples, key=lambda s: (len(s.ids), s.key)):
        if batches and (len(batches[-1]) + 1) * len(sample.ids) <= batch_tokens:
            batches[-1].append(sample)
        else:
            batches.append([sample])
    return batches


def padded(batch: Sequence[Sample], device: torch.device) -> TokenInputs:
    """Right-padded token ids and their mask; in a causal model padding on the right reaches no sample."""
    longest = max(len(sample.ids) for sample in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sample in enumerate(batch):
        ids[row, : len(sample.ids)] = torch.from_numpy(sample.ids.astype(np.int64))
        mask[row, : len(sample.ids)] = 1
    return TokenInputs(ids.to(device), mask.to(device))


@dataclass(frozen=True)
class Filled:
    """What this process computed."""

    rows: int
    tokens: int
    seconds: float


def fill_store(
    model: nn.Module,
    stack: DecoderStack,
    store: StateStore,
    samples: Sequence[Sample],
    *,
    first_trainable: int,
    batch_tokens: int,
    autocast: torch.dtype | None,
    share: tuple[int, int] = (0, 1),
    show_progress: bool = True,
) -> Filled:
    """Compute the states of `samples` and add them to `store`; they are readable, and safe, when this returns.

    Args:
        model: in training; left as it was found.
        stack: of the model.
        store: which holds none of the samples yet.
        samples: without repetitions, the same on every process.
        first_trainable: k.
        batch_tokens: most padded tokens in a batch; halved where memory runs out.
        autocast: of the trainer.
        share: this process and the number of processes.
        show_progress: with a bar.

    Raises:
        PrefixCacheError: memory does not suffice for one sample alone.
    """
    rank, world = share
    batches = batches_of(samples, batch_tokens=batch_tokens)[::-1][rank::world]  # the longest first: the most memory
    rows, tokens = sum(map(len, batches)), sum(len(s.ids) for batch in batches for s in batch)
    device = next(stack.layers[0].parameters()).device
    started = time.perf_counter()

    def computed(batch: list[Sample]) -> Tensor:
        return compute_states(stack, first_trainable=first_trainable, inputs=padded(batch, device)).cpu()

    with (
        tqdm(total=tokens, unit="token", unit_scale=True, desc="frozen layers", disable=not show_progress) as bar,
        left_as_found(model, autocast=autocast),
    ):
        done = 0
        try:
            for batch, states_BTD in halving_batches(batches, computed, halves=_halves):
                for row, sample in enumerate(batch):
                    store.add(sample.key, states_BTD[row, : len(sample.ids)])
                done += len(batch)
                bar.set_postfix_str(f"{done} of {rows} rows, {store.bytes_left() / 1e9:.1f} GB left", refresh=False)
                bar.update(sum(len(s.ids) for s in batch))
        except TooLargeError as error:
            (sample,) = error.batch
            raise PrefixCacheError(
                f"{sample.where} with {len(sample.ids)} tokens is too much for the memory of {device} ({error})"
            ) from error
        store.flush()
    return Filled(rows=rows, tokens=tokens, seconds=time.perf_counter() - started)


def _halves(batch: list[Sample]) -> list[list[Sample]]:
    middle = len(batch) // 2
    return [batch[:middle], batch[middle:]] if middle else [batch]
