"""A plan, and what it turned out to save, in every tracker that the run reports to.

Numbers go the way of transformers' own logs, through each reporting callback, so that all trackers get them, also those
unknown here. TensorBoard, MLflow, Weights & Biases and trackio get more: curves over the layers, the options, the
figure. The console and the trainer's log history are left alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import MLflowCallback, TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from axolotl_layersel.log import LOG
from axolotl_layersel.plan import PLAN_FILE, Plan
from axolotl_layersel.report.model_card import model_card_section
from axolotl_layersel.report.wording import COSTS, shares

FIGURE, REPORT = "deviation.png", "report.html"
CACHE = ("first_epoch", "later_epochs", "whole_run", "state_bytes", "offloaded_bytes")  # of `CacheCosts`
REPORTING = tuple(INTEGRATION_TO_CALLBACK.values())
WITH_CURVES = (TensorBoardCallback, MLflowCallback, WandbCallback, TrackioCallback)


def values(plan: Plan) -> dict[str, float]:
    """All numbers of a plan under flat names, such as `layersel/descent/layer_07`; only those that the plan has."""
    flat = _main_values(plan)
    for name, unit, curve in _curves(plan):
        width = len(str(len(curve) - 1))
        flat.update({f"layersel/{name}/{unit}_{place:0{width}d}": value for place, value in enumerate(curve)})
    return flat


def log_measured(trainer: Trainer, measured: Mapping[str, float]) -> None:
    """Send measured numbers (`forward_seconds`, ...) to every tracker as `layersel/measured/<name>`."""
    _send(trainer, {f"layersel/measured/{name}": float(value) for name, value in measured.items()})


class PlanTracker(TrainerCallback):  # type: ignore[misc]  # transformers is Any to mypy here
    """Sends the plan once, after the trackers have opened their runs; only on the main process.

    Args:
        plan: the plan that the run applies.
        folder: where the run's `plan.json`, and with `report: true` the figure and the page, were written.
        trainer: whose reporting callbacks are used.
    """

    def __init__(self, plan: Plan, folder: Path, *, trainer: Trainer) -> None:
        self.plan = plan
        self.folder = folder
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Reporting callbacks are the trainer's first, so their runs are open by now."""
        if not state.is_world_process_zero:
            return
        for callback in _reporting(self.trainer):
            if isinstance(callback, TensorBoardCallback):
                _tensorboard(callback, self.plan, self.folder)
            elif isinstance(callback, MLflowCallback):
                _mlflow(self.plan, self.folder)
            elif isinstance(callback, WandbCallback):
                _wandb(self.plan, self.folder)
            elif isinstance(callback, TrackioCallback):
                _trackio(self.plan, self.folder)
        _send(self.trainer, _main_values(self.plan), everything=values(self.plan))


def _reporting(trainer: Trainer) -> list[TrainerCallback]:
    return [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, REPORTING)]


def _send(trainer: Trainer, logs: dict[str, float], *, everything: dict[str, float] | None = None) -> None:
    """Log through each reporting callback; `everything` where there is no better way for the curves."""
    for callback in _reporting(trainer):
        chosen = logs if everything is None or isinstance(callback, WITH_CURVES) else everything
        callback.on_log(trainer.args, trainer.state, trainer.control, logs=dict(chosen), model=trainer.model)


