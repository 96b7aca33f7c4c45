"""What in an axolotl config forbids a prefix cache: known before anything is loaded.

A cache that was asked for by name (`ram`, `disk`) is then an error; `auto` goes without, and says why.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from axolotl_layersel.config.conflicts import names_plugin, sharded, trains_embeddings

ASKED_FOR = ("ram", "disk")


def cache_conflicts(cfg: Mapping[str, Any]) -> list[str]:
    """Sentences for everything that a prefix cache asked for by name cannot go together with."""
    block = cfg.get("layersel")
    asked = isinstance(block, Mapping) and block.get("prefix_cache") in ASKED_FOR
    if not (asked and names_plugin(cfg)):
        return []
    return [f"`prefix_cache: {block['prefix_cache']}`: {why}" for why in cache_obstacles(cfg)]  # type: ignore[index]


def cache_obstacles(cfg: Mapping[str, Any]) -> list[str]:
    """Why a run with this config cannot use a cache; empty where nothing in the config forbids it."""
    return list(_obstacles(cfg))


def _obstacles(cfg: Mapping[str, Any]) -> Iterator[str]:
    if reason := sharded(cfg):
        yield f"{reason}, and a cache needs whole layers on each process."
    if cfg.get("pretraining_dataset") or cfg.get("streaming"):
        yield "a stream shows its rows once and has no end, so there is nothing to fill a cache with before training."
    if cfg.get("skip_prepare_dataset") or cfg.get("processor_type"):
        yield "rows become tokens while training (`skip_prepare_dataset`, `processor_type`), so none is known before."
    if key := trains_embeddings(cfg):
        yield f"`{key}` trains embeddings, so states below the cut change with every step."
    block = cfg.get("layersel")
    if isinstance(block, Mapping) and block.get("stop_backward") is False:
        yield "`stop_backward: false` sends gradients through the frozen layers, which then have to run."
    if cfg.get("neftune_noise_alpha") or cfg.get("noisy_embedding_alpha"):
        yield "NEFTune adds noise to the embeddings, so a sample has other states each time: remove its key."
    if cfg.get("layer_offloading"):
        yield "`layer_offloading` moves frozen layers in and out itself: use one of the two."
    if cfg.get("qat"):
        yield "`qat` starts to quantise in the middle of a run, and states change with it."
    if cfg.get("rl") and cfg.get("lora_model_dir"):
        yield "the reference pass switches frozen adapters of `lora_model_dir` off, so a sample has two sets of states."
    if cfg.get("rl") and (cfg.get("trl") or {}).get("sync_ref_model"):
        yield "`sync_ref_model` changes the reference model as training goes on."
