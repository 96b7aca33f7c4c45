"""Whether and where this run keeps a cache: its needs and the room there is, counted when training begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import psutil

from axolotl_layersel.integration.run_settings import RunSettings
from axolotl_layersel.plan import Plan
from axolotl_layersel.prefix_cache.decision import Choice, Need, Room, choose
from axolotl_layersel.prefix_cache.fill import Sample
from axolotl_layersel.prefix_cache.indexes import disk_free
from axolotl_layersel.prefix_cache.state_files import FileStore
from axolotl_layersel.prefix_cache.state_store import StateStore


@dataclass(frozen=True)
class Decided:
    """Where the cache is kept, and why."""

    place: Literal["ram", "disk"]
    why: str
    need: Need
    whole_run: float | None  # predicted work of the run, filling included, to training all layers; None: not known


def decide_place(
    settings: RunSettings,
    plan: Plan,
    store: StateStore,
    samples: Sequence[Sample],
    *,
    epochs: float,
    processes: int,
    train: bool,
) -> Decided:
    """Choose by what the samples take, what the disk holds already, and what the plan predicts.

    Args:
        store: what was found; files count as there, memory as empty.
        samples: each once.
        epochs: how often training reads each.
        processes: of the run.
        train: False: only the disk is filled, whatever is predicted.

    Raises:
        PrefixCacheError: there is no cache, because it does not fit or, for `auto`, does not pay.
    """
    there = isinstance(store, FileStore)
    k, prediction = plan.first_trainable, plan.prediction
    frozen = prediction.per_cut.frozen_forward if prediction else None
    need = Need(
        tokens=sum(len(sample.ids) for sample in samples),
        missing_tokens=sum(len(s.ids) for s in samples if not (there and s.key in store)),
        bytes_per_token=store.bytes_per_token,
        epochs=epochs,
        frozen_forward=frozen[k] if frozen else 0.0,
        step=prediction.step if prediction else 1.0,
    )
    gb = settings.options.prefix_cache_gb
    room = Room(
        free_disk=disk_free(settings.cache_folder),
        free_memory=psutil.virtual_memory().available,
        limit=None if gb is None else gb * 1e9,
        processes=processes,
    )
    choice: Choice = "disk" if not train else settings.options.prefix_cache  # type: ignore[assignment]
    place, why = choose(choice, need, room)
    if prediction is None or not train:
        return Decided(place, why, need, None)
    whole_run = need.whole_run(on_disk=place == "disk")
    why += (
        f"; predicted work to training all layers: {need.first_epoch:.2f} in the first epoch with filling, "
        f"{need.later_epochs:.2f} in later ones, {whole_run:.2f} over the whole run, "
        f"{need.step:.2f} without a cache"
    )
    return Decided(place, why, need, whole_run)
