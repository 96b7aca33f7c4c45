"""Two axolotl plugins for tests, listed in `plugins:` before the one under test."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import PartialState
from axolotl.integrations.base import BasePlugin


class FixedSeed(BasePlugin):
    """Adapters that start equal in every run: axolotl sets no seed before it makes them."""

    def register(self, cfg: Any) -> None:
        """The first hook of a run."""
        torch.manual_seed(0)


class CpuProcesses(BasePlugin):
    """Several processes on the CPU, joined by gloo, which axolotl 0.19 alone cannot do.

    It hands every process a device map that names accelerator number LOCAL_RANK, and joins the processes without
    telling accelerate that they are on the CPU. This puts both right; nothing else.
    """

    def register(self, cfg: Any) -> None:
        """The first hook: whoever joins the processes first decides for all."""
        PartialState(cpu=True)

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:
        """The first hook after the config is settled, and before the model is loaded."""
        cfg.device_map = None
