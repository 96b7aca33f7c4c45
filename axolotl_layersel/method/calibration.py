"""The calibration sample: rows of the user's own training set, as tokens and labels.

Rows come from the dataset that axolotl prepared, so packing, chat templates, masks and truncation are the run's own.
A position is scored when the label of the next position is not -100.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

MEDIA = ("pixel_values", "pixel_values_videos", "input_features")  # columns in which processors put images and sound
IGNORED = -100  # the label of an unsupervised position, as everywhere in transformers


class CalibrationError(ValueError):
    """The training set cannot be sampled: it is empty, not tokenised, not text, or has no supervised position."""


@dataclass(frozen=True)
class Row:
    """One training sample: token ids and labels of the same length, unpadded."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    source: int = field(default=-1, compare=False)  # index of its record in the training set, to name it in errors

    @property
    def scored(self) -> int:
        """Number of scored positions."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True)
class Sample:
    """The rows that were drawn, and what a user should know about the draw."""

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Scored tokens over all rows."""
        return sum(row.scored for row in self.rows)

    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that change with any token or label of the sample."""
        digest = hashlib.sha256()
        for row in self.rows:
            for values in (row.input_ids, row.labels):
                digest.update(np.asarray((len(values), *values), dtype=np.int64).tobytes())
        return digest.hexdigest()[:12]


@dataclass(frozen=True)
class Batch:
    """Right-padded rows: all tensors are (B, T) int64."""

    rows: tuple[int, ...]  # index of each row in the sample
    input_ids: Tensor
    attention_mask: Tensor
    targets: Tensor  # label of the *next* position, -100 where a position is not scored

    def halves(self) -> list[Batch]:
        """The batch in two, or itself where it has one row."""
        middle = len(self.rows) // 2
        parts = [slice(0, middle), slice(middle, None)] if middle else [slice(None)]
        return [Batch(self.rows[p], self.input_ids[p], self.attention_mask[p], self.targets[p]) for p in parts]

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(self.rows, *(t.to(device) for t in (self.input_ids, self.attention_mask, self.targets)))


def draw_rows(dataset: Any, *, num_samples: int, max_tokens: int, seed: int, sequence_len: int) -> Sample:
    """Draw rows without replacement; equal inputs give equal rows.

    Args:
        dataset: indexable rows (a `datasets.Dataset`, a list) or an iterable of rows (streaming: the first rows are
            taken). A row is a mapping with `input_ids` and `labels`; packed rows with `position_ids` are split.
        num_samples: rows wanted; with fewer supervised rows all of them are used and a note says so.
        max_tokens: the draw ends before the row whose scored tokens would pass this number (one row is always kept).
        seed: of the permutation.
        sequence_len: longer rows are cut to this many tokens, as training would.

    Raises:
        CalibrationError: no rows, rows without token ids or with images, or no supervised position in any row.
    """
    rows: list[Row] = []
    tokens = looked_at = 0
    capped = False
    with _own_random_state(seed):
        for row in _in_drawing_order(dataset, seed=seed, sequence_len=sequence_len):
            looked_at += 1
            if not row.scored:
                continue
            if rows and tokens + row.scored > max_tokens:
                capped = True
                break
            rows.append(row)
            tokens += row.scored
            if len(rows) == num_samples:
                break
    if not looked_at:
        raise CalibrationError(
            "the training set is empty after axolotl prepared it; scoring needs at least one row with a supervised "
            "token: check `datasets:` and `sequence_len:`"
        )
    if not rows:
        raise CalibrationError(
            f"all {looked_at} rows of the training set have every label masked (-100); scoring needs a supervised "
            "token: check the chat template, `roles_to_train:` and `train_on_inputs:`"
        )
    notes = []
    if capped:
        notes.append(f"{len(rows)} rows were scored: more would pass max_tokens ({max_tokens})")
    elif len(rows) < num_samples:
        notes.append(f"{len(rows)} rows were scored, all that have a supervised token; num_samples was {num_samples}")
    return Sample(rows=tuple(rows), notes=tuple(notes))


@contextmanager
def _own_random_state(seed: int) -> Iterator[None]:
    """Streams that pack draw from the global generators: seed them for the sample, and give the run its own back."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _in_drawing_order(dataset: Any, *, seed: int, sequence_len: int) -> Iterator[Row]:
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        order = np.random.default_rng(seed).permutation(len(dataset)).tolist()
        records: Iterator[tuple[int, Any]] = ((index, dataset[index]) for index in order)
    else:
        records = enumerate(islice(iter(dataset), 100_000))  # a stream may have no end, and may be masked throughout
    for index, record in records:
        for row in _rows_of(record):
            yield Row(row.input_ids[:sequence_len], row.labels[:sequence_len], source=index)


def _rows_of(record: Mapping[str, Any]) -> Iterator[Row]:
    """The samples in one dataset row: itself, or its parts if position ids show that it was packed."""
    if "input_ids" not in record or "labels" not in record:
        raise CalibrationError(
            f"rows of the training set have the columns {sorted(record)}; scoring needs `input_ids` and `labels`. "
            "Remove `skip_prepare_dataset:`, or choose the layers by hand with `layersel: {first_layer: ...}`"
        )
    if media := [name for name in MEDIA if record.get(name) is not None]:
        raise CalibrationError(
            f"rows of the training set hold images or sound (column `{media[0]}`), and scoring reads text alone: score "
            "the same model on text and give the result with `layersel: {plan: ...}`, or choose the layers by hand "
            "with `layersel: {first_layer: ...}`"
        )
    ids, labels = (_as_list(record[name]) for name in ("input_ids", "labels"))
    real = _as_list(record["attention_mask"]) if record.get("attention_mask") is not None else [1] * len(ids)
    positions = _as_list(record["position_ids"]) if record.get("position_ids") is not None else list(range(len(ids)))
    starts = [0, *(i for i in range(1, len(ids)) if positions[i] == 0), len(ids)]
    for start, end in pairwise(starts):
        keep = [i for i in range(start, end) if real[i]]
        yield Row(tuple(ids[i] for i in keep), tuple(labels[i] for i in keep))


def _as_list(values: Any) -> list[int]:
    values = values.tolist() if hasattr(values, "tolist") else list(values)
    return [int(v) for v in (values[0] if values and isinstance(values[0], list) else values)]


def batches(rows: Sequence[Row], indices: Sequence[int], *, batch_tokens: int) -> Iterator[Batch]:
    """Group rows of similar length into batches of at most `batch_tokens` padded tokens (one row at least).

    Args:
        rows: the whole sample; indices: the rows to batch, in any order.
        batch_tokens: upper bound of B x T.
    """
    waiting: list[int] = []
    for index in sorted(indices, key=lambda i: (len(rows[i].input_ids), i)):
        if waiting and (len(waiting) + 1) * len(rows[index].input_ids) > batch_tokens:
            yield _pad(rows, waiting)
            waiting = []
        waiting.append(index)
    if waiting:
        yield _pad(rows, waiting)


def _pad(rows: Sequence[Row], indices: Sequence[int]) -> Batch:
    longest = max(len(rows[i].input_ids) for i in indices)
    input_ids = torch.zeros(len(indices), longest, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    targets = torch.full_like(input_ids, IGNORED)
    for place, index in enumerate(indices):
        row = rows[index]
        length = len(row.input_ids)
        input_ids[place, :length] = torch.tensor(row.input_ids)
        attention_mask[place, :length] = 1
        targets[place, : length - 1] = torch.tensor(row.labels[1:], dtype=torch.long)
    return Batch(tuple(indices), input_ids, attention_mask, targets)
