"""What a run's plan says of its prefix cache: costs and bytes, from the config, the data and the counted layers.

Known before training opens the cache, so as if nothing were in it; `cache_run.py` counts again with what is there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from axolotl_layersel.cost.cut_cost import CutCost
from axolotl_layersel.cost.peak_memory import offloaded_bytes
from axolotl_layersel.integration.run_settings import RunSettings
from axolotl_layersel.model.decoder_stack import DecoderStack
from axolotl_layersel.plan_parts import CacheCosts, Prediction
from axolotl_layersel.prefix_cache.decision import Need
from axolotl_layersel.prefix_cache.state_store import eight_bit_bytes


def with_cache(
    settings: RunSettings,
    stack: DecoderStack,
    prediction: Prediction,
    costs: Sequence[CutCost],
    *,
    first_trainable: int,
    data_sets: Sequence[Any],
    world_size: int,
) -> Prediction:
    """The prediction with what a cache changes, for every cut; as it was where this run has none.

    Args:
        first_trainable: k.
        data_sets: of training and, if there is one, of evaluation; empty where they are not known.
        world_size: processes.
    """
    asked = settings.options.prefix_cache
    if asked == "off" or settings.cache_obstacles or not settings.stop_backward:
        return prediction
    counts = [count_tokens(rows) for rows in data_sets]
    epochs = _epochs(settings, data_sets[0], counts[0], world_size) if data_sets else settings.epochs
    eight_bits = settings.options.prefix_cache_dtype == "int8"
    needs = [
        Need(
            tokens=1,
            missing_tokens=1,
            bytes_per_token=eight_bit_bytes(cost.state_width) if eight_bits else cost.state_bytes,
            epochs=epochs,
            frozen_forward=cost.frozen_forward,
            step=cost.step,
        )
        for cost in costs
    ]
    used = [asked != "auto" or need.pays() for need in needs]
    if not any(used):
        return prediction
    runs = [need.whole_run() if cached else need.step for need, cached in zip(needs, used, strict=True)]
    prediction = dataclasses.replace(prediction, per_cut=dataclasses.replace(prediction.per_cut, whole_run=runs))
    own = needs[first_trainable]
    if first_trainable == 0 or not used[first_trainable]:
        return prediction
    known = [count for count in counts if count is not None]
    return dataclasses.replace(
        prediction,
        cache=CacheCosts(
            asked=asked,
            epochs=epochs,
            first_epoch=own.first_epoch,
            later_epochs=own.later_epochs,
            whole_run=runs[first_trainable],
            bytes_per_token=own.bytes_per_token,
            tokens=sum(known) if known and len(known) == len(counts) else None,
            offloaded_bytes=offloaded_bytes(stack, first_trainable=first_trainable) if offloads(settings, stack) else 0,
        ),
    )


def offloads(settings: RunSettings, stack: DecoderStack) -> bool:
    """Whether frozen weights leave the device of a run with a cache."""
    wanted = settings.options.offload_prefix
    eight_bit = any(hasattr(p, "SCB") for layer in stack.layers for p in layer.parameters())
    return not eight_bit and (
        wanted is True or (wanted == "auto" and torch.cuda.is_available() and not settings.use_cpu)
    )


def count_tokens(rows: Any) -> int | None:
    """Tokens of a prepared data set, repeated rows too; None where its rows are no tokens yet, or have no end."""
    if not hasattr(rows, "__len__") or "input_ids" not in (getattr(rows, "column_names", None) or ()):
        return None
    tables = rows.select_columns("input_ids").with_format("arrow").iter(4096)
    return sum(len(table["input_ids"].combine_chunks().flatten()) for table in tables)


def _epochs(settings: RunSettings, rows: Any, tokens: int | None, world_size: int) -> float:
    """How often training reads each sample."""
    if settings.max_steps is None:
        return settings.epochs
    read = settings.max_steps * settings.rows_per_step * world_size
    if settings.packs:
        return read * settings.shape.positions / tokens if tokens else settings.epochs
    return read / max(len(rows), 1)
