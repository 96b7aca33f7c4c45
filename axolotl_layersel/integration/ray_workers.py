"""What the driver of a Ray run gives to its workers besides axolotl's validated config.

With `use_ray` the plugin is registered twice: in the driver with the config as the user wrote it, and in every worker
with what validation made of it, in another folder and perhaps on another machine. Called by `plugin.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

KEYS = "layersel_written_keys"  # a field of `args.LayerSelArgs`, so that validation keeps it


def config_as_written(cfg: MutableMapping[str, Any]) -> dict[str, Any]:
    """The config as the user wrote it, to share; in a Ray worker its keys, with their validated values.

    In a Ray driver this also writes into `cfg` what the workers need: the names of the keys, and an absolute path of
    the plan, because Ray moves its workers to a folder of its own.
    """
    written: list[str] | None = cfg.get(KEYS)
    if written is not None:
        return copy.deepcopy({key: cfg[key] for key in written if key in cfg})
    config = copy.deepcopy(dict(cfg))
    if cfg.get("use_ray"):
        cfg[KEYS] = list(config)
        block = cfg.get("layersel")
        if isinstance(block, Mapping) and isinstance(block.get("plan"), str):
            cfg["layersel"] = {**block, "plan": str(Path(block["plan"]).absolute())}
    return config
