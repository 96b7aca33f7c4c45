"""A plan arrives in real trackers: TensorBoard event files, an MLflow file store, an offline Weights & Biases run."""

from __future__ import annotations

import gc
import inspect
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from plans import cached, given_plan, pilot, scored_plan
from tiny import VOCABULARY, tiny_llama
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback

from axolotl_layersel.plan import PLAN_FILE, Plan, write_text
from axolotl_layersel.report.page import write_report
from axolotl_layersel.report.trackers import REPORTING, PlanTracker, log_measured, values

LAYERS = 3


class Rows(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (torch.arange(6) + index) % VOCABULARY
        return {"input_ids": tokens, "labels": tokens}


class Measuring(TrainerCallback):
    """Logs a measurement after the first step, as a run does."""

    trainer: Trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        log_measured(self.trainer, {"backward_per_forward": 0.75})


def train(folder: Path, plan: Plan, *, report_to: str) -> Trainer:
    """Train two steps with a plan's tracker attached the way a run attaches it: after the trainer was made."""
    trainer = Trainer(
        model=tiny_llama(num_layers=LAYERS),
        args=TrainingArguments(
            output_dir=str(folder / "out"),
            report_to=[report_to],
            max_steps=2,
            logging_steps=1,
            use_cpu=True,
            per_device_train_batch_size=2,
            save_strategy="no",
            disable_tqdm=True,
            run_name="a run",
            project="layersel",
        ),
        train_dataset=Rows(),
    )
    measuring = Measuring()
    measuring.trainer = trainer
    trainer.add_callback(PlanTracker(plan, folder / "layersel", trainer=trainer))
    trainer.add_callback(measuring)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def plan() -> Plan:
    return scored_plan(num_layers=LAYERS, first_trainable=1)


@pytest.fixture
def folder(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    write_text(tmp_path / "layersel" / PLAN_FILE, plan.to_json())
    write_report(plan, tmp_path / "layersel", config_text=None)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    gc.collect()


def test_values_are_flat_named_and_finite(plan: Plan) -> None:
    flat = values(plan)
    assert flat["layersel/first_trainable"] == 1.0
    assert flat["layersel/trained_layers"] == 2.0
    assert flat["layersel/predicted/step"] == pytest.approx(0.82)
    assert plan.scores
    assert [flat[f"layersel/deviation/state_{s}"] for s in range(4)] == plan.scores.deviation
    assert [flat[f"layersel/descent/layer_{i}"] for i in range(3)] == plan.scores.descent
    assert flat["layersel/predicted/retention"] == plan.scores.retention[1]
    assert all(type(value) is float and math.isfinite(value) for value in flat.values())


def test_a_pilot_s_own_numbers_are_there_where_there_was_one() -> None:
    flat = values(scored_plan(scores={"pilot": pilot()}))
    names = ("first_trainable", "retention", "retention_stderr", "cost_share")
    assert [flat[f"layersel/pilot/{name}"] for name in names] == [10.0, 0.6, 0.03, 0.019]
    assert not [name for name in values(scored_plan()) if "pilot" in name]


def test_a_prefix_cache_and_the_peak_of_memory_have_values() -> None:
    plan = cached(scored_plan(num_layers=LAYERS, first_trainable=1))
    flat = values(plan)
    assert plan.prediction and plan.prediction.cache
    for name in ("first_epoch", "later_epochs", "whole_run", "state_bytes", "offloaded_bytes"):
        assert flat[f"layersel/predicted/cache/{name}"] == getattr(plan.prediction.cache, name)
    assert flat["layersel/predicted/peak_memory_bytes"] == 5.53e9
    assert all(type(value) is float and math.isfinite(value) for value in flat.values())
    unknown = values(cached(plan, tokens=None))
    assert set(flat) - set(unknown) == {"layersel/predicted/cache/state_bytes"}


def test_layer_names_sort_in_the_order_of_the_layers() -> None:
    names = [name for name in values(scored_plan(num_layers=30)) if name.startswith("layersel/descent/")]
    assert len(names) == 30 and names == sorted(names) and names[7] == "layersel/descent/layer_07"


def test_a_given_cut_has_only_what_is_known() -> None:
    assert values(given_plan()) == {
        "layersel/first_trainable": 5.0,
        "layersel/trained_layers": 7.0,
        "layersel/num_layers": 12.0,
    }


@pytest.mark.slow
def test_tensorboard_gets_numbers_curves_text_and_figure(folder: Path, plan: Plan, monkeypatch: Any) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "events"))
    trainer = train(folder, plan, report_to="tensorboard")
    events = accumulator.EventAccumulator(str(folder / "events"), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert scalars["train/layersel/first_trainable"] == [(0, 1.0)]
    assert scalars["train/layersel/predicted/step"] == [(0, pytest.approx(0.82))]
    assert scalars["train/layersel/measured/backward_per_forward"] == [(1, 0.75), (2, 0.75)]
    assert plan.scores
    assert scalars["layersel/descent"] == [(i, pytest.approx(g)) for i, g in enumerate(plan.scores.descent)]
    assert scalars["layersel/deviation"] == [(s, pytest.approx(d)) for s, d in enumerate(plan.scores.deviation)]
    assert not [tag for tag in scalars if "layer_" in tag]
    (text,) = events.Tensors("layersel/plan/text_summary")
    assert b"## Layer selection" in text.tensor_proto.string_val[0]
    (picture,) = events.Images("layersel/figure")
    assert picture.encoded_image_string.startswith(b"\x89PNG") and picture.width > 1000
    assert "train/loss" in scalars, "the run's own logs still arrive"
    assert not any("layersel" in key for entry in trainer.state.log_history for key in entry)


@pytest.mark.slow
def test_mlflow_gets_parameters_metrics_and_files(folder: Path, plan: Plan, monkeypatch: Any) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow-skinny (extra `test`) is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (folder / "store").as_uri())
    mlflow.set_tracking_uri((folder / "store").as_uri())
    train(folder, plan, report_to="mlflow")
    client = mlflow.MlflowClient()
    (run,) = client.search_runs(["0"])
    assert run.data.params["layersel.first_trainable"] == "1"
    assert run.data.params["layersel.trainable_layers"] == "[1, 2]"
    assert run.data.params["layersel.policy"] == "coverage"
    assert run.data.metrics["layersel/first_trainable"] == 1.0
    assert run.data.metrics["layersel/measured/backward_per_forward"] == 0.75
    history = client.get_metric_history(run.info.run_id, "layersel/descent")
    assert [(m.step, m.value) for m in history] == list(enumerate(plan.scores.descent))
    files = {Path(f.path).name for f in client.list_artifacts(run.info.run_id, "layersel")}
    assert files == {"plan.json", "deviation.png", "report.html"}


