"""From gains to a cut: what each policy promises, bounds, ties and resampling."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from axolotl_layersel.method.gain import retention
from axolotl_layersel.method.selection import bootstrap_counts, most_layers, select_cut, tally

GAIN_L = np.array([0.1, 0.2, 0.4, 0.2, 0.1])
RETENTION_L = np.array([1.0, 0.97, 0.9, 0.8, 0.5])


def _cut(policy: str = "coverage", **changes: object) -> int:
    options: dict = {"coverage": 0.95, "budget": 1.0, "min_layers": 1, "gain_L": GAIN_L, "retention_L": RETENTION_L}
    return select_cut(policy=policy, **{**options, **changes})


@pytest.mark.parametrize(("coverage", "cut"), [(1.0, 0), (0.97, 1), (0.95, 1), (0.8, 3), (0.5, 4), (0.01, 4)])
def test_coverage_is_the_smallest_suffix_that_keeps_its_promise(coverage: float, cut: int) -> None:
    assert _cut(coverage=coverage) == cut


def test_peak_gain_freezes_through_the_layer_of_maximum_gain() -> None:
    assert _cut("peak_gain") == 3


def test_peak_gain_at_the_output_keeps_min_layers() -> None:
    assert _cut("peak_gain", gain_L=np.array([0.0, 0.0, 0.0, 0.0, 1.0]), min_layers=2) == 3


def test_a_tie_of_the_peak_goes_to_the_input_side() -> None:
    assert _cut("peak_gain", gain_L=np.array([0.1, 0.4, 0.1, 0.4, 0.0])) == 2


@pytest.mark.parametrize(("budget", "cut"), [(1.0, 0), (5, 0), (9, 0), (0.5, 3), (2, 3), (0.6, 2), (1, 4)])
def test_the_budget_policy_trains_the_largest_suffix_allowed(budget: float, cut: int) -> None:
    assert _cut("budget", budget=budget) == cut


def test_a_budget_caps_every_policy() -> None:
    assert _cut(coverage=1.0, budget=2) == 3


def test_min_layers_bounds_every_policy() -> None:
    assert _cut(coverage=0.1, min_layers=3) == 2


def test_a_fraction_is_not_lost_to_rounding() -> None:
    assert most_layers(0.7, num_layers=10, min_layers=1) == 7


def test_a_budget_that_leaves_no_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="budget is 0.1, which is 0 of 5 decoder layers.*raise budget"):
        _cut(budget=0.1)


def test_min_layers_beyond_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match="min_layers is 6; the model has 5 decoder layers"):
        _cut(min_layers=6)


def test_what_is_not_finite_stops_the_run() -> None:
    with pytest.raises(ValueError, match="not finite"):
        _cut(retention_L=np.array([1.0, np.nan, 0.9, 0.8, 0.5]))


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="policy is 'best'; allowed are coverage, peak_gain, budget"):
        _cut("best")


@given(
    weights=st.lists(st.floats(0, 1), min_size=1, max_size=40),
    coverage=st.floats(0.01, 1.0),
    policy=st.sampled_from(["coverage", "peak_gain", "budget"]),
    fraction=st.floats(0.2, 1.0),
    draw=st.integers(0, 39),
)
def test_every_selection_is_within_its_bounds_and_keeps_coverage_unless_capped(
    weights: list[float], coverage: float, policy: str, fraction: float, draw: int
) -> None:
    num_layers = len(weights)
    assume(sum(weights) > 1e-6 and int(fraction * num_layers) >= 1)
    min_layers = 1 + draw % int(fraction * num_layers)
    weight_L = np.array(weights) / sum(weights)
    kept_L = retention(weight_L, exponent=0.17)
    cut = select_cut(
        policy=policy, gain_L=weight_L, retention_L=kept_L, coverage=coverage, budget=fraction, min_layers=min_layers
    )
    trained = num_layers - cut
    assert min_layers <= trained <= most_layers(fraction, num_layers=num_layers, min_layers=min_layers)
    if policy == "coverage" and trained < most_layers(fraction, num_layers=num_layers, min_layers=min_layers):
        assert kept_L[cut] >= coverage


def test_resamples_draw_as_many_rows_as_there_are_and_follow_the_seed() -> None:
    counts = bootstrap_counts(7, seed=1, resamples=50)
    assert counts.shape == (50, 7)
    assert (counts.sum(axis=1) == 7).all()
    np.testing.assert_array_equal(counts, bootstrap_counts(7, seed=1, resamples=50))
    assert (counts != bootstrap_counts(7, seed=2, resamples=50)).any()


def test_a_tally_is_ordered_by_cut() -> None:
    assert list(tally([3, 1, 3]).items()) == [(1, 1), (3, 2)]
