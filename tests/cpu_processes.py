"""An axolotl plugin for tests: several processes on the CPU, which axolotl 0.19 alone cannot do.

It hands every process a device map that names accelerator number LOCAL_RANK, and joins the processes without telling
accelerate that they are on the CPU. `plugins: [cpu_processes.CpuProcesses, ...]` puts both right; nothing else.
"""

from __future__ import annotations

from typing import Any

from accelerate import PartialState
from axolotl.integrations.base import BasePlugin


class CpuProcesses(BasePlugin):
    """Gloo, and whole models on the CPU."""

    def register(self, cfg: Any) -> None:
        """The first hook: whoever joins the processes first decides for all."""
        PartialState(cpu=True)

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:
        """The first hook after the config is settled, and before the model is loaded."""
        cfg.device_map = None
