"""The descent, what a cut keeps of the improvement, and SALF's gain: sum rules, order, and degenerate curves."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from axolotl_layersel.method.gain import EVEN, descent, retention, still_to_do, transition_gain

CURVES = st.integers(1, 20).flatmap(lambda layers: arrays(np.float64, layers + 1, elements=st.floats(0, 2)))


@given(deviation_S=CURVES)
def test_shares_and_retention_obey_their_sum_rules(deviation_S: np.ndarray) -> None:
    share_L = descent(deviation_S)
    kept_L = retention(share_L, exponent=0.7)
    assert share_L.shape == kept_L.shape == deviation_S[1:].shape
    assert (share_L >= 0).all()
    assert share_L.sum() == pytest.approx(1.0)
    assert kept_L[0] == 1.0 and (kept_L > 0).all()
    assert (np.diff(kept_L) <= 1e-12).all()


def test_what_a_suffix_still_has_to_do_worked_by_hand() -> None:
    """States .9, .8, .9, .5, .3: the highest from state 1 on is .9, and .6 above the last one."""
    left_L = still_to_do(descent(np.array([0.95, 0.8, 0.9, 0.5, 0.3])))
    # s(0) = s(1) = s(2) = 1: the rise in layer 1 leaves as much to do; s(3) = (.5 - .3) / .6; plus the even share.
    even = np.array([1.0, 0.75, 0.5, 0.25])
    np.testing.assert_allclose(left_L, (1 - EVEN) * np.array([1.0, 1.0, 1.0, 1 / 3]) + EVEN * even)


def test_retention_is_a_power_of_what_is_left() -> None:
    share_L = np.array([0.5, 0.3, 0.2])
    np.testing.assert_allclose(retention(share_L, exponent=0.5), [1.0, 0.5**0.5, 0.2**0.5])


def test_the_jump_out_of_the_embedding_space_does_not_decide() -> None:
    small, large = np.array([0.9, 0.8, 0.7, 0.4]), np.array([1.9, 0.8, 0.7, 0.4])
    np.testing.assert_allclose(descent(small), descent(large))


@pytest.mark.parametrize("deviation_S", [np.full(5, 0.7), np.linspace(0.1, 0.9, 5)], ids=["flat", "rising"])
def test_a_curve_that_never_falls_gives_equal_shares(deviation_S: np.ndarray) -> None:
    np.testing.assert_allclose(descent(deviation_S), np.full(4, 0.25))


def test_a_layer_is_worth_its_even_share_where_the_deviation_rises_to_the_end() -> None:
    left_L = still_to_do(descent(np.array([0.9, 0.9, 0.4, 0.5, 0.6])))
    assert left_L[3] == pytest.approx(EVEN / 4)


def test_salf_s_gain_gives_layer_0_the_least_of_the_others() -> None:
    np.testing.assert_allclose(transition_gain(np.array([9.0, 1.0, 3.0])), np.array([1.0, 1.0, 3.0]) / 5)
    np.testing.assert_allclose(transition_gain(np.zeros(3)), np.full(3, 1 / 3))


def test_resamples_are_computed_as_one_by_one() -> None:
    deviation_BS = np.random.default_rng(1).uniform(0, 1, (6, 5))
    together = retention(descent(deviation_BS), exponent=0.2)
    np.testing.assert_allclose(together, [retention(descent(row_S), exponent=0.2) for row_S in deviation_BS])


def test_the_curve_that_it_is_given_is_left_alone() -> None:
    miss_L = np.array([9.0, 1.0, 3.0])
    transition_gain(miss_L)
    assert miss_L[0] == 9.0


def test_what_is_not_finite_is_refused() -> None:
    for function in (descent, transition_gain):
        with pytest.raises(ValueError, match="not finite"):
            function(np.array([1.0, np.nan]))