def _main_values(plan: Plan) -> dict[str, float]:
    """The numbers that stand for the plan as a whole."""
    k = plan.first_trainable
    pilot = plan.scores.pilot if plan.scores else None
    point = pilot.cuts[-1] if pilot else None
    main = {
        "first_trainable": float(k),
        "trained_layers": float(plan.num_layers - k),
        "num_layers": float(plan.num_layers),
        "scoring_seconds": plan.seconds,
        "predicted/retention": plan.scores.retention[k] if plan.scores else None,
        "pilot/first_trainable": float(point.first_trainable) if point else None,
        "pilot/retention": point.retention if point else None,
        "pilot/retention_stderr": point.retention_stderr if point else None,
        "pilot/cost_share": pilot.cost_share if pilot else None,
        "stability": shares(plan.scores.stability).get(k, 0.0) if plan.scores else None,
        **{f"predicted/{name}": getattr(plan.prediction, name, None) for name in ("forward", *COSTS)},
        **{f"predicted/cache/{name}": getattr(plan.prediction and plan.prediction.cache, name, None) for name in CACHE},
        "predicted/peak_memory_bytes": getattr(plan.prediction and plan.prediction.memory, "total", None),
    }
    return {f"layersel/{name}": float(value) for name, value in main.items() if value is not None}


def _curves(plan: Plan) -> Iterator[tuple[str, str, list[float]]]:
    """Name, what the places are, and values by place."""
    if plan.scores is not None:
        yield "deviation", "state", plan.scores.deviation
        for name in ("descent", "retention", "retention_low", "retention_high"):
            if (values := getattr(plan.scores, name)) is not None:
                yield name, "layer", values


def _options(plan: Plan) -> dict[str, Any]:
    """What was chosen and by what, for a tracker's list of parameters."""
    chosen = {
        "first_trainable": plan.first_trainable,
        "trainable_layers": plan.trainable_layers,
        "num_layers": plan.num_layers,
    }
    return {**chosen, **{name: value for name, value in plan.options.items() if value is not None}}


def _parameters(plan: Plan) -> dict[str, Any]:
    """The same with the curves, for a tracker whose parameters may be lists."""
    return {**_options(plan), **{name: curve for name, _, curve in _curves(plan)}}


def _tensorboard(callback: TensorBoardCallback, plan: Plan, folder: Path) -> None:
    """Curves with the layer as step, the table as text, the figure."""
    writer = callback.tb_writer
    for name, _, curve in _curves(plan):
        for place, value in enumerate(curve):
            writer.add_scalar(f"layersel/{name}", value, place)
    writer.add_text("layersel/plan", model_card_section(plan))
    if (folder / FIGURE).exists():
        import numpy as np
        from PIL import Image

        with Image.open(folder / FIGURE) as picture:
            writer.add_image("layersel/figure", np.asarray(picture.convert("RGB")), dataformats="HWC")
    writer.flush()


def _mlflow(plan: Plan, folder: Path) -> None:
    """Options as parameters, curves with the layer as step, the files as artifacts."""
    import mlflow

    try:
        mlflow.log_params({f"layersel.{name}": value for name, value in _options(plan).items()})
        for name, _, curve in _curves(plan):
            for place, value in enumerate(curve):
                mlflow.log_metric(f"layersel/{name}", value, step=place)
        for name in (PLAN_FILE, FIGURE, REPORT):
            if (folder / name).exists():
                mlflow.log_artifact(str(folder / name), artifact_path="layersel")
    except (mlflow.exceptions.MlflowException, OSError, ImportError) as error:
        # a resumed run with other options, or a store that takes metrics but no files: the training is not at fault
        LOG.warning("layersel: MLflow did not take all of the plan: %s", error)


def _wandb(plan: Plan, folder: Path) -> None:
    """Options and curves in the config, all numbers in the summary (no chart for each layer), the figure."""
    import wandb

    run = wandb.run
    assert run is not None  # its callback has opened it
    run.config.update({"layersel": _parameters(plan)}, allow_val_change=True)  # type: ignore[no-untyped-call]
    run.summary.update(values(plan))
    if (folder / FIGURE).exists():
        run.log({"layersel/figure": wandb.Image(str(folder / FIGURE))})


def _trackio(plan: Plan, folder: Path) -> None:
    """Options and curves in the config, which trackio stores with the first log, and the figure."""
    import trackio

    trackio.config.update({"layersel": _parameters(plan)}, allow_val_change=True)
    if (folder / FIGURE).exists():
        trackio.log({"layersel/figure": trackio.Image(str(folder / FIGURE))})
