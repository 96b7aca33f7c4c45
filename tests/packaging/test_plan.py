"""The plan file: what is written is read back, and nothing else is accepted."""

import dataclasses
import json
import stat
from pathlib import Path

import pytest

from axolotl_layersel.plan import Plan, PlanError, read_plan, write_text

PLAN = Plan(
    base_model="org/model",
    adapter="lora",
    num_layers=3,
    first_trainable=1,
    created_by={"axolotl_layersel": "0.1.0"},
    deviation={"mean": [0.9, 0.8, 0.7, 0.6], "stderr": [0.1, 0.1, 0.1, 0.1]},
    weight=[0.2, 0.3, 0.5],
    gain=[0.05, 0.05, 0.9],
    retention=[1.0, 0.95, 0.9],
    stability={"1": 0.8, "2": 0.2},
    row_cuts={"0": 3},
    sample={"rows": 3, "datasets": ["täglich 日本"]},
    seconds=1.5,
)


def _edited(**changes: object) -> str:
    return json.dumps({**json.loads(PLAN.to_json()), **changes})


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "a folder" / "plan.json"
    write_text(path, PLAN.to_json())
    assert read_plan(path) == PLAN


def test_equal_plans_are_equal_bytes_with_the_keys_in_order() -> None:
    text = PLAN.to_json()
    assert text == dataclasses.replace(PLAN).to_json()
    keys = list(json.loads(text))
    assert keys[:8] == [
        "schema_version",
        "created_by",
        "base_model",
        "revision",
        "adapter",
        "num_layers",
        "first_trainable",
        "trainable_layers",
    ]
    assert set(keys) == {f.name for f in dataclasses.fields(Plan)} | {"trainable_layers"}


def test_a_plan_is_found_in_a_run_s_folder_and_in_a_checkpoint(tmp_path: Path) -> None:
    write_text(tmp_path / "layersel" / "plan.json", PLAN.to_json())
    assert read_plan(tmp_path) == read_plan(tmp_path / "layersel") == PLAN


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a plan"),
        (PLAN.to_json()[:200], "is not a plan"),
        ("[]", "has no schema_version"),
        ('{"base_model": "m"}', "has no schema_version"),
        (_edited(schema_version=99), "schema_version 99; this version reads 1"),
        (_edited(first_trainable=2), "was edited: trainable_layers is .1, 2., but first_trainable 2"),
        (
            _edited(first_trainable=3, trainable_layers=[]),
            "first_trainable is 3; a model of 3 decoder layers allows 0 to 2",
        ),
        (_edited(first_trainable="1"), "first_trainable is '1'; allowed is a whole number"),
        (_edited(adapter="dora"), "adapter is 'dora'; allowed is"),
        (_edited(gain=[1.0]), "gain is .1.0.; allowed is 3 finite numbers"),
        (_edited(weight=[0.1, "x", 0.9]), "weight is .*; allowed is 3 finite numbers"),
        (_edited(retention=[float("nan")] * 3), "retention is .*; allowed is 3 finite numbers"),
        (_edited(deviation={"mean": [0.1]}), "deviation mean is not 4 finite numbers"),
        (_edited(config_updates=["x"]), "config_updates is .*; allowed is a mapping"),
        (_edited(stability={"one": 0.5}), "stability is .*; allowed is a number for each cut"),
        (_edited(row_cuts={"1": "many"}), "row_cuts is .*; allowed is a number for each cut"),
        (_edited(surprise=1), "unknown keys .'surprise'."),
        (json.dumps({"schema_version": 1}), "lacks the keys"),
    ],
)
def test_a_file_that_is_no_plan_is_refused_with_the_reason(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PlanError, match=message):
        read_plan(path)


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot be read.*give the path of a plan.json"):
        read_plan(tmp_path / "none.json")
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="cannot be read"):
        read_plan(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model": "other"}, "base_model 'org/model', this run has 'other'"),
        ({"adapter": None}, "adapter 'lora', this run has None"),
        ({"num_layers": 4}, "num_layers 3, this run has 4"),
    ],
)
def test_a_plan_for_something_else_is_refused_with_both_values(changes: dict, message: str) -> None:
    values = {"base_model": "org/model", "adapter": "lora", "num_layers": 3, **changes}
    with pytest.raises(PlanError, match=message):
        PLAN.check_fits(**values, source="plan.json")


def test_numbers_that_are_not_finite_are_never_written() -> None:
    with pytest.raises(ValueError, match="Out of range"):
        dataclasses.replace(PLAN, seconds=float("inf")).to_json()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def test_the_file_is_readable_by_others(tmp_path: Path) -> None:
    write_text(tmp_path / "plan.json", "{}")
    assert stat.S_IMODE((tmp_path / "plan.json").stat().st_mode) == 0o644
