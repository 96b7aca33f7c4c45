"""A sample has one key wherever it lies in a batch, and no other sample has it."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from axolotl_layersel.prefix_cache.samples import find_segments, sample_key, token_inputs

SAMPLES = st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=7), min_size=1, max_size=5)


def key(ids: list[int], first: int = 0) -> bytes:
    return sample_key(np.array(ids, dtype=np.int64), first_position=first)


def tensor(rows: list[list[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.long)


@given(SAMPLES, st.integers(0, 3))
def test_a_padded_row_holds_its_sample(samples: list[list[int]], extra: int) -> None:
    longest = max(map(len, samples)) + extra
    ids = tensor([s + [0] * (longest - len(s)) for s in samples])
    mask = tensor([[1] * len(s) + [0] * (longest - len(s)) for s in samples])
    found = find_segments(ids, mask, None)
    assert [s.key for s in found] == [key(s) for s in samples]
    assert [(s.row, s.start, s.end) for s in found] == [(i, 0, len(s)) for i, s in enumerate(samples)]


@given(SAMPLES, st.integers(0, 4))
def test_packed_samples_are_told_apart_by_their_positions(samples: list[list[int]], padding: int) -> None:
    """Without an attention mask, with one, and with one of the values 1, 2, 3, as axolotl's collator makes it."""
    ids = tensor([[i for s in samples for i in s] + [99] * padding])
    positions = tensor([[i for s in samples for i in range(len(s))] + list(range(padding))])
    numbered = tensor([[n + 1 for n, s in enumerate(samples) for _ in s] + [0] * padding])
    for mask in (None, numbered, (numbered > 0).long()):
        found = find_segments(ids, mask, positions, pad_token_id=99)
        assert [s.key for s in found if not s.only_padding] == [key(s) for s in samples]
        assert [s.tokens for s in found if s.only_padding] == ([padding] if padding and mask is None else [])


def test_padding_on_the_left_moves_the_positions_unless_they_are_given() -> None:
    ids, mask = tensor([[0, 0, 5, 6]]), tensor([[0, 0, 1, 1]])
    assert find_segments(ids, mask, None)[0].key == key([5, 6], first=2) != key([5, 6])
    assert find_segments(ids, mask, tensor([[1, 1, 0, 1]]))[0].key == key([5, 6])


def test_a_hole_in_a_row_does_not_make_two_samples_of_one() -> None:
    """Attention reaches over the hole, so the second part is not a sample that begins at position 0."""
    _, second = find_segments(tensor([[5, 0, 6]]), tensor([[1, 0, 1]]), None)
    assert second.key != key([6])


@given(st.lists(st.integers(0, 60), min_size=1, max_size=6), st.lists(st.integers(0, 60), min_size=1, max_size=6))
def test_other_tokens_have_another_key(one: list[int], other: list[int]) -> None:
    assert (key(one) == key(other)) == (one == other)


def test_preference_batches_hold_several_inputs() -> None:
    ids, mask = tensor([[1, 2]]), tensor([[1, 1]])
    batch = {
        "chosen_input_ids": ids,
        "chosen_attention_mask": mask,
        "prompt_input_ids": ids,
        "KL_input_ids": ids,
        "labels": ids,
    }
    assert [(i is ids, m is mask) for i, m, _ in token_inputs(batch)] == [(True, True), (True, False)]
