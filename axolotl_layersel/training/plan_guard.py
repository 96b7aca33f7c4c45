"""What a run checks and reports while it trains: the trainable set, the first step, the plan in every checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from axolotl_layersel.log import LOG
from axolotl_layersel.model.decoder_stack import find_stack
from axolotl_layersel.plan import PLAN_FILE, PLAN_FOLDER, Plan, write_text
from axolotl_layersel.training.backward_cut import stop_backward
from axolotl_layersel.training.first_step_check import FirstStepCheck
from axolotl_layersel.training.trainable_parameters import expected_trainable


class PlanGuard(TrainerCallback):  # type: ignore[misc]  # transformers is Any to mypy here
    """Hold the run to its plan: by parameter name before the first step, by gradient in the first step.

    Args:
        plan: the plan that the run applies; written into every checkpoint, so that a resumed run finds it.
        train_norm_and_head: full fine-tuning also trains final norm and head.
        stop_backward: the backward pass ends at the cut, which the first step proves.
        reentrant: checkpointing is reentrant, with a boundary at the cut.
    """

    def __init__(self, plan: Plan, *, train_norm_and_head: bool, stop_backward: bool, reentrant: bool) -> None:
        self.plan = plan
        self.train_norm_and_head = train_norm_and_head
        self.stop_backward = stop_backward
        self.reentrant = reentrant
        self.first_step: FirstStepCheck | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        """Compare the trainable parameters with the plan; a difference stops the run with both lists."""
        stack = find_stack(model)
        expected = expected_trainable(
            [name for name, _ in model.named_parameters()],
            stack,
            first_trainable=self.plan.first_trainable,
            adapter=self.plan.adapter,
            train_norm_and_head=self.train_norm_and_head,
        )
        k = self.plan.first_trainable if self.stop_backward else 0
        stop_backward(model, layers=stack.layers, first_trainable=k, reentrant=self.reentrant)  # late wrappers, too
        self.first_step = FirstStepCheck(model, layers=stack.layers, first_trainable=k, expected_trainable=expected)
        LOG.info("layersel: %d trainable parameters match the plan, name by name", len(expected))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """After the first backward pass: no gradient below the cut, one for every trainable parameter."""
        if self.first_step is None:
            return
        self.first_step.check()
        self.first_step = None
        if self.stop_backward and self.plan.first_trainable:
            LOG.info(
                "layersel: proved in the first step: the backward pass stops at layer %d", self.plan.first_trainable
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Put the plan into the checkpoint that was just written."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            write_text(folder / PLAN_FOLDER / PLAN_FILE, self.plan.to_json())

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave no hook behind if the run ended before its first optimizer step."""
        if self.first_step is not None:
            self.first_step.detach()
            self.first_step = None
            LOG.warning(
                "layersel: training ended without a single step, so nothing was trained and nothing is proved. Unless "
                "a finished run was resumed, the data is less than one batch: with `sample_packing: true` that takes "
                "micro_batch_size x sequence_len tokens"
            )


class NoPlanGuard(TrainerCallback):  # type: ignore[misc]  # transformers is Any to mypy here
    """The callback where no layers were selected: `axolotl evaluate` makes a trainer too, and trains nothing."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop.

        Raises:
            RuntimeError: training was started without the hook that decides.
        """
        raise RuntimeError(
            "layersel is listed in `plugins:`, but no layers were selected: training was not started through "
            "axolotl.cli.train. Call axolotl.cli.train.do_train(cfg, cli_args) instead of axolotl.train.train"
        )