@pytest.mark.slow
def test_mlflow_that_refuses_a_changed_parameter_does_not_stop_the_run(
    folder: Path, plan: Plan, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow-skinny (extra `test`) is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((folder / "store").as_uri())
    with mlflow.start_run():
        mlflow.log_param("layersel.policy", "budget")
        trainer = train(folder, plan, report_to="mlflow")
    assert trainer.state.global_step == 2
    assert "MLflow did not take all of the plan" in caplog.text


@pytest.mark.slow
def test_wandb_gets_config_summary_and_figure(folder: Path, plan: Plan, monkeypatch: Any) -> None:
    wandb = pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "DIR": str(folder), "SILENT": "true", "DISABLE_GIT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    with wandb.init(project="layersel", settings=wandb.Settings(x_disable_stats=True, console="off")) as run:
        train(folder, plan, report_to="wandb")
        config, summary = dict(run.config), dict(run.summary)
        files = Path(run.dir)
    assert config["layersel"]["trainable_layers"] == [1, 2]
    assert config["layersel"]["descent"] == plan.scores.descent
    assert summary["layersel/descent/layer_2"] == pytest.approx((plan.scores.descent)[2])
    assert summary["train/layersel/first_trainable"] == 1.0
    assert summary["train/layersel/measured/backward_per_forward"] == 0.75
    (picture,) = (files / "media" / "images" / "layersel").glob("figure_*.png")
    assert picture.read_bytes() == (folder / "layersel" / "deviation.png").read_bytes()


@pytest.mark.slow
def test_trackio_gets_config_numbers_and_figure(folder: Path, plan: Plan, monkeypatch: Any) -> None:
    trackio = pytest.importorskip("trackio")
    if "bucket_id" not in inspect.signature(trackio.init).parameters:
        pytest.skip(
            f"transformers' TrackioCallback calls trackio.init(bucket_id=...), which trackio {trackio.__version__} "
            "lacks; runs again when axolotl allows a newer trackio"
        )
    from trackio.sqlite_storage import SQLiteStorage

    train(folder, plan, report_to="trackio")
    logs = SQLiteStorage.get_logs("layersel", "a run")
    config = SQLiteStorage.get_run_config("layersel", "a run")
    merged = {name: value for entry in logs for name, value in entry.items()}
    assert merged["train/layersel/first_trainable"] == 1.0
    assert merged["train/layersel/measured/backward_per_forward"] == 0.75
    assert merged["layersel/figure"]["_type"] == "trackio.image"
    assert config["layersel"]["trainable_layers"] == [1, 2]


def test_other_trackers_get_every_number_through_their_own_callback(
    tmp_path: Path, plan: Plan, monkeypatch: Any
) -> None:
    """A tracker without curves of its own: all flat names arrive with its ordinary logs."""
    from transformers.integrations import DVCLiveCallback

    class Remembering(DVCLiveCallback):
        def __init__(self) -> None:
            self.seen: dict[str, float] = {}

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None: ...

        def on_log(self, args: Any, state: Any, control: Any, model: Any = None, logs: Any = None, **_: Any) -> None:
            self.seen.update(logs)

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None: ...

    remembering = Remembering()
    trainer = Trainer(
        model=tiny_llama(num_layers=LAYERS),
        args=TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True),
    )
    trainer.add_callback(remembering)
    callback = PlanTracker(plan, tmp_path, trainer=trainer)
    trainer.state.is_world_process_zero = False
    callback.on_train_begin(trainer.args, trainer.state, trainer.control)
    assert remembering.seen == {}, "only the main process reports"
    trainer.state.is_world_process_zero = True
    callback.on_train_begin(trainer.args, trainer.state, trainer.control)
    assert remembering.seen == values(plan)
    assert isinstance(remembering, REPORTING) and not isinstance(remembering, TensorBoardCallback)


def test_a_run_without_report_files_still_sends_its_numbers(tmp_path: Path, monkeypatch: Any) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    train(tmp_path, given_plan(num_layers=LAYERS, first_trainable=2), report_to="tensorboard")
    events = accumulator.EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert events.Scalars("train/layersel/first_trainable")[0].value == 2.0
    assert events.Tags()["images"] == []
