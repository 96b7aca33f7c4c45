"""The prefix cache of one run: decided, opened, filled by all processes together, and put before the frozen layers.

Called by the callback in `prefix_guard.py` and by `axolotl layersel cache`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from axolotl_layersel.integration.cache_decision import decide_place
from axolotl_layersel.integration.cache_install import install_cache
from axolotl_layersel.integration.log import LOG
from axolotl_layersel.integration.processes import Processes
from axolotl_layersel.integration.run_settings import RunSettings
from axolotl_layersel.model.decoder_stack import DecoderStack, find_stack
from axolotl_layersel.model.latent_states import left_as_found
from axolotl_layersel.plan import Plan
from axolotl_layersel.prefix_cache.cached_prefix import CachedPrefix
from axolotl_layersel.prefix_cache.fill import Sample, fill_store, gather_samples
from axolotl_layersel.prefix_cache.fingerprint import prefix_fingerprint
from axolotl_layersel.prefix_cache.obstacles import find_obstacles, probe, rounding_tolerance
from axolotl_layersel.prefix_cache.state_files import FileStore
from axolotl_layersel.prefix_cache.state_store import MemoryStore, PrefixCacheError, StateStore

T = TypeVar("T")

FILL_TOKENS = {"cuda": 16_384, "cpu": 1_024}  # in a batch without gradients, or the run's own micro batch if larger
_VERSIONS = ("axolotl", "torch", "transformers", "peft")


class CacheRun:
    """What a run with this config, plan and trainer caches.

    Args:
        obstacles: what is known to forbid a cache, before the model is looked at.
    """

    def __init__(
        self, settings: RunSettings, plan: Plan, *, trainer: Any, processes: Processes, obstacles: Sequence[str] = ()
    ) -> None:
        self.settings = settings
        self.plan = plan
        self.trainer = trainer
        self.processes = processes
        self.obstacles = obstacles
        self.options = settings.options
        self.installed: list[CachedPrefix] = []  # in the model, and in a reference model beside it
        self.facts: dict[str, float] = {}  # what was found and done, for trackers

    def prepare(self, model: nn.Module, *, epochs: float, train: bool = True) -> Path:
        """Fill the cache of this run; with `train` also install it.

        Args:
            model: on its device.
            epochs: how often training reads each sample.
            train: False fills, whatever is predicted, and installs nothing.

        Returns:
            The folder of the cache, used or not.

        Raises:
            PrefixCacheError: there will be no cache, with the reason; on every process.
        """
        if self.obstacles:
            raise PrefixCacheError(" ".join(self.obstacles))
        stack, k, autocast = find_stack(model), self.plan.first_trainable, self.settings.autocast
        tolerance = rounding_tolerance(stack, first_trainable=k, autocast=autocast)
        with self.processes.stopping_together(), contextlib.ExitStack() as held:
            samples = self._samples()
            states = self._together(lambda: self._probe(model, stack, samples, tolerance))
            folder, fingerprint, about = self._identity(stack, states)
            store: StateStore = (
                self._on_disk(folder, fingerprint, states) if folder.exists() else self._in_memory(states)
            )
            if isinstance(store, FileStore):
                self._open(store, held)
            world = self.processes.world_size
            decided = self._together(
                lambda: decide_place(
                    *(self.settings, self.plan, store, samples), epochs=epochs, processes=world, train=train
                )
            )
            if decided.place == "disk" and not isinstance(store, FileStore):
                store = self._on_disk(folder, fingerprint, states)
                self._open(store, held)
            elif decided.place == "ram":
                store = self._in_memory(states)
            if isinstance(store, FileStore) and self.processes.is_main:
                store.describe(about)
            most = FILL_TOKENS.get(next(stack.layers[0].parameters()).device.type, FILL_TOKENS["cuda"])
            missing = [sample for sample in samples if sample.key not in store]
            filled = self._together(
                lambda: fill_store(
                    model,
                    stack,
                    store,
                    missing,
                    first_trainable=k,
                    batch_tokens=max(most, self.settings.batch_tokens),
                    autocast=autocast,
                    share=(self.processes.rank, world),
                    show_progress=self.processes.is_main and bool(missing),
                )
            )
            self._together(lambda: self._see_all(store, samples))
        tokens = decided.need.tokens
        self.facts = {
            "cache_bytes": decided.need.bytes,
            "cache_tokens": tokens,
            "cache_filled_tokens": sum(len(sample.ids) for sample in missing),
            "cache_filling_seconds": filled.seconds,
            **({} if decided.whole_run is None else {"cache_whole_run_predicted": decided.whole_run}),
        }
        if self.processes.is_main:
            LOG.info(
                "layersel: prefix cache: %s (%s): layers 0 to %d of %d samples, %d tokens, %.3g GB%s; %d samples were "
                "computed now, in %.1f s",
                decided.place,
                decided.why,
                k - 1,
                len(samples),
                tokens,
                decided.need.bytes / 1e9,
                f" in {folder}" if decided.place == "disk" else "",
                len(missing),
                filled.seconds,
            )
        if train:
            self.installed = install_cache(
                model,
                stack,
                store,
                first_trainable=k,
                where={sample.key: sample.where for sample in samples},
                tolerance=tolerance + store.storage_error,
                trainer=self.trainer,
                offload=self.options.offload_prefix,
                folder=self.settings.cache_folder,
            )
        return folder

    def _together(self, work: Callable[[], T]) -> T:
        """Do something on every process; where one finds that there can be no cache, all find so."""

        def attempt() -> tuple[Any, str | None]:
            try:
                mine.append(work())
            except PrefixCacheError as error:
                return None, str(error)
            return None, None

        mine: list[T] = []
        told = [reason for _, reason in self.processes.together(attempt) if reason is not None]
        if told:
            raise PrefixCacheError(told[0])
        return mine[0]

    def _samples(self) -> list[Sample]:
        """What training and evaluation will give the model, each sample once."""
        trainer = self.trainer
        sets = [("the training set", trainer.train_dataset)]
        evaluated = trainer.eval_dataset
        if isinstance(evaluated, dict):
            sets += [(f"the evaluation set {name}", rows) for name, rows in evaluated.items()]
        elif evaluated is not None:
            sets.append(("the evaluation set", evaluated))
        found: dict[bytes, Sample] = {}
        for of, rows in sets:
            for sample in gather_samples(rows, of=of, collate=trainer.data_collator):
                found.setdefault(sample.key, sample)
        if not found:
            raise PrefixCacheError("the training set is empty")
        return list(found.values())

    def _probe(self, model: nn.Module, stack: DecoderStack, samples: list[Sample], tolerance: float) -> Tensor:
        """A few states, or why there can be none."""
        found = find_obstacles(
            stack,
            first_trainable=self.plan.first_trainable,
            preference=bool(self.settings.rl),
            max_tokens=self.settings.shape.positions,
        )
        if found:
            raise PrefixCacheError(" ".join(found))
        with left_as_found(model, autocast=self.settings.autocast):
            return probe(model, stack, samples, first_trainable=self.plan.first_trainable, tolerance=tolerance)

    def _identity(self, stack: DecoderStack, states: Tensor) -> tuple[Path, str, dict[str, Any]]:
        facts = {
            "base_model": self.plan.base_model,
            "autocast": str(self.settings.autocast),
            "states": [str(states.dtype), states.shape[-1], self.options.prefix_cache_dtype],
            "versions": {name: version(name) for name in _VERSIONS},
        }
        fingerprint, about = prefix_fingerprint(stack, first_trainable=self.plan.first_trainable, facts=facts)
        return self.settings.cache_folder / fingerprint, fingerprint, about

    def _on_disk(self, folder: Path, fingerprint: str, states: Tensor) -> FileStore:
        return FileStore(
            folder,
            fingerprint=fingerprint,
            width=states.shape[-1],
            dtype=states.dtype,
            stored_as=self.options.prefix_cache_dtype,
        )

    def _in_memory(self, states: Tensor) -> MemoryStore:
        return MemoryStore(width=states.shape[-1], dtype=states.dtype, stored_as=self.options.prefix_cache_dtype)

    def _open(self, store: FileStore, held: contextlib.ExitStack) -> None:
        """Main locks and checks, then all read."""

        def check() -> None:
            if self.processes.is_main:
                held.enter_context(store.locked())
                store.load(clean=True)

        self._together(check)
        self._together(store.load)

    def _see_all(self, store: StateStore, samples: list[Sample]) -> None:
        """After filling, each process must see what the others wrote."""
        if isinstance(store, FileStore):
            store.load()
        unseen = sum(sample.key not in store for sample in samples)
        if unseen:
            raise PrefixCacheError(
                f"process {self.processes.rank} does not see {unseen} of {len(samples)} samples that others computed: "
                "the folder must be one that all machines share; set `prefix_cache_dir`"
            )
