"""The prefix cache in an axolotl run: filled before the first step, used by every batch, gone when training ends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from axolotl.utils.logging import get_logger
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from axolotl_layersel.integration.processes import Processes
from axolotl_layersel.integration.run_settings import autocast_of, options_of
from axolotl_layersel.model.decoder_stack import find_stack
from axolotl_layersel.model.latent_states import left_as_found
from axolotl_layersel.plan import Plan
from axolotl_layersel.prefix_cache.bypass import compute_states
from axolotl_layersel.prefix_cache.cached_prefix import CachedPrefix, needed_samples
from axolotl_layersel.prefix_cache.fill import Sample, fill_store, gather_samples, padded
from axolotl_layersel.prefix_cache.state_store import MemoryStore

LOG = get_logger("axolotl.integrations.layersel")

FILL_TOKENS = 16_384  # in a batch without gradients, or the run's own micro batch if that is larger


class PrefixGuard(TrainerCallback):  # type: ignore[misc]  # transformers is Any to mypy here
    """Fill the cache, hand its states to the trained layers, and say what came of it."""

    def __init__(self, cfg: Any, plan: Plan, *, trainer: Any, processes: Processes) -> None:
        self.cfg = cfg
        self.plan = plan
        self.trainer = trainer
        self.processes = processes
        self.cached: CachedPrefix | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        """Fill the cache and install it."""
        stack = find_stack(model)
        k = self.plan.first_trainable
        samples = list(self.samples())
        store = MemoryStore()
        device = next(stack.layers[0].parameters()).device
        with left_as_found(model, autocast=autocast_of(self.cfg)):
            probe = compute_states(stack, first_trainable=k, inputs=padded(samples[:1], device))
        missing = needed_samples(samples, store)
        filled = fill_store(
            model,
            stack,
            store,
            missing,
            first_trainable=k,
            batch_tokens=max(FILL_TOKENS, (self.cfg.micro_batch_size or 1) * self.cfg.sequence_len),
            autocast=autocast_of(self.cfg),
            show_progress=self.processes.is_main,
        )
        LOG.info("layersel: prefix cache: %d rows, %d tokens in %.1f s", filled.rows, filled.tokens, filled.seconds)
        self.cached = CachedPrefix(
            stack=stack,
            store=store,
            first_trainable=k,
            width=probe.shape[-1],
            dtype=probe.dtype,
            where={s.key: s.where for s in samples},
            tolerance=1e-3,
            pad_token_id=getattr(self.trainer.processing_class, "pad_token_id", None),
        )
        self.cached.install(model)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take the cache out again."""
        if self.cached is None:
            return
        self.cached.remove()
        counts = self.cached.counts
        LOG.info(
            "layersel: prefix cache: %d batches from the cache, %d through the frozen layers; the first batch was "
            "recomputed and differed by %.2g",
            counts.hits,
            counts.misses,
            self.cached.worst_error,
        )
        self.cached = None

    def samples(self) -> Iterator[Sample]:
        """What training and evaluation will give the model."""
        trainer = self.trainer
        yield from gather_samples(trainer.train_dataset, of="the training set", collate=trainer.data_collator)
        evaluated = trainer.eval_dataset
        if evaluated is None:
            return
        named = evaluated if isinstance(evaluated, dict) else {"": evaluated}
        for name, rows in named.items():
            of = f"the evaluation set {name}".rstrip()
            yield from gather_samples(rows, of=of, collate=trainer.data_collator)


def prefix_guards(cfg: Any, plan: Plan, *, trainer: Any, processes: Processes) -> list[PrefixGuard]:
    """The callback of a run with a cache; none where the config wants none."""
    if options_of(cfg).prefix_cache == "off" or plan.first_trainable == 0:
        return []
    return [PrefixGuard(cfg, plan, trainer=trainer, processes=processes)]
