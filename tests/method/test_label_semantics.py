"""The semantic bases against torch's own pseudoinverse."""

import bitsandbytes
import pytest
import torch
from torch import nn

from axolotl_layersel.method.label_semantics import RIDGE, semantic_bases, unembedding_weight


def _weight(vocabulary: int, hidden: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(vocabulary, hidden, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("vocabulary", "hidden"), [(97, 13), (16_500, 7), (31, 31)])
def test_bases_are_the_rows_of_the_pseudoinverse(vocabulary: int, hidden: int) -> None:
    weight_VD = _weight(vocabulary, hidden)
    labels = torch.tensor([0, vocabulary - 1, 3, 3, 5])
    expected = torch.linalg.pinv(weight_VD.double()).T[labels]
    eigenvalues = torch.linalg.eigvalsh(weight_VD.double().T @ weight_VD.double())
    # The ridge moves a direction by its share of that direction's eigenvalue; float32 rounds the result once.
    allowed = RIDGE * eigenvalues.mean() / eigenvalues.min() + torch.finfo(torch.float32).eps
    error = (semantic_bases(weight_VD).of(labels).double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() <= allowed


def test_a_basis_gives_the_one_hot_logits_that_are_nearest() -> None:
    """The definition, worked: of all representations, the basis of v minimises |W r - e_v|."""
    weight_VD = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 2.0]])
    basis = semantic_bases(weight_VD).of(torch.tensor([1]))[0]
    # G = [[2, 2], [2, 8]], w_1 = (0, 2): G^-1 w_1 = (-1/3, 1/3).
    torch.testing.assert_close(basis, torch.tensor([-1 / 3, 1 / 3]))


def test_more_hidden_units_than_vocabulary_is_solved_by_the_ridge() -> None:
    weight_VD = _weight(5, 12)
    expected = torch.linalg.pinv(weight_VD.double()).T.float()
    torch.testing.assert_close(semantic_bases(weight_VD).of(torch.arange(5)), expected, rtol=1e-4, atol=1e-6)


def test_zero_rows_of_a_padded_vocabulary_change_nothing() -> None:
    weight_VD = _weight(50, 8)
    padded_VD = torch.cat([weight_VD, torch.zeros(14, 8)])
    labels = torch.arange(50)
    torch.testing.assert_close(semantic_bases(padded_VD).of(labels), semantic_bases(weight_VD).of(labels))


def test_a_4_bit_head_is_dequantised() -> None:
    head = nn.Linear(64, 96, bias=False)
    quantised = bitsandbytes.nn.Linear4bit(64, 96, bias=False, quant_type="nf4")
    quantised.load_state_dict(head.state_dict())
    quantised = quantised.to("cpu")
    quantised(torch.zeros(1, 64))
    weight_VD = unembedding_weight(quantised)
    assert weight_VD.shape == (96, 64)
    # NF4 rounds by at most half the widest gap between its levels (0.304 of the block's largest value).
    assert (weight_VD - head.weight).abs().max() <= 0.16 * head.weight.abs().max()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_head_that_is_not_finite_is_refused(bad: float) -> None:
    weight_VD = _weight(9, 4)
    weight_VD[2, 1] = bad
    with pytest.raises(ValueError, match="holds NaN, Inf or only zeros"):
        semantic_bases(weight_VD)


def test_a_head_without_a_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match="without a V x D weight.*first_layer"):
        unembedding_weight(nn.ReLU())
