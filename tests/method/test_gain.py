"""Weights, retention and marginal gain: sum rules, order, and what happens to degenerate curves."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from axolotl_layersel.method.gain import WEIGHTS, layer_weights, marginal_gain, retention

CURVES = st.integers(1, 20).flatmap(
    lambda layers: st.tuples(
        arrays(np.float64, layers + 1, elements=st.floats(0, 2)), arrays(np.float64, layers, elements=st.floats(0, 100))
    )
)


@pytest.mark.parametrize("name", sorted(WEIGHTS))
@given(curves=CURVES)
def test_weights_gains_and_retention_obey_their_sum_rules(name: str, curves: tuple) -> None:
    deviation_S, miss_L = curves
    weight_L = layer_weights(name, deviation_S=deviation_S, miss_L=miss_L)
    kept_L = retention(weight_L, exponent=0.17)
    gain_L = marginal_gain(kept_L)
    assert weight_L.shape == kept_L.shape == gain_L.shape == miss_L.shape
    assert (weight_L >= 0).all()
    assert weight_L.sum() == pytest.approx(1.0)
    assert kept_L[0] == 1.0
    assert (np.diff(kept_L) <= 0).all()
    assert gain_L.sum() == pytest.approx(1.0)
    assert (gain_L >= 0).all()


def test_each_weight_worked_by_hand() -> None:
    deviation_S, miss_L = np.array([1.0, 0.4, 0.5, 0.2]), np.array([9.0, 1.0, 3.0])
    expected = {
        "remaining": [0.4, 0.5, 0.2],
        "drop": [0.0, 0.0, 0.3],  # layer 0 (0.6) gets the least of the others; the rise of layer 1 counts as nothing
        "transition": [1.0, 1.0, 3.0],  # layer 0 (9.0) gets the least of the others
        "uniform": [1.0, 1.0, 1.0],
    }
    for name, values in expected.items():
        weight_L = layer_weights(name, deviation_S=deviation_S, miss_L=miss_L)
        np.testing.assert_allclose(weight_L, np.array(values) / sum(values), err_msg=name)


def test_retention_is_the_power_of_the_tail_of_the_weights() -> None:
    weight_L = np.array([0.5, 0.3, 0.2])
    np.testing.assert_allclose(retention(weight_L, exponent=0.5), [1.0, 0.5**0.5, 0.2**0.5])


def test_the_jump_out_of_the_embedding_space_does_not_decide() -> None:
    small, large = np.array([0.9, 0.8, 0.7, 0.4]), np.array([1.9, 0.8, 0.7, 0.4])
    for name in ("drop", "remaining"):
        weights = [layer_weights(name, deviation_S=d, miss_L=np.ones(3)) for d in (small, large)]
        np.testing.assert_allclose(weights[0], weights[1], err_msg=name)


@pytest.mark.parametrize("deviation_S", [np.full(5, 0.7), np.linspace(0.1, 0.9, 5)], ids=["flat", "rising"])
def test_a_curve_without_any_drop_gives_equal_weights(deviation_S: np.ndarray) -> None:
    np.testing.assert_allclose(layer_weights("drop", deviation_S=deviation_S, miss_L=np.zeros(4)), np.full(4, 0.25))


def test_resamples_are_computed_as_one_by_one() -> None:
    rng = np.random.default_rng(1)
    deviation_BS, miss_BL = rng.uniform(0, 1, (6, 5)), rng.uniform(0, 1, (6, 4))
    for name in WEIGHTS:
        together = retention(layer_weights(name, deviation_S=deviation_BS, miss_L=miss_BL), exponent=0.2)
        alone = [
            retention(layer_weights(name, deviation_S=d, miss_L=m), exponent=0.2)
            for d, m in zip(deviation_BS, miss_BL, strict=True)
        ]
        np.testing.assert_allclose(together, alone, err_msg=name)


def test_what_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        layer_weights("drop", deviation_S=np.array([1.0, np.nan]), miss_L=np.zeros(1))


def test_an_unknown_gain_is_refused_with_the_names_allowed() -> None:
    with pytest.raises(ValueError, match="gain is 'magic'; allowed are transition, remaining, drop, uniform"):
        layer_weights("magic", deviation_S=np.ones(2), miss_L=np.ones(1))
