"""Stop the backward pass at the cut, so that frozen layers cost a forward pass and nothing else.

Freezing layers does not free them. transformers, PEFT and TRL make the output of the input embeddings require grad,
several times over, because reentrant checkpointing needs an input that does; from then on every frozen layer saves its
activations and takes part in the backward pass, and checkpointing recomputes it. `stop_backward` removes these hooks,
and on the model instance replaces the two methods that would bring them back. With non-reentrant checkpointing nothing
else is needed: autograd ends at the first trained parameter. Reentrant checkpointing needs a boundary at the last
frozen layer. Its output is detached and set to require grad, because reentrant checkpointing needs such an input.
Tiled MLPs need the same.

Where something on the input side of the cut is trained, gradients must reach it: `trained_below_cut.py` finds it, and
`restore_backward` undoes the cut. `first_step_check.py` then watches one training step and trusts none of the above.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from axolotl_layersel.log import LOG
from axolotl_layersel.model.decoder_stack import first_tensor, unwrap

# transformers (modeling_utils) uses the first name, PEFT and TRL the second, for models that have no such method.
_INPUT_GRAD_HOOKS = frozenset({"make_inputs_require_grads", "make_inputs_require_grad"})
_TILED = "_compute_params"  # an attribute of the modules that axolotl tiles (`tiled_mlp`)


class BackwardCutError(RuntimeError):
    """The backward pass does not stop where the plan says, or other parameters are trained than the plan says."""


def no_input_grads() -> None:
    """Replaces `enable_input_require_grads` on a model whose backward pass stops at the cut: does nothing."""


class CheckpointTrainedLayers:
    """Replaces `gradient_checkpointing_enable`: enables it, then disables it on frozen layers; keeps `use_reentrant`.

    An object, not a closure, so that a model that carries it can be copied and pickled and the copy's points to itself.
    """

    def __init__(
        self, *, owner: nn.Module, enable: Callable[..., None] | None, frozen: Sequence[nn.Module], reentrant: bool
    ) -> None:
        self.owner: Any = owner
        self.enable = enable  # the instance's own earlier replacement, or None for the method of the class
        self.frozen = tuple(frozen)
        self.reentrant = reentrant
        self.warned = False  # that a caller's use_reentrant is overruled: GRPO asks at every step

    def __call__(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, *args: Any, **kwargs: Any) -> None:
        """Enable checkpointing as the model would, then disable it on the frozen layers."""
        wanted = dict(gradient_checkpointing_kwargs or {})
        asked = wanted.get("use_reentrant", self.reentrant)
        if asked != self.reentrant and not self.warned:
            self.warned = True
            LOG.warning(
                "gradient checkpointing was asked for with use_reentrant=%s; %s is used, so that the backward "
                "pass stops at the first trained layer",
                asked,
                self.reentrant,
            )
        wanted["use_reentrant"] = self.reentrant
        enable = self.enable or functools.partial(type(self.owner).gradient_checkpointing_enable, self.owner)
        enable(wanted, *args, **kwargs)
        _checkpoint_off(self.frozen)


def run_plainly(_checkpoint: Any, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Replaces the `checkpoint_fn` of a torch checkpoint wrapper around a frozen layer: runs the layer and no more.

    A checkpoint saves the layer's input through any saved-tensor hooks even where nothing needs gradient, and TRL's
    activation offloading then waits for a backward pass that never asks for it.
    """
    return layer(*args, **kwargs)


def boundary(module: nn.Module, _args: Any, output: Any) -> Any:
    """Forward hook of the last frozen layer under reentrant checkpointing: make its output a leaf that requires grad.

    Raises:
        BackwardCutError: the output already needs gradient, so that a leaf would cut off something that is trained.
    """
    if not (module.training and torch.is_grad_enabled()):
        return output
    state = first_tensor(output)
    if state.requires_grad:
        raise BackwardCutError(
            "the output of the last frozen decoder layer needs gradient, so something before it is trained or was made "
            "to require grad; a boundary here would cut it off: freeze it, or train all layers"
        )
    leaf = state.detach().requires_grad_(True)
    if isinstance(output, Tensor):
        return leaf
    return type(output)(leaf if item is state else item for item in output)


