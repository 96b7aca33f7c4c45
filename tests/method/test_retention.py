"""From a shape and what was measured to retention with a band."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from axolotl_layersel.method.gain import descent, still_to_do
from axolotl_layersel.method.retention import (
    BEYOND,
    KNOWN_FAMILIES,
    KNOWN_LAYERS,
    KNOWN_LOSSES,
    PILOT_POWER,
    PILOT_STEPS,
    forward_exponent,
    forward_law,
    mostly_noise,
    pilot_law,
    through_pilot,
    unlike_the_known,
)
from axolotl_layersel.plan_parts import Pilot, PilotCut

SHARE_L = descent(np.array([0.99, 0.97, 0.95, 0.9, 0.82, 0.7, 0.66, 0.6, 0.61, 0.55, 0.5, 0.48, 0.4]))
OFF = {3: 0.8, 6: 0.5, 8: 0.4, 10: 0.2}


def _pilot(retention: float = 0.6, *, steps: int = 15, stderr: float = 0.0, half: float | None = None) -> Pilot:
    cuts = [PilotCut(0, 1e-3, 1.0, 1.0, 0.0), PilotCut(10, 1e-3, 1.5, retention, stderr)]
    if half is not None:
        cuts.insert(1, PilotCut(6, 1e-3, 1.2, half, stderr))
    return Pilot(steps, 8, 96, 32, base_loss=2.0, cuts=cuts, switched_off=OFF, cost_share=0.01)


def test_the_curve_goes_through_the_pilot_and_mixes_both_shapes_below_it() -> None:
    curve_L = through_pilot(SHARE_L, OFF, cut=10, kept=0.6)
    left_L = still_to_do(SHARE_L)
    assert curve_L[0] == 1.0 and curve_L[10] == pytest.approx(0.6)
    mixed = {cut: np.sqrt(OFF[cut] * left_L[cut]) for cut in OFF}
    for cut in (3, 6, 8):
        assert np.log(curve_L[cut]) == pytest.approx(np.log(0.6) * np.log(mixed[cut]) / np.log(mixed[10]))
    beyond = (np.log(left_L[11]) / np.log(left_L[10])) ** BEYOND
    assert np.log(curve_L[11]) == pytest.approx(np.log(0.6) * beyond)
    assert (np.diff(curve_L) <= 0).all()


def test_a_pilot_of_a_half_corrects_the_curve_by_half_of_what_it_says_and_nothing_from_the_sixth_on() -> None:
    without_L = through_pilot(SHARE_L, OFF, cut=10, kept=0.6)
    curve_L = through_pilot(SHARE_L, OFF, cut=10, kept=0.6, half=(6, 0.7))
    assert curve_L[6] == pytest.approx(np.sqrt(0.7 * without_L[6])) and curve_L[6] < without_L[6]
    np.testing.assert_allclose(curve_L[10:], without_L[10:])
    turned_L = np.log(curve_L[1:]) / np.log(without_L[1:])
    assert turned_L[:6] == pytest.approx(turned_L[5])  # up to the half ln retention is turned as there,
    assert turned_L[5] > turned_L[6] > turned_L[8] > 1  # beyond it less and less
    assert (np.diff(curve_L) <= 0).all()


@pytest.mark.parametrize("measured", [1.2, 0.5, -0.3])
def test_a_half_that_did_better_than_all_layers_or_worse_than_a_sixth(measured: float) -> None:
    law = pilot_law(_pilot(0.6, half=measured))
    alone_L, curve_L = pilot_law(_pilot(0.6)).curve(SHARE_L), law.curve(SHARE_L)
    assert np.isfinite(curve_L).all() and (np.diff(curve_L) <= 0).all() and curve_L[0] == 1.0
    assert curve_L[10] == pytest.approx(alone_L[10]) and curve_L[6] >= alone_L[10]
    assert (curve_L[6] > alone_L[6]) == (measured > 1)


def test_a_descent_that_is_all_beyond_the_pilots_cut_still_gives_a_curve() -> None:
    curve_L = through_pilot(np.eye(12)[11], OFF, cut=10, kept=0.6)
    assert curve_L[10] == pytest.approx(0.6) and np.isfinite(curve_L).all() and (np.diff(curve_L) <= 0).all()


def test_resamples_are_weighed_like_single_ones() -> None:
    together_BL = through_pilot(np.stack([SHARE_L, SHARE_L[::-1]]), OFF, cut=10, kept=0.6)
    assert together_BL.shape == (2, 12)
    np.testing.assert_allclose(together_BL[1], through_pilot(SHARE_L[::-1], OFF, cut=10, kept=0.6))


@pytest.mark.parametrize("off", [{10: 1.2}, {3: -0.1, 10: -0.2}, {6: 1.0, 10: 0.0}])
def test_measurements_outside_of_0_to_1_still_give_a_falling_curve(off: dict[int, float]) -> None:
    curve_L = through_pilot(SHARE_L, off, cut=10, kept=0.6)
    assert np.isfinite(curve_L).all() and (np.diff(curve_L) <= 0).all() and curve_L[0] == 1.0


@pytest.mark.parametrize(("retention", "sign"), [(1.3, 1), (0.999, 1), (-0.4, -1)])
def test_a_suffix_that_did_as_well_as_all_layers_or_worse_than_none(retention: float, sign: int) -> None:
    law = pilot_law(_pilot(retention, stderr=0.02))
    curve_L, low_L, high_L = law.curve(SHARE_L), law.low(SHARE_L), law.high(SHARE_L)
    assert (low_L <= curve_L).all() and (curve_L <= high_L).all()
    assert (curve_L[10] > 0.9) if sign > 0 else (curve_L[10] < 0.1)
    if retention < 1:  # the noise of the rows is in the band, where the point itself leaves none
        assert low_L[10] < retention - 0.02 or sign < 0


def test_a_longer_pilot_is_taken_more_at_its_word() -> None:
    kept = [float(pilot_law(_pilot(steps=steps)).curve(SHARE_L)[10]) for steps in PILOT_STEPS]
    assert kept == [pytest.approx(0.6**power) for power in PILOT_POWER]
    between = float(pilot_law(_pilot(steps=11)).curve(SHARE_L)[10])
    assert kept[1] < between < kept[0]


def test_rows_that_say_less_than_the_law_are_named() -> None:
    loud, quiet = _pilot(stderr=0.3), _pilot(stderr=0.02)
    assert mostly_noise(loud) and not mostly_noise(quiet)
    assert pilot_law(loud).factor > 2 * pilot_law(quiet).factor
    assert not mostly_noise(replace(_pilot(stderr=0.1), base_loss=5.5)) and mostly_noise(_pilot(stderr=0.15))


def test_a_model_that_has_learned_little_gets_a_wider_band() -> None:
    known, tiny = (pilot_law(replace(_pilot(), base_loss=loss)) for loss in (2.0, 5.5))
    assert np.log(tiny.factor) == pytest.approx(2 * np.log(known.factor))
    assert (tiny.curve(SHARE_L) == known.curve(SHARE_L)).all()


def test_the_forward_pass_alone_has_the_wider_band_and_stays_within_the_losses_seen() -> None:
    assert forward_law(2.0).factor > pilot_law(_pilot()).factor
    assert forward_exponent(0.1) == forward_exponent(2.0) > forward_exponent(4.0) > forward_exponent(KNOWN_LOSSES[1])


def test_each_unfamiliar_thing_widens_the_band_by_name() -> None:
    known = {"num_layers": KNOWN_LAYERS[1], "loss": 2.0, "family": KNOWN_FAMILIES[0]}
    assert unlike_the_known(**known) == {}
    strange = unlike_the_known(num_layers=80, loss=0.4, family="mamba")
    assert [text.split(" (")[0] for text in strange] == [
        "80 layers", "a loss of 0.40 nats before training", "the model family mamba",
    ]  # fmt: skip
    law = pilot_law(_pilot())
    factors = [law.widened(dict(list(strange.items())[:count])).factor for count in range(4)]
    assert factors == sorted(set(factors))


def test_another_family_is_less_strange_where_a_half_was_measured() -> None:
    def factor(pilot: Pilot | None) -> float:
        (found,) = unlike_the_known(num_layers=KNOWN_LAYERS[1], loss=2.0, family="mamba", pilot=pilot).values()
        return found

    assert 1 < factor(_pilot(half=0.8)) < factor(_pilot()) == factor(None)
