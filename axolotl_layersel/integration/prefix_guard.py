"""The prefix cache in an axolotl run: filled before the first step, used by every batch, gone when training ends."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from axolotl_layersel.integration.cache_run import CacheRun
from axolotl_layersel.integration.log import LOG
from axolotl_layersel.integration.processes import Processes
from axolotl_layersel.integration.run_settings import RunSettings
from axolotl_layersel.plan import Plan
from axolotl_layersel.prefix_cache.state_store import PrefixCacheError
from axolotl_layersel.report.trackers import log_measured


class PrefixGuard(TrainerCallback):  # type: ignore[misc]  # transformers is Any to mypy here
    """Fill the cache, hand its states to the trained layers, and say what came of it."""

    def __init__(self, run: CacheRun) -> None:
        self.run = run

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        """Decide, fill, and install; `auto` goes on without a cache where it cannot be had."""
        epochs = float(args.num_train_epochs) if args.max_steps <= 0 else float(state.num_train_epochs)
        try:
            self.run.prepare(model, epochs=epochs)
        except PrefixCacheError as error:
            if self.run.options.prefix_cache != "auto":
                raise
            LOG.warning("layersel: prefix cache: off: %s", error)
        if state.is_world_process_zero and self.run.facts:
            log_measured(self.run.trainer, self.run.facts)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take the cache out again."""
        for cached in self.run.installed:
            cached.remove()
        if self.run.installed and self.run.processes.is_main:
            first = self.run.installed[0]
            LOG.info(
                "layersel: prefix cache: %d batches from the cache, %d through the frozen layers; recomputed in the "
                "first step, states differed by %.2g on average, rounding may give %.2g",
                sum(c.hits for c in self.run.installed),
                sum(c.misses for c in self.run.installed),
                first.worst_error,
                first.tolerance,
            )
        self.run.installed = []


def prefix_guards(
    settings: RunSettings, plan: Plan, *, trainer: Any, processes: Processes, stop_backward: bool
) -> list[PrefixGuard]:
    """The callback of a run with a cache; none where the config wants none."""
    if settings.options.prefix_cache == "off" or plan.first_trainable == 0:
        return []
    obstacles = list(settings.cache_obstacles)
    if not stop_backward and not obstacles:
        obstacles = ["something below the cut is trained, so the frozen layers have to run."]
    return [PrefixGuard(CacheRun(settings, plan, trainer=trainer, processes=processes, obstacles=obstacles))]
