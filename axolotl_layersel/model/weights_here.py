"""Where a model's weights are, and bringing some of them to the device that computes.

    here           on the device that computes, or on some GPU: nothing moves
    host           in main memory while a GPU computes: copied to it and forgotten afterwards, the originals stay
    offloaded      on the meta device, and accelerate's hooks know where they are (RAM or disk): the hooks fetch them
    partitioned    by DeepSpeed ZeRO-3: gathered by DeepSpeed, by all processes at the same time
    missing        nowhere on this process (another one loaded them), or sharded as DTensors: refused

A model may mix them. `weights_here` brings what its modules need; what is there already, or was brought by a block
around this one, is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Place = Literal["here", "host", "offloaded", "partitioned", "missing"]


class WeightsError(ValueError):
    """Weights that this process needs cannot be brought to the device."""


def computing_device(model: nn.Module) -> torch.device:
    """The device to run a model on: where accelerate's hooks run it, else this process's GPU if there is one."""
    for module in model.modules():
        for hook in _hooks(module):
            if isinstance(hook, AlignDevicesHook) and hook.execution_device not in (None, "meta", torch.device("meta")):
                return torch.empty(0, device=hook.execution_device).device
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def places(model: nn.Module, device: torch.device) -> set[Place]:
    """Where the weights of a model are, seen from the device that computes."""
    found: set[Place] = set()
    for module in model.modules():
        fetched = any(_fetches(hook) for hook in _hooks(module))
        found |= {_place(p, device, fetched=fetched) for p in module._parameters.values() if p is not None}
    return found


@contextmanager
def weights_here(
    modules: Sequence[nn.Module], device: torch.device, *, without: Sequence[nn.Module] = ()
) -> Iterator[None]:
    """Within the block the weights of `modules` are on `device`, or on the GPU where they were; then as before.

    Partitioned weights are gathered by every process at once, so all must enter and leave in the same order.

    Args:
        modules: with all that is in them; a weight that several of them share is brought once.
        device: that computes.
        without: modules in them that stay where they are, with all that is in them.

    Raises:
        WeightsError: a weight is nowhere on this process, is sharded, or is stored in a form that does not move.
    """
    stay = {id(part) for module in without for part in module.modules()}
    parts = list({id(p): p for module in modules for p in module.modules() if id(p) not in stay}.values())
    with ExitStack() as block:
        for part in parts:
            for hook in _hooks(part):
                if _fetches(hook):
                    block.enter_context(_fetched(part, hook))
        partitioned = [p for p in _parameters(parts) if _is_away(p)]
        if partitioned:
            from deepspeed.runtime.zero import GatheredParameters

            block.enter_context(GatheredParameters(partitioned, modifier_rank=None))
        block.enter_context(_copied(parts, device))
        yield


@contextmanager
def weights_on_demand(
    modules: Iterable[nn.Module], device: torch.device, *, before: Callable[[], object] = lambda: None
) -> Iterator[None]:
    """Within the block each of `modules` has its weights on `device` while it runs, and only then.

    Args:
        before: called whenever weights are to be brought.
    """
    open_blocks: dict[int, ExitStack] = {}

    def bring(module: nn.Module, _args: Any) -> None:
        before()
        open_blocks[id(module)] = ExitStack()
        open_blocks[id(module)].enter_context(weights_here([module], device))

    def let_go(module: nn.Module, _args: Any, _output: Any) -> None:
        open_blocks.pop(id(module)).close()

    def close_rest() -> None:  # of a module whose forward pass failed
        for block in open_blocks.values():
            block.close()

    with ExitStack() as hooks:
        hooks.callback(close_rest)
        for module in modules:
            hooks.enter_context(module.register_forward_pre_hook(bring, prepend=True))
            hooks.enter_context(module.register_forward_hook(let_go))
        yield


def whole_shape(weight: Tensor) -> torch.Size:
    """The shape of a weight, although ZeRO-3 may have partitioned it."""
    return torch.Size(getattr(weight, "ds_shape", weight.shape))


def whole_bytes(module: nn.Module) -> int:
    """What the parameters of a module take when they are here."""
    return sum(whole_shape(p).numel() * p.itemsize for p in module.parameters())


def move_scales(weight: Tensor, device: torch.device) -> None:
    """Move the scales of a 4-bit weight, which its own `data` does not hold; other weights have none."""
    state = getattr(weight, "quant_state", None)
    if state is not None:
        state.to(device)


def _hooks(module: nn.Module) -> Iterator[ModelHook]:
    hook = getattr(module, "_hf_hook", None)
    if isinstance(hook, SequentialHook):
        yield from hook.hooks
    elif isinstance(hook, ModelHook):
        yield hook


def _fetches(hook: ModelHook) -> bool:
    return isinstance(hook, AlignDevicesHook) and hook.offload


def _place(weight: Tensor, device: torch.device, *, fetched: bool) -> Place:
    if _is_away(weight):
        return "partitioned"
    if isinstance(weight, DTensor):
        return "missing"
    if weight.is_meta:
        return "offloaded" if fetched else "missing"
    return "host" if weight.device.type == "cpu" and device.type != "cpu" else "here"


def _is_away(weight: Tensor) -> bool:
    """Whether ZeRO-3 has partitioned a weight, and it is not gathered now."""
    return getattr(getattr(weight, "ds_status", None), "name", "") == "NOT_AVAILABLE"


def _parameters(parts: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The parameters of modules, each once."""
    return list({id(p): p for part in parts for p in part._parameters.values() if p is not None}.values())


