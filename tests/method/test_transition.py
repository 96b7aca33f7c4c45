"""Transitions and deviations against slow references, then invariants, then numbers worked by hand."""

import math

import numpy as np
import pytest
import torch

from axolotl_layersel.method.transition import (
    RowStatistics,
    TransitionMeter,
    cosine_deviation,
    factual_transition,
    logit_lens_loss,
    transition_deviation,
    transition_miss,
    virtual_transition,
)

GENERATOR = torch.Generator().manual_seed(3)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def _cos(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def test_measures_equal_plain_python() -> None:
    r, following, basis = _random(5, 3), _random(5, 3), _random(5, 3)
    virtual, factual = virtual_transition(r, basis), factual_transition(r, following)
    miss = transition_miss(factual, virtual)
    for n in range(5):
        rn, bn = r[n].tolist(), basis[n].tolist()
        length = math.sqrt(sum(x * x for x in rn))
        scale = length / math.sqrt(sum(x * x for x in bn))
        u = [scale * b - x for b, x in zip(bn, rn, strict=True)]
        f = [y - x for x, y in zip(rn, following[n].tolist(), strict=True)]
        ratio = math.sqrt(sum(x * x for x in f) / sum(x * x for x in u))
        assert cosine_deviation(r, basis)[n].item() == pytest.approx(1 - _cos(rn, bn), abs=1e-6)
        assert transition_deviation(factual, virtual)[n].item() == pytest.approx(1 - _cos(f, u), abs=1e-6)
        assert miss[n].item() == pytest.approx(ratio * (1 - _cos(f, u)), rel=1e-5)


def test_worked_by_hand() -> None:
    """With r = (3, 4), basis along (1, 0): u = 5 (1, 0) - r = (2, -4); the layer moves to (3, 0): f = (0, -4)."""
    r, basis = torch.tensor([[3.0, 4.0]]), torch.tensor([[7.0, 0.0]])
    virtual = virtual_transition(r, basis)
    factual = factual_transition(r, torch.tensor([[3.0, 0.0]]))
    torch.testing.assert_close(virtual, torch.tensor([[2.0, -4.0]]))
    assert cosine_deviation(r, basis).item() == pytest.approx(0.4)
    cosine = 16 / (4 * math.sqrt(20))
    assert transition_deviation(factual, virtual).item() == pytest.approx(1 - cosine, abs=1e-6)
    assert transition_miss(factual, virtual).item() == pytest.approx(4 * (1 - cosine) / math.sqrt(20), abs=1e-6)


def test_the_ideal_move_deviates_by_nothing_and_ends_at_the_semantics() -> None:
    r, basis = _random(6, 4), _random(6, 4)
    virtual = virtual_transition(r, basis)
    assert transition_deviation(virtual, virtual).abs().max() < 1e-6
    assert cosine_deviation(r + virtual, basis).abs().max() < 1e-6


def test_deviations_do_not_depend_on_the_scale_of_state_or_basis() -> None:
    r, basis = _random(6, 4), _random(6, 4)
    torch.testing.assert_close(cosine_deviation(r * 8, basis * 0.25), cosine_deviation(r, basis))
    torch.testing.assert_close(
        transition_miss(r * 8, virtual_transition(r * 8, basis)), transition_miss(r, virtual_transition(r, basis))
    )


def test_a_zero_state_has_a_finite_deviation() -> None:
    zero = torch.zeros(1, 4)
    assert cosine_deviation(zero, _random(1, 4)).item() == pytest.approx(1.0)
    assert torch.isfinite(transition_miss(_random(1, 4), virtual_transition(zero, _random(1, 4)))).all()


def test_losses_equal_a_softmax_written_out() -> None:
    states, labels, weight = _random(4, 3), torch.tensor([0, 2, 1, 4]), _random(5, 3)
    for n in range(4):
        logits = [float(states[n] @ w) for w in weight]
        expected = math.log(sum(map(math.exp, logits))) - logits[labels[n]]
        assert logit_lens_loss(states, labels, weight)[n].item() == pytest.approx(expected, abs=1e-5)


def test_a_vocabulary_of_several_blocks_gives_the_loss_of_the_whole() -> None:
    states, labels, weight = _random(6, 5), torch.tensor([0, 4_095, 4_096, 8_191, 8_192, 9_000]), _random(9_001, 5)
    whole = torch.nn.functional.cross_entropy(states.double() @ weight.double().T, labels, reduction="none")
    # Three partial sums in float32, each rounded once more than one sum would be.
    torch.testing.assert_close(logit_lens_loss(states, labels, weight).double(), whole, rtol=1e-6, atol=1e-5)


def _statistics(tokens: list[int], values: list[list[float]]) -> RowStatistics:
    rows = len(tokens)
    return RowStatistics(
        rows_R=np.arange(rows),
        tokens_R=np.array(tokens, dtype=float),
        deviation_RS=np.array(values),
        miss_RL=np.zeros((rows, len(values[0]) - 1)),
        loss_R=np.zeros(rows),
    )


def test_means_are_over_tokens_not_rows() -> None:
    statistics = _statistics([1, 3], [[2.0, 0.0], [3.0, 3.0]])
    np.testing.assert_allclose(statistics.mean(statistics.deviation_RS), [5 / 4, 3 / 4])


def test_a_row_drawn_twice_counts_twice() -> None:
    statistics = _statistics([1, 3], [[2.0, 0.0], [3.0, 3.0]])
    counts_BR = np.array([[1.0, 1.0], [2.0, 0.0]])
    np.testing.assert_allclose(statistics.mean(statistics.deviation_RS, counts_BR), [[5 / 4, 3 / 4], [2.0, 0.0]])


def test_the_standard_error_is_that_of_the_mean_for_rows_of_one_token() -> None:
    values = np.random.default_rng(0).normal(size=(40, 3))
    statistics = _statistics([1] * 40, values.tolist())
    expected = values.std(axis=0, ddof=1) / math.sqrt(40)
    np.testing.assert_allclose(statistics.stderr(statistics.deviation_RS), expected)


def test_a_single_row_has_no_standard_error() -> None:
    statistics = _statistics([4], [[1.0, 2.0]])
    assert statistics.stderr(statistics.deviation_RS).tolist() == [0.0, 0.0]


def test_merging_orders_rows_whoever_measured_them() -> None:
    whole = _statistics([1, 2, 3], [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])

    def part(indices: list[int]) -> RowStatistics:
        return RowStatistics(*(getattr(whole, n)[indices] for n in RowStatistics.__dataclass_fields__))

    merged = RowStatistics.merge([part([2]), RowStatistics.empty(1), part([1, 0])])
    for name in RowStatistics.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(merged, name), getattr(whole, name))


def test_the_meter_sums_over_the_tokens_of_each_row() -> None:
    labels, rows = torch.tensor([0, 1, 2]), torch.tensor([0, 1, 1])
    bases, first, second = _random(3, 4), _random(3, 4), _random(3, 4)
    meter = TransitionMeter(
        num_layers=1,
        labels_N=labels,
        rows_N=rows,
        num_rows=2,
        bases_ND=bases,
        deviation=lambda states, labels, bases: cosine_deviation(states, bases),
    )
    meter.add(0, first)
    meter.add(1, second)
    statistics = meter.finish(rows=[7, 4], loss_N=torch.tensor([1.0, 2.0, 4.0]))
    d = cosine_deviation(second, bases).double()
    m = transition_miss(second - first, virtual_transition(first, bases)).double()
    np.testing.assert_allclose(statistics.deviation_RS[:, 1], [d[0], d[1] + d[2]])
    np.testing.assert_allclose(statistics.miss_RL[:, 0], [m[0], m[1] + m[2]])
    assert statistics.rows_R.tolist() == [7, 4]
    assert statistics.tokens_R.tolist() == [1, 2]
    assert statistics.loss_R.tolist() == [1.0, 6.0]
