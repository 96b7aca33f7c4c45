"""Run one decoder layer on a few positions as it would run in training, and watch it.

Which products need a gradient towards their input, in which order they come and which tensors stay for backward is
autograd's own answer, not derived from names. Adapters do not exist yet when a cut is chosen, so LoRA's two small
products are put behind the targeted modules for the occasion. The layer is left as found: no parameter is copied, no
gradient is kept. `layer_probe.py` decides what to run and sums up.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from axolotl_layersel.model.decoder_stack import DecoderStack, first_tensor
from axolotl_layersel.model.weight_matrices import Matrix

Case = Literal["trained", "first", "passed"]
CASES: tuple[Case, ...] = ("trained", "first", "passed")


@dataclass(frozen=True)
class Call:
    """What the model handed to a layer."""

    state: Tensor  # (1, T, D)
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _AllSeen(Exception):
    """Ends a forward pass early; no error."""


def capture(stack: DecoderStack, indices: Collection[int], length: int) -> dict[int, Call]:
    """What the model hands to layers `indices` in a forward pass over `length` positions; it ends at the last."""
    calls: dict[int, Call] = {}
    handles = []

    def note(index: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[index] = Call(first_tensor(args if args else kwargs.get("hidden_states")), args, dict(kwargs))
            if len(calls) == len(indices):
                raise _AllSeen

        return hook

    weight = stack.embeddings.get_parameter("weight")
    ids = (torch.arange(length, device=weight.device) * 31 % weight.shape[0])[None]
    try:
        for index in indices:
            handles.append(stack.layers[index].register_forward_pre_hook(note(index), with_kwargs=True))
        with suppress(_AllSeen):
            stack.backbone(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if missing := sorted(set(indices) - set(calls)):
        raise ValueError(f"decoder layers {missing} did not run; costs are predicted for a model that runs all of them")
    return calls


class _Saved:
    """The storages that autograd keeps for backward while the hooks are on."""

    def __init__(self, *, ours: Iterable[Tensor], shared: Iterable[Tensor] = ()) -> None:
        self._ours = {_storage(tensor) for tensor in ours}  # parameters: there anyway
        self._shared = {_storage(tensor) for tensor in shared}
        self._alive: list[Tensor] = []  # a freed storage would give its address to another
        self.bytes: dict[int, int] = {}
        self.shared_bytes: dict[int, int] = {}
        self.tensors = 0

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        self.tensors += 1
        key = _storage(tensor)
        if key not in self._ours:
            (self.shared_bytes if key in self._shared else self.bytes)[key] = tensor.untyped_storage().nbytes()
            self._alive.append(tensor.detach())
        return tensor


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class Moved(TorchDispatchMode):
    """Adds up the bytes of the tensors that operations read and write; views and allocations move nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        returned = func._schema.returns
        view = any(one.alias_info is not None and not one.alias_info.is_write for one in returned)
        if not view and func.overloadpacket not in _MOVES_NOTHING:
            tensors = [t for t in pytree.tree_leaves((args, kwargs, output)) if isinstance(t, Tensor)]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return output


_MOVES_NOTHING = {torch.ops.aten._unsafe_view, torch.ops.aten.empty, torch.ops.aten.empty_like}


def _backward(output: Any, leaves: Iterable[Tensor]) -> int:
    """Bytes that the backward pass of a layer moves, for all leaves that need a gradient."""
    result, wanted = first_tensor(output), [leaf for leaf in leaves if leaf.requires_grad]
    moved = Moved()
    with moved:
        if result.requires_grad:
            torch.autograd.grad(result, wanted, torch.zeros_like(result), allow_unused=True)
    return moved.bytes