@contextmanager
def _fetched(module: nn.Module, hook: ModelHook) -> Iterator[None]:
    """Within the block the weights that a hook fetches in each forward pass stay, and the hook rests."""
    own = module._hf_hook
    hook.pre_forward(module)
    try:
        module._hf_hook = ModelHook()
        yield
    finally:
        module._hf_hook = own
        hook.post_forward(module, None)


@contextmanager
def _copied(parts: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Within the block modules hold copies on the device of what lies in main memory; fails for what is nowhere."""
    copies: dict[int, Tensor] = {}
    originals: list[tuple[dict[str, Any], str, Tensor]] = []
    try:
        for part in parts:
            both: tuple[dict[str, Any], dict[str, Any]] = (part._parameters, part._buffers)
            for entries in both:
                for name, tensor in entries.items():
                    if tensor is None or not _must_move(part, name, tensor, device):
                        continue
                    if id(tensor) not in copies:
                        copies[id(tensor)] = _copy(tensor, device)
                    originals.append((entries, name, tensor))
                    entries[name] = copies[id(tensor)]
        yield
    finally:
        for entries, name, tensor in originals:
            entries[name] = tensor
            move_scales(tensor, tensor.device)


def _must_move(part: nn.Module, name: str, tensor: Tensor, device: torch.device) -> bool:
    if tensor.is_meta or isinstance(tensor, DTensor):
        where = "on another process or not loaded" if tensor.is_meta else "sharded over processes"
        raise WeightsError(
            f"the weight {name!r} of a {type(part).__name__} is {where}, so it cannot be run here; allowed are weights "
            "in main memory or on a GPU, offloaded by accelerate, or partitioned by DeepSpeed ZeRO-3"
        )
    moves = tensor.device.type == "cpu" and device.type != "cpu"
    if moves and type(part).__name__ == "Linear8bitLt":
        raise WeightsError(
            "8-bit weights of bitsandbytes lie in main memory and do not move from there: load the model in 4 bit "
            "(`load_in_4bit: true`) or unquantised, or onto the GPU"
        )
    return moves


def _copy(tensor: Tensor, device: torch.device) -> Tensor:
    copy = tensor.to(device, non_blocking=True)
    if isinstance(tensor, nn.Parameter) and not isinstance(copy, nn.Parameter):
        copy = nn.Parameter(copy, requires_grad=False)
    return copy