def tiled_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Forward pre-hook of a tiled MLP that is trained: an input that needs no gradient becomes a leaf that does.

    The autograd functions that tile, axolotl's and DeepSpeed's, take only the input as an argument and compute the
    parameters' gradients together with its own. In the first trained layer, with adapters on the MLP alone, the input
    needs no gradient, and the parameters would get none either. No graph is cut.
    """
    if not torch.is_grad_enabled() or args[0].requires_grad or not any(p.requires_grad for p in module.parameters()):
        return None
    return (args[0].detach().requires_grad_(True), *args[1:])


def stop_backward(
    model: nn.Module, *, layers: Sequence[nn.Module], first_trainable: int, reentrant: bool = False
) -> None:
    """Make the backward pass end at layer `first_trainable`, now and after later calls by Trainer, PEFT and TRL.

    Repeating the call is harmless; it also removes what was wrapped around the instance methods in between.

    Args:
        model: the transformers model, or whatever wraps it (PEFT, DDP, torch.compile).
        layers: its decoder layers 0..L-1, input side first.
        first_trainable: k; layers below it are frozen. 0 changes nothing.
        reentrant: keep reentrant checkpointing, with a boundary hook on layer k-1; otherwise checkpointing is made
            non-reentrant, whatever a caller asks for. Not for models that are compiled: torch.compile may use one
            layer's code, without the hook, for another layer.

    Raises:
        BackwardCutError: nothing in `model` has `enable_input_require_grads`.
        ValueError: `first_trainable` is not in 0..L-1.
    """
    check_cut(layers, first_trainable)
    if first_trainable == 0:
        return
    owners = _owners(model)
    frozen = [unwrap(layer) for layer in layers[:first_trainable]]
    for owner in owners:
        vars(owner)["enable_input_require_grads"] = no_input_grads
        present = vars(owner).get("gradient_checkpointing_enable")
        stand_in = CheckpointTrainedLayers(owner=owner, enable=present, frozen=frozen, reentrant=reentrant)
        if isinstance(present, CheckpointTrainedLayers):
            stand_in.enable, stand_in.warned = present.enable, present.warned
        vars(owner)["gradient_checkpointing_enable"] = stand_in
    _strip_input_grads(model)
    _strip_additions(model)
    for module in model.modules():
        if hasattr(module, "checkpoint_fn") and unwrap(module) in frozen:
            vars(module)["checkpoint_fn"] = functools.partial(run_plainly, module.checkpoint_fn)
    if reentrant:
        layers[first_trainable - 1].register_forward_hook(boundary)
    for layer in layers[first_trainable:]:
        for module in (m for m in layer.modules() if hasattr(m, _TILED)):
            module.register_forward_pre_hook(tiled_input)
    _use_reentrant(model, reentrant)
    _checkpoint_off(frozen)


def restore_backward(model: nn.Module) -> None:
    """Undo `stop_backward`: gradients reach the input embeddings again, checkpointing covers every layer."""
    owners = _owners(model)
    if not any(vars(owner).get("enable_input_require_grads") is no_input_grads for owner in owners):
        return
    for owner in owners:
        vars(owner).pop("enable_input_require_grads", None)
        present = vars(owner).get("gradient_checkpointing_enable")
        if isinstance(present, CheckpointTrainedLayers):
            del vars(owner)["gradient_checkpointing_enable"]
            if present.enable is not None:
                vars(owner)["gradient_checkpointing_enable"] = present.enable
    _strip_additions(model)
    flagged = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    if any(module.gradient_checkpointing for module in flagged):
        for module in flagged:
            vars(module)["gradient_checkpointing"] = True
    _strip_input_grads(model)  # one hook, not one more
    enable_input_require_grads: Any = owners[0].enable_input_require_grads
    enable_input_require_grads()


def check_cut(layers: Sequence[nn.Module], first_trainable: int) -> None:
    """Refuse a cut that is not an index of `layers` with a ValueError."""
    if not 0 <= first_trainable < len(layers):
        raise ValueError(
            f"first_trainable is {first_trainable}; {len(layers)} decoder layers allow 0 to {len(layers) - 1}"
        )


def _owners(model: nn.Module) -> list[nn.Module]:
    """The transformers models in `model`, outermost first."""
    owners = [m for m in model.modules() if callable(getattr(type(m), "enable_input_require_grads", None))]
    if not owners:
        raise BackwardCutError(
            f"nothing in {type(model).__name__} has enable_input_require_grads; allowed are transformers models"
        )
    return owners


def _use_reentrant(model: nn.Module, reentrant: bool) -> None:
    """Where checkpointing is on, keep what it was enabled with, all but `use_reentrant`.

    Enabling it once more would lose what is not among its keywords, such as `offload`.
    """
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if isinstance(function, functools.partial):
            keywords = {**function.keywords, "use_reentrant": reentrant}
            vars(module)["_gradient_checkpointing_func"] = functools.partial(function.func, *function.args, **keywords)


def _checkpoint_off(layers: Iterable[nn.Module]) -> None:
    for module in (module for layer in layers for module in layer.modules()):
        if hasattr(module, "gradient_checkpointing"):
            vars(module)["gradient_checkpointing"] = False


def _strip_input_grads(model: nn.Module) -> None:
    _strip_hooks(model, is_input_grad_hook)
    for owner in _owners(model):  # the handles that transformers keeps
        vars(owner).pop("_require_grads_hook", None)
        if "_require_grads_hooks" in vars(owner):
            vars(owner)["_require_grads_hooks"] = []


def is_input_grad_hook(hook: Any) -> bool:
    """Whether a forward hook is one that makes the embeddings' output require grad."""
    return getattr(hook, "__name__", "") in _INPUT_GRAD_HOOKS


def _strip_additions(model: nn.Module) -> None:
    """Remove our boundary and tiled-MLP hooks and our checkpoint_fn replacements."""
    _strip_hooks(model, lambda hook: hook in (boundary, tiled_input))
    for module in model.modules():
        present = vars(module).get("checkpoint_fn")
        if isinstance(present, functools.partial) and present.func is run_plainly:
            vars(module)["checkpoint_fn"] = present.args[0]


def _strip_hooks(model: nn.Module, unwanted: Callable[[Any], bool]) -> None:
    for module in model.modules():
        hooks: dict[int, Any]
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if unwanted(hook)]:
                del hooks[key]
                module._forward_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_always_called.pop(key, None)
