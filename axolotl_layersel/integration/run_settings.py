"""What a run needs to know of axolotl's validated config, in this package's terms."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from axolotl_layersel.config.conflicts import trains_embeddings
from axolotl_layersel.config.options import LayerSelOptions
from axolotl_layersel.model.decoder_stack import DecoderStack
from axolotl_layersel.plan import PLAN_FILE, PLAN_FOLDER
from axolotl_layersel.training.trainable_parameters import resolve_train_head

AUTOCAST_TYPES = (torch.bfloat16, torch.float16)


def options_of(cfg: Mapping[str, Any]) -> LayerSelOptions:
    """The validated `layersel:` block of a config; all defaults where there is none."""
    return LayerSelOptions(**dict(cfg.get("layersel") or {}))


def plan_path(cfg: Any) -> Path:
    """Where this run's plan is written: `<output_dir>/layersel/plan.json`."""
    return Path(cfg.output_dir) / PLAN_FOLDER / PLAN_FILE


def seed_of(cfg: Any) -> int:
    """The seed of every draw; axolotl's default where the config has none."""
    return 42 if cfg.seed is None else int(cfg.seed)


def autocast_of(cfg: Any) -> torch.dtype | None:
    """The trainer's autocast dtype, or None for full precision."""
    return cfg.torch_dtype if cfg.torch_dtype in AUTOCAST_TYPES else None


def reentrant(cfg: Any) -> bool:
    """Whether reentrant checkpointing is kept: the user asked for it, and does not compile.

    A compiled layer's frame may be used for another layer, without the boundary hook.
    """
    asked = cfg.gradient_checkpointing and (cfg.gradient_checkpointing_kwargs or {}).get("use_reentrant")
    return bool(asked and not cfg.torch_compile)


def stops_backward(cfg: Any) -> bool:
    """Whether this run ends its backward pass at the cut."""
    return options_of(cfg).stop_backward and not trains_embeddings(cfg)


def trains_head(cfg: Any, stack: DecoderStack) -> bool:
    """Whether this run trains final norm and head: in full fine-tuning, where that does not reach the embeddings."""
    return not cfg.adapter and resolve_train_head(options_of(cfg).train_head, tied=stack.tied)
