"""The most that a GPU held in training, beside what was predicted. On a CPU nothing counts, so nothing is said."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from axolotl_layersel.log import LOG
from axolotl_layersel.plan import Plan
from axolotl_layersel.report.trackers import log_measured
from axolotl_layersel.report.wording import gigabytes

WARM_UP = 3  # steps, after which states of the optimizer are there and offloaded weights have left


class MemoryMeter(TrainerCallback):  # type: ignore[misc]  # transformers is Any to mypy here
    """Reads torch's own count of this process's device from the steps after the first ones to the end."""

    def __init__(self, plan: Plan, *, trainer: Any) -> None:
        self.plan = plan
        self.trainer = trainer
        self._steps = 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Forget what loading, filling and the first steps took."""
        self._steps += 1
        if self._steps == WARM_UP and args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(args.device)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Say both."""
        if self._steps <= WARM_UP or args.device.type != "cuda" or not state.is_world_process_zero:
            return
        measured = torch.cuda.max_memory_allocated(args.device)
        memory = self.plan.prediction and self.plan.prediction.memory
        predicted = f", {gigabytes(memory.total)} were predicted" if memory else ""
        LOG.info("layersel: at most %s of the GPU's memory were allocated%s", gigabytes(measured), predicted)
        log_measured(self.trainer, {"peak_memory_bytes": measured})
