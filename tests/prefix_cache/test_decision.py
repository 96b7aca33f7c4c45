"""A cache is used where it pays and fits; what was asked for by name and cannot be is an error with the numbers."""

import pytest

from axolotl_layersel.prefix_cache.decision import Need, Room, choose
from axolotl_layersel.prefix_cache.state_store import PrefixCacheError

GB = 10**9
NEED = Need(tokens=1_000_000, missing_tokens=1_000_000, bytes_per_token=8_192, epochs=3, frozen_forward=0.15, step=0.65)
ROOM = Room(free_disk=100 * GB, free_memory=50 * GB, limit=None, processes=1)


def need(**changes: float) -> Need:
    return Need(**{**NEED.__dict__, **changes})


def room(**changes: float | None) -> Room:
    return Room(**{**ROOM.__dict__, **changes})


def test_the_whole_run_pays_for_the_frozen_layers_once() -> None:
    assert NEED.whole_run() == pytest.approx(0.65 - 0.15 * 2 / 3)
    assert need(epochs=1).whole_run() == pytest.approx(0.65)
    assert need(missing_tokens=0).whole_run() == pytest.approx(0.5)
    assert need(missing_tokens=0).whole_run(on_disk=False) == NEED.whole_run()


@pytest.mark.parametrize(
    ("changes", "rooms", "place"),
    [
        ({}, {}, "disk"),
        ({}, {"free_disk": GB}, "ram"),
        ({"epochs": 1, "missing_tokens": 0}, {}, "disk"),  # an earlier run paid
        ({"missing_tokens": 10}, {"free_disk": GB}, "disk"),  # what is there needs no more room
    ],
)
def test_auto_finds_a_place(changes: dict[str, float], rooms: dict[str, float], place: str) -> None:
    assert choose("auto", need(**changes), room(**rooms))[0] == place


@pytest.mark.parametrize(
    ("changes", "rooms", "message"),
    [
        ({"epochs": 1}, {}, "1 epochs and 1000000 of 1000000 tokens to compute first: it would save 0.000"),
        ({"frozen_forward": 0.01}, {}, "save 0.010 of the run, less than 0.02"),
        ({}, {"free_disk": GB, "free_memory": GB}, "8.19 GB are to be kept, 1 GB of disk are free"),
        ({}, {"free_disk": GB, "processes": 2}, "GB of disk are free"),
        ({}, {"limit": 5e9}, "`prefix_cache_gb` allows 5.0 GB"),
    ],
)
def test_auto_goes_without(changes: dict[str, float], rooms: dict[str, float], message: str) -> None:
    with pytest.raises(PrefixCacheError, match=message):
        choose("auto", need(**changes), room(**rooms))


def test_what_is_asked_for_need_not_pay() -> None:
    assert choose("disk", need(epochs=1), ROOM)[0] == "disk"
    assert choose("ram", need(epochs=1), ROOM)[0] == "ram"


@pytest.mark.parametrize(
    ("choice", "rooms", "message"),
    [
        ("ram", {"processes": 2}, "keeps states in one process, and this run has 2"),
        ("ram", {"free_memory": 10 * GB}, "8.19 GB are to be kept, 10 GB of memory are free, of which 0.8"),
        ("disk", {"free_disk": 10 * GB}, "8.19 GB are to be kept, 10 GB of disk are free"),
    ],
)
def test_what_is_asked_for_must_fit(choice: str, rooms: dict[str, float], message: str) -> None:
    with pytest.raises(PrefixCacheError, match=message):
        choose(choice, NEED, room(**rooms))  # type: ignore[arg-type]
