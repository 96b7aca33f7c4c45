"""Two axolotl plugins for tests, listed in `plugins:` before the one under test."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from accelerate.parallelism_config import ParallelismConfig
from axolotl.integrations.base import BasePlugin
from axolotl.loaders.model import ModelLoader
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import TrainerCallback


class FixedSeed(BasePlugin):
    """Adapters that start equal in every run: axolotl sets no seed before it makes them."""

    def register(self, cfg: Any) -> None:
        """The first hook of a run."""
        torch.manual_seed(0)


class CpuProcesses(BasePlugin):
    """Several processes on the CPU, joined by gloo, which axolotl alone cannot do.

    It hands every process a device map that names accelerator number LOCAL_RANK, joins the processes without telling
    accelerate that they are on the CPU, and asks CUDA whether two of its devices reach each other, which a CUDA build
    of torch refuses to answer where there is no driver. This puts the three right; nothing else.
    """

    def register(self, cfg: Any) -> None:
        """The first hook: whoever joins the processes first decides for all."""
        PartialState(cpu=True)
        if not torch.cuda.is_available():
            torch.cuda.can_device_access_peer = lambda device, peer_device: False

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:
        """The first hook after the config is settled, and before the model is loaded."""
        cfg.device_map = None


class CpuShards(BasePlugin):
    """FSDP over processes on the CPU, joined by gloo; listed before `CpuProcesses`.

    accelerate 1.13 asks for an accelerator before it looks at the FSDP plugin (`state.py`, `AcceleratorState`), and
    axolotl 0.19 makes its device mesh of CUDA devices (`utils/distributed.py`) and loads 4-bit weights onto accelerator
    number LOCAL_RANK (`loaders/model.py`). This says that there is an accelerator, makes the mesh of CPUs, and loads
    onto the CPU.
    """

    def register(self, cfg: Any) -> None:
        """The first hook; transformers joins the processes once more later."""
        set_device = PartialState.set_device

        def set_device_and_type(state: Any) -> None:
            set_device(state)
            state.distributed_type = DistributedType.MULTI_GPU

        PartialState.set_device = set_device_and_type
        build = ParallelismConfig.build_device_mesh
        ParallelismConfig.build_device_mesh = lambda self, device_type: build(self, "cpu")
        set_device_map = ModelLoader._set_device_map_config

        def set_device_map_to_cpu(loader: Any) -> None:
            set_device_map(loader)
            if "device_map" in loader.model_kwargs:
                loader.model_kwargs["device_map"] = {"": "cpu"}

        ModelLoader._set_device_map_config = set_device_map_to_cpu

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """Say in the log what is sharded, so that a test can tell."""
        return [_SayShards()]


class _SayShards(TrainerCallback):
    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        units = [m for m in model.modules() if isinstance(m, (FSDPModule, FullyShardedDataParallel))]
        print(
            f"test: {len(units)} units are sharded, {[t.__name__ for u in units[:1] for t in type(u).__mro__[:2]]}",
            flush=True,
        )
        for trained in (True, False):
            shards = [p for p in model.parameters() if p.requires_grad == trained]
            here = sum(p.to_local().numel() for p in shards)
            print(f"test: trained {trained}: {here} of {sum(p.numel() for p in shards)} numbers are here", flush=True)


class CpuZero(BasePlugin):
    """DeepSpeed over processes on the CPU, joined by gloo; listed before `CpuProcesses`.

    DeepSpeed counts only the processes that it has joined itself, which accelerate lets it do on accelerators alone;
    and accelerate takes the run for one of DeepSpeed as long as it is not told that it is on the CPU.
    """

    def register(self, cfg: Any) -> None:
        """The first hook; transformers joins the processes once more later."""
        import deepspeed.comm

        deepspeed.comm.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
        PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_CPU)


class RayOnCpu(BasePlugin):
    """A Ray of this machine's own, with workers on the CPU.

    axolotl 0.19 asks Ray for workers with a GPU each, whatever `use_cpu` says. In the driver this takes that wish back,
    so that Ray also joins the workers by gloo, and starts Ray without a dashboard; nothing else.
    """

    def register(self, cfg: Any) -> None:
        """The first hook, in the driver and again in every worker."""
        import ray.train

        if ray.is_initialized():  # in a worker
            return
        ray.init(num_cpus=3, include_dashboard=False, object_store_memory=100 << 20)

        class CpuScaling(ray.train.ScalingConfig):
            def __post_init__(self) -> None:
                self.use_gpu = False
                super().__post_init__()

        ray.train.ScalingConfig = CpuScaling


class LayerCalls(BasePlugin):
    """Counts how often the MLP of each decoder layer ran since the first step began, evaluation included."""

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """Written to `<output_dir>/layer_calls.json` when training ends."""
        return [_LayerCalls(Path(cfg.output_dir) / "layer_calls.json")]


class _LayerCalls(TrainerCallback):
    def __init__(self, path: Path) -> None:
        self.path = path
        self.calls: Counter[str] = Counter()
        self.handles: list[Any] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        if not self.handles:
            for name, module in model.named_modules():
                if found := re.search(r"layers\.(\d+)\.mlp$", name):
                    count = partial(self._count, found[1])
                    self.handles.append(module.register_forward_hook(count))

    def _count(self, layer: str, *_: Any) -> None:
        self.calls[layer] += 1

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for handle in self.handles:
            handle.remove()
        self.path.write_text(json.dumps(self.calls), encoding="utf-8")


class SlowFilling(BasePlugin):
    """Writes each sample of a prefix cache into a file of its own, says how many there are, and takes its time."""

    def register(self, cfg: Any) -> None:
        """Stores made from now on do so."""
        from axolotl_layersel.prefix_cache.state_files import FileStore

        add = FileStore.add

        def add_and_write(store: FileStore, key: bytes, states: torch.Tensor) -> None:
            add(store, key, states)
            store.flush()
            print(f"{len(store)} rows filled", flush=True)
            time.sleep(0.2)

        FileStore.add = add_and_write
