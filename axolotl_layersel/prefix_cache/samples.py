"""Find the samples in a batch, and give each a key: its token ids and the position of its first token.

A batch holds samples in three ways: one to a row, padded on either side; several in a row one after the other, told
apart by position ids that start again (packing); or pairs and more stacked by a preference trainer. In a causal model
with attention inside of samples alone, the hidden state of a sample is a function of the key, whatever the rest of the
batch is. Here B is the number of rows, T of positions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

Key = bytes
Integers = npt.NDArray[np.int64]

KEY_BYTES = 16
_NOT_RUN = ("prompt_",)  # ORPO's and SimPO's collator pads prompts alone, too, and the model never gets them


@dataclass(frozen=True)
class Segment:
    """Where a sample lies in a batch."""

    row: int
    start: int  # index of its first token in the row
    end: int  # one past its last
    key: Key
    only_padding: bool = False  # every token is the padding token, and no attention mask says whether it is one

    @property
    def tokens(self) -> int:
        """Its length."""
        return self.end - self.start


def sample_key(ids_T: Integers, *, first_position: int = 0) -> Key:
    """Sixteen bytes that change with any token, with the length, and with the position of the first token."""
    digest = hashlib.blake2b(int(first_position).to_bytes(8, "little", signed=True), digest_size=KEY_BYTES)
    digest.update(np.ascontiguousarray(ids_T, dtype="<i8").tobytes())
    return digest.digest()


def find_segments(
    input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, *, pad_token_id: int | None = None
) -> list[Segment]:
    """The samples of a batch, in order.

    Args:
        input_ids: (B, T) integers.
        attention_mask: (B, T), 0 where there is no token; None: every position holds one.
        position_ids: (B, T) or (1, T); a position that is not the one before plus 1 starts a sample. None: 0 to T - 1,
            as transformers' models count where they are given none, padding on the left included.
        pad_token_id: of the tokenizer; without an attention mask, a sample of nothing else may be padding.
    """
    ids_BT = input_ids.detach().cpu().numpy().astype(np.int64, copy=False)
    rows, length = ids_BT.shape
    real_BT = np.ones((rows, length), dtype=bool)
    if attention_mask is not None:
        real_BT = attention_mask.detach().cpu().numpy() != 0
    positions_BT = np.broadcast_to(np.arange(length, dtype=np.int64), (rows, length))
    if position_ids is not None:
        positions_BT = np.broadcast_to(position_ids.detach().cpu().numpy().astype(np.int64), (rows, length))
    before_BT = np.pad(real_BT, ((0, 0), (1, 0)))[:, :-1]
    goes_on_BT = np.pad(np.diff(positions_BT, axis=1) == 1, ((0, 0), (1, 0)))
    starts_BT = real_BT & ~(before_BT & goes_on_BT)
    ends_BT = real_BT & np.pad(~real_BT | starts_BT, ((0, 0), (0, 1)), constant_values=True)[:, 1:]
    segments = []
    for row in range(rows):
        for start, last in zip(np.flatnonzero(starts_BT[row]), np.flatnonzero(ends_BT[row]), strict=True):
            ids = ids_BT[row, start : last + 1]
            segments.append(
                Segment(
                    row=row,
                    start=int(start),
                    end=int(last) + 1,
                    key=sample_key(ids, first_position=int(positions_BT[row, start])),
                    only_padding=attention_mask is None
                    and pad_token_id is not None
                    and bool((ids == pad_token_id).all()),
                )
            )
    return segments


def token_inputs(batch: Mapping[str, Any]) -> list[tuple[Tensor, Tensor | None, Tensor | None]]:
    """The (input_ids, attention_mask, position_ids) that a trainer will give the model, from its collated batch.

    Preference trainers put several under one prefix each: `chosen_input_ids`, `KL_input_ids` and the like.
    """
    found = []
    for name, ids in batch.items():
        prefix = name.removesuffix("input_ids")
        if prefix + "input_ids" != name or prefix in _NOT_RUN or not isinstance(ids, Tensor) or ids.dim() != 2:
            continue
        found.append((ids, batch.get(prefix + "attention_mask"), batch.get(prefix + "position_ids")))
    return found