class Run:
    """One forward and backward pass of one layer in one case, watched."""

    def __init__(self, layer: nn.Module, matrices: Sequence[Matrix], call: Call, *, case: Case) -> None:
        self.layer, self.matrices, self.call, self.case = layer, matrices, call, case
        self.state = call.state
        self.rows = [0.0] * len(matrices)  # of the inputs, for each position
        self.input_grad: list[bool | None] = [None] * len(matrices)
        self.order: list[int] = []
        self.kept_by_last = 0  # tensors that autograd kept until the last product was done

    def go(self, *, full: bool, dropout: float) -> None:
        """Run; with `full` all parameters of a trained layer are trained, otherwise adapters."""
        trained = self.case != "passed"
        state = self.state.detach().requires_grad_(self.case != "first")
        pairs = {i: _adapter(m, state.device) for i, m in enumerate(self.matrices) if m.linear and m.rank and trained}
        ours = [*self.layer.parameters(), *self.layer.buffers(), *(t for pair in pairs.values() for t in pair)]
        given = [t for t in pytree.tree_leaves((self.call.args, self.call.kwargs)) if isinstance(t, Tensor)]
        self.saved = _Saved(ours=ours, shared=[t for t in given if t is not self.state])
        handles = []
        try:
            for i, matrix in enumerate(self.matrices):
                if i in pairs:
                    handles.append(matrix.module.register_forward_hook(_adapt(*pairs[i], dropout=dropout)))
                handles.append(matrix.module.register_forward_hook(self._watch(i), with_kwargs=True))
            call = (self.call.args, self.call.kwargs)
            args, kwargs = pytree.tree_map(lambda item: state if item is self.state else item, call)
            stacked = [m.stacked for m in self.matrices if m.stacked is not None and (full or m.rank)]
            learnt = [*self.layer.parameters()] if full else stacked
            with _in_training(self.layer, learnt if trained else []):
                with self.saved.hooks(), Moved() as moved:
                    output = self.layer(*args, **kwargs)
                self.forward_moved = moved.bytes
                leaves = [state, *self.layer.parameters(), *(one for pair in pairs.values() for one in pair)]
                self.backward_moved = _backward(output, leaves)
        finally:
            for handle in handles:
                handle.remove()

    def kept_bytes(self) -> float:
        """Kept for backward, with the sums of weights and adapters that PEFT makes of stacked tensors."""
        stacked = [m.stacked for m in self.matrices if m.stacked is not None and m.rank and self.case != "passed"]
        return float(sum(self.saved.bytes.values()) + sum(tensor.nbytes for tensor in stacked))

    def _watch(self, index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any) -> None:
            entering = first_tensor([*args, *kwargs.values()])
            self.rows[index] += entering.numel() / entering.shape[-1] / self.state.shape[-2]
            self.input_grad[index] = bool(self.input_grad[index]) or entering.requires_grad
            self.order.append(index)
            self.kept_by_last = self.saved.tensors

        return hook


def _adapter(matrix: Matrix, device: torch.device) -> tuple[nn.Parameter, nn.Parameter]:
    """LoRA's A (rank, inputs) and B (outputs, rank), in float32 as PEFT keeps them beside half precision."""
    down = torch.zeros(matrix.rank, matrix.inputs, device=device)
    return nn.Parameter(down), nn.Parameter(torch.zeros(matrix.outputs, matrix.rank, device=device))


def _adapt(down: nn.Parameter, up: nn.Parameter, *, dropout: float) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        entering = F.dropout(args[0].to(down.dtype), dropout) if dropout else args[0].to(down.dtype)
        return (output + F.linear(F.linear(entering, down), up) * 2.0).to(output.dtype)

    return hook


@contextmanager
def _in_training(module: nn.Module, learnt: Iterable[Tensor]) -> Iterator[None]:
    """With gradients and dropout, without checkpointing; afterwards as found."""
    modes = [(part, part.training) for part in module.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    checkpointed = [part for part in module.modules() if vars(part).get("gradient_checkpointing")]
    try:
        module.train()
        module.requires_grad_(False)
        for parameter in learnt:
            parameter.requires_grad_(parameter.is_floating_point())
        for part in checkpointed:
            vars(part)["gradient_checkpointing"] = False
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for part, mode in modes:
            part.training = mode
        for part in checkpointed:
            vars(part)["gradient_checkpointing"] = True


def run_head(stack: DecoderStack, config: Any, state: Tensor, *, train_head: bool) -> tuple[int, int, int]:
    """Norm, unembedding and cross-entropy of one short row: bytes kept for backward, moved forward, moved backward."""
    weights = [parameter for part in (stack.final_norm, stack.head) for parameter in part.parameters()]
    saved = _Saved(ours=weights)
    cap = getattr(config, "final_logit_softcapping", None)
    state = state.detach().requires_grad_(True)
    with (
        _in_training(stack.final_norm, stack.final_norm.parameters() if train_head else ()),
        _in_training(stack.head, stack.head.parameters() if train_head else ()),
    ):
        with saved.hooks(), Moved() as moved:
            logits_NV = stack.head(stack.final_norm(state))[0].float()
            if cap:
                logits_NV = torch.tanh(logits_NV / cap) * cap
            loss = F.cross_entropy(logits_NV, torch.zeros(len(logits_NV), dtype=torch.long, device=logits_NV.device))
        return sum(saved.bytes.values()), moved.bytes, _backward(loss, [state, *weights])
