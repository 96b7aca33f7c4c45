"""Hold a run to its plan: the trainable parameters by name, and, in the first step, where the gradients go.

Nothing here trusts what `backward_cut.py` did. The output of the last frozen layer must need no gradient, and every
trainable parameter whose module ran must get one; a module that did not run in the step, such as an expert without
tokens, is excused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from axolotl_layersel.log import LOG
from axolotl_layersel.model.decoder_stack import unwrap
from axolotl_layersel.model.parameter_names import normalise, shorten
from axolotl_layersel.training.backward_cut import BackwardCutError, boundary, check_cut, is_input_grad_hook


def check_trainable(model: nn.Module, *, expected: Collection[str]) -> None:
    """Compare the parameters that require grad with the plan's, by name and without regard to wrappers.

    Raises:
        BackwardCutError: with the names that are missing and those that are trained although the plan freezes them.
    """
    trained = {normalise(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    planned = {normalise(name) for name in expected}
    if not planned:
        raise BackwardCutError("the plan trains no parameter at all")
    if trained != planned:
        raise BackwardCutError(
            f"the trainable parameters are not those of the plan; "
            f"missing, {len(planned - trained)}: {shorten(planned - trained)}; "
            f"unexpected, {len(trained - planned)}: {shorten(trained - planned)}"
        )


class FirstStepCheck:
    """Watches one training step: the last frozen layer must need no gradient, every trained parameter must get one.

    Made before the first forward pass; `check` comes after the first backward pass and before the optimizer step. A
    compiled model is compiled once more when the hooks go; which of its modules ran is not known.

    Raises:
        BackwardCutError: the trainable parameters are not the expected ones, or the layers not those of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Sequence[nn.Module],
        first_trainable: int,
        expected_trainable: Collection[str],
    ) -> None:
        check_cut(layers, first_trainable)
        check_trainable(model, expected=expected_trainable)
        modules = {id(module) for module in model.modules()}
        if not all(id(unwrap(layer)) in modules for layer in layers):
            raise BackwardCutError("the decoder layers to watch are not part of the model")
        self._model, self._layers, self._cut = model, tuple(layers), first_trainable
        self._needed: set[bool] = set()  # did the output of layer k-1 need gradient, in a pass with gradients on
        self._ran: set[str] = set()  # parameters whose module ran outside of compiled code, and decoder layers
        self._reached: set[str] = set()  # parameters that got a gradient
        self._parameters = {normalise(name): p for name, p in model.named_parameters() if p.requires_grad}
        self._handles = list(self._watch())

    def _watch(self) -> Iterator[RemovableHandle]:
        if self._cut > 0:
            yield self._layers[self._cut - 1].register_forward_hook(self._watch_boundary)
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        for module in self._model.modules():
            owned = [names[id(p)] for p in module.parameters(recurse=False) if p.requires_grad]
            if owned:
                yield module.register_forward_hook(self._note_run(owned))
        for index in range(self._cut, len(self._layers)):
            yield self._layers[index].register_forward_hook(self._note_run([f"decoder layer {index}"]))
        for name, parameter in self._parameters.items():
            yield parameter.register_hook(self._note_gradient(name))

    def detach(self) -> None:
        """Remove the hooks; nothing of this check stays in the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def check(self) -> list[str]:
        """Check the step that was watched, and remove the hooks.

        Returns:
            The trained parameters that got no gradient because their module did not run, such as those of experts
            that no token was routed to.

        Raises:
            BackwardCutError: with the layer or module that needed a gradient, or got none.
        """
        self.detach()
        if self._cut > 0:
            self._check_boundary()
        without = [n for n, p in self._parameters.items() if not (n in self._reached or p.grad is not None)]
        without = [name for name in without if self._parameters[name].numel()]  # an empty shard gets none
        silent = {name.rpartition(".")[0] for name in without if name in self._ran}
        if silent:
            raise BackwardCutError(f"ran in the first step but got no gradient: {shorten(silent)}")
        for index in range(self._cut, len(self._layers)):
            ids = {id(parameter) for parameter in self._layers[index].parameters()}
            inside = [name for name, parameter in self._parameters.items() if id(parameter) in ids]
            ran = not self._ran or f"decoder layer {index}" in self._ran
            if ran and inside and set(inside) <= set(without):
                # Fused kernels read weights without running modules; only a whole layer without gradient shows it.
                raise BackwardCutError(
                    f"decoder layer {index} ran in the first step, but none of its {len(inside)} trained parameters "
                    f"got a gradient: {shorten(inside)}"
                )
        if len(without) == len(self._parameters):
            raise BackwardCutError(f"no trained parameter got a gradient in the first step: {shorten(without)}")
        if without:
            LOG.info("no gradient in the first step, because their modules did not run: %s", shorten(without))
        return without

    def _check_boundary(self) -> None:
        last = unwrap(self._layers[self._cut - 1])
        where = next(normalise(name) for name, module in self._model.named_modules() if module is last)
        if not self._needed and not self._reached:
            raise BackwardCutError(
                f"decoder layer {self._cut - 1} ({where}) did not run with gradients on before the check, so "
                "nothing is proved; check after the first backward pass"
            )
        if not self._needed:  # compiled code need not run hooks: what could make the output need gradient?
            LOG.info("decoder layer %d is compiled; that the backward pass stops is seen from the model", self._cut - 1)
            frozen = [parameter for layer in self._layers[: self._cut] for parameter in layer.parameters()]
            hooks = [hook for module in self._model.modules() for hook in module._forward_hooks.values()]
            self._needed.add(any(p.requires_grad for p in frozen) or any(is_input_grad_hook(hook) for hook in hooks))
        if True in self._needed:
            raise BackwardCutError(
                f"the output of frozen decoder layer {self._cut - 1} ({where}) needs gradient, so the backward pass "
                f"does not stop at the cut {self._cut}; something before it is trained or was made to require grad"
            )

    def _watch_boundary(self, module: nn.Module, _args: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            held = boundary in module._forward_hooks.values()
            tensors = output if isinstance(output, (tuple, list)) else (output,)
            need = [t for t in tensors if isinstance(t, Tensor) and t.requires_grad and not (held and t.is_leaf)]
            self._needed.add(bool(need))

    def _note_run(self, names: list[str]) -> Callable[[nn.Module, Any, Any], None]:
        def note(_module: nn.Module, _args: Any, _output: Any) -> None:
            if not torch.compiler.is_compiling():  # a side effect inside a checkpoint would break the graph
                self._ran.update(names)

        return note

    def _note_gradient(self, name: str) -> Callable[[Tensor], None]:
        # Not `parameter.grad` alone: DeepSpeed moves gradients away from it during the backward pass.
        def note(_gradient: Tensor) -> None:
            self._reached.add(name)

        return note
