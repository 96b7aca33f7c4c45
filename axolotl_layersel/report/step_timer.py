"""How long a run's own forward and backward passes take, and their ratio beside the predicted one.

What a step would take with every layer trained is not measured: that run never happens.

The trainer's `compute_loss` and `accelerator.backward` are timed from outside, so that no hook enters the model: after
`WARM_UP` steps, for `MEASURED` steps, then the originals are put back. On a GPU each measured pass ends with a
synchronisation, which is why it is only a few steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from axolotl_layersel.log import LOG
from axolotl_layersel.plan import Plan
from axolotl_layersel.report.trackers import log_measured

WARM_UP = 10
MEASURED = 10


class StepTimer(TrainerCallback):  # type: ignore[misc]  # transformers is Any to mypy here
    """Measures forward and backward passes once, and reports them with the plan's prediction."""

    def __init__(self, plan: Plan, *, trainer: Any) -> None:
        self.plan = plan
        self.trainer = trainer
        self.forward: list[float] = []  # seconds of each micro step
        self.backward: list[float] = []
        self._started_at: int | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Count the warm-up from here: a resumed run warms up again."""
        self._started_at = state.global_step

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start after the warm-up. DeepSpeed steps its optimizer within `backward`, so nothing is timed there."""
        if self._started_at is None or state.global_step - self._started_at != WARM_UP:
            return
        if self.trainer.is_deepspeed_enabled:
            return
        self._swap(self.trainer, "compute_loss", self.forward)
        self._swap(self.trainer.accelerator, "backward", self.backward)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop after the measured steps and say what was found."""
        if self._started_at is None or state.global_step - self._started_at != WARM_UP + MEASURED:
            return
        self._restore()
        if self.forward and self.backward and state.is_world_process_zero:
            self._report()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A short run ends before the measurement does."""
        self._restore()

    def _swap(self, owner: Any, name: str, seconds: list[float]) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            _wait()
            started = time.perf_counter()
            result = original(*args, **kwargs)
            _wait()
            seconds.append(time.perf_counter() - started)
            return result

        timed.restores = (owner, name)  # type: ignore[attr-defined]
        setattr(owner, name, timed)

    def _restore(self) -> None:
        for owner, name in ((self.trainer, "compute_loss"), (self.trainer.accelerator, "backward")):
            if hasattr(vars(owner).get(name), "restores"):
                delattr(owner, name)

    def _report(self) -> None:
        forward, backward = median(self.forward), median(self.backward)
        ratio = backward / forward
        said = f"measured over {len(self.forward)} passes: forward {forward:.4f} s, backward {backward:.4f} s"
        if self.plan.prediction:
            cost = self.plan.prediction.absolute
            said += (
                f"; backward / forward {ratio:.2f} in time, predicted {cost.backward_flops / cost.forward_flops:.2f} "
                f"in FLOPs ({cost.all_layers_backward_flops / cost.forward_flops:.2f} if every layer were trained)"
            )
        LOG.info("layersel: %s", said)
        measured = {"forward_seconds": forward, "backward_seconds": backward, "backward_per_forward": ratio}
        log_measured(self.trainer, measured)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
