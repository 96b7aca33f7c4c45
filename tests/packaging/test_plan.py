"""The plan file: what is written is read back, and nothing else is accepted."""

import dataclasses
import json
import stat
from pathlib import Path

import pytest
from plans import prediction, sample

from axolotl_layersel.plan import Plan, PlanError, read_plan, write_text
from axolotl_layersel.plan_parts import Scores

PLAN = Plan(
    base_model="org/model",
    adapter="lora",
    num_layers=3,
    first_trainable=1,
    created_by={"axolotl_layersel": "0.1.0"},
    scores=Scores(
        deviation=[0.9, 0.8, 0.7, 0.6],
        deviation_stderr=[0.1, 0.1, 0.1, 0.1],
        descent=[0.2, 0.3, 0.5],
        retention=[1.0, 0.95, 0.9],
        stability={1: 0.8, 2: 0.2},
        row_cuts={0: 3},
        tokens=99,
    ),
    prediction=prediction(num_layers=3, first_trainable=1),
    sample=sample("täglich 日本"),
    seconds=1.5,
)


def _edited(part: str | None = None, **changes: object) -> str:
    """The file's text with other values, in the plan or in a part of it."""
    values = json.loads(PLAN.to_json())
    (values if part is None else values[part]).update(changes)
    return json.dumps(values)


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


def test_a_file_of_version_1_is_read_with_all_that_it_knows() -> None:
    """`plan_version_1.json` was written by a run before the version changed."""
    path = Path(__file__).with_name("plan_version_1.json")
    old, plan = json.loads(path.read_text(encoding="utf-8")), read_plan(path)
    assert plan.scores and plan.prediction and plan.sample
    assert (plan.scores.deviation, plan.scores.deviation_stderr) == (
        old["deviation"]["mean"],
        old["deviation"]["stderr"],
    )
    assert (plan.scores.descent, plan.scores.retention) == (old["weight"], old["retention"])
    assert (plan.scores.gain_source, plan.scores.pilot) == ("forward", None)
    assert {str(cut): share for cut, share in plan.scores.stability.items()} == old["stability"]
    assert (plan.scores.tokens, plan.scores.loss) == (old["sample"]["tokens"], old["sample"]["loss"])
    assert (plan.sample.rows, plan.sample.datasets) == (old["sample"]["rows"], ["data.jsonl"])
    assert plan.prediction.step == old["prediction"]["step"]
    assert plan.prediction.per_cut.backward == old["prediction"]["per_cut"]["backward"]
    assert plan.prediction.absolute.positions == old["prediction"]["absolute"]["positions"]
    assert plan.config_updates == old["config_updates"] and plan.trainable_layers == old["trainable_layers"]
    assert Plan.from_json(plan.to_json(), source="written anew") == plan


def test_a_file_of_version_1_without_scores_is_read() -> None:
    path = Path(__file__).with_name("plan_version_1.json")
    old = json.loads(path.read_text(encoding="utf-8"))
    given = dict.fromkeys(["deviation", "weight", "gain", "retention", "stability", "row_cuts", "prediction", "sample"])
    plan = Plan.from_json(json.dumps({**old, **given}), source="an old file")
    assert plan.scores is plan.prediction is plan.sample is None and plan.num_layers == 6


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
        (_edited(schema_version=99), "schema_version 99; this version reads 1 and 2"),
        (_edited(first_trainable=2), "was edited: trainable_layers is .1, 2., but first_trainable 2"),
        (
            _edited(first_trainable=3, trainable_layers=[]),
            "first_trainable is 3; a model of 3 decoder layers allows 0 to 2",
        ),
        (_edited(first_trainable="1"), "first_trainable: Input should be a valid integer, got '1'"),
        (_edited(first_trainable=True), "first_trainable: Input should be a valid integer, got 'True'"),
        (_edited(adapter="dora"), "adapter: Input should be 'lora' or 'qlora', got 'dora'"),
        (_edited(config_updates=["x"]), "config_updates: Input should be an object"),
        (_edited(surprise=1), "surprise: Unexpected keyword argument"),
        (_edited("scores", descent=[1.0]), "descent has 1 numbers; 3 layers need 3"),
        (_edited("scores", deviation=[0.1] * 3), "deviation has 3 numbers; 3 layers need 4"),
        (_edited("scores", retention_low=[0.1] * 4), "retention_low has 4 numbers; 3 layers need 3"),
        (_edited("scores", descent=[0.1, "x", 0.9]), "scores.descent.1: Input should be a valid number, got 'x'"),
        (_edited("scores", retention=[float("nan")] * 3), "scores.retention.0: Input should be a finite number"),
        (_edited("scores", stability={"one": 0.5}), "scores.stability.one.*: Input should be a valid integer"),
        (_edited("scores", row_cuts={"1": "many"}), "scores.row_cuts.1: Input should be a valid integer, got 'many'"),
        (_edited("prediction", step=None), "prediction.step: Input should be a valid number, got 'None'"),
        (_edited("prediction", per_cut={}), "prediction.per_cut.forward: Field required"),
        (json.dumps({"schema_version": 2}), "base_model: Field required; adapter: Field required"),
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
    with pytest.raises(ValueError, match="not JSON compliant"):
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
