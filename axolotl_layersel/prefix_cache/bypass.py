"""Hand cached states to the first trained layer, and let no layer below it run.

Each frozen layer gets another `forward`, on the instance: where the states of the batch are known, layer 0 returns them
and the others pass them on; where they are not, all run as before. The backbone is asked first, by a hook, because it
alone is called with token ids. It still embeds them, makes masks and position embeddings, which the layers above need.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from axolotl_layersel.model.decoder_stack import DecoderStack, first_tensor, unwrap
from axolotl_layersel.model.replaced_forward import replaced_forward
from axolotl_layersel.prefix_cache.state_store import PrefixCacheError


@dataclass(frozen=True)
class TokenInputs:
    """What the backbone was called with, as far as the output of its frozen layers depends on it."""

    input_ids: Tensor  # (B, T)
    attention_mask: Tensor | None  # (B, T)
    position_ids: Tensor | None = None  # (B, T) or (1, T)
    call: tuple[tuple[Any, ...], dict[str, Any]] | None = None  # the arguments as they were given, all of them


# Asked with None where nothing could be cached; answers (B, T, D) on the model's device, or None: the layers run.
StatesOf = Callable[["TokenInputs | None"], "Tensor | None"]


class _Layer:
    """Stands in for the `forward` of a layer; an object, so that a model that carries it can be copied."""

    def __init__(self, bypass: PrefixBypass, module: nn.Module, *, enters: bool) -> None:
        self.bypass = bypass
        self.enters = enters  # layer 0, where the states come in
        self.own = vars(module).get("forward")  # what stood on the instance, or None for the method of the class
        self.run: Callable[..., Any] = module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bypass = self.bypass
        if bypass.states is None:
            output = self.run(*args, **kwargs)
            bypass.returns_tuple = not isinstance(output, Tensor)
            return output
        if self.enters:
            return bypass.as_output(bypass.states)
        return bypass.as_output(first_tensor(args if args else kwargs.get("hidden_states")))


class _Embeddings:
    """Stands in for the `forward` of the token embeddings: their output is not read where layer 0 ignores its input."""

    def __init__(self, bypass: PrefixBypass, module: nn.Embedding) -> None:
        self.bypass = bypass
        self.own = vars(module).get("forward")
        self.run: Callable[..., Any] = module.forward
        self.module = module

    def __call__(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.bypass.states is None:
            return self.run(input, *args, **kwargs)
        weight = self.module.weight
        return torch.zeros((*input.shape, self.module.embedding_dim), dtype=weight.dtype, device=input.device)


class PrefixBypass:
    """Asks for the states of every batch, and keeps the layers below the cut from running where it gets them.

    Args:
        stack: of the model in training, with adapters or without.
        first_trainable: k, above 0.
        states_of: called before each batch; must return what layer k would be given, or None.
    """

    def __init__(self, stack: DecoderStack, *, first_trainable: int, states_of: StatesOf) -> None:
        self.stack = stack
        self.first_trainable = first_trainable
        self.states_of = states_of
        self.enabled = True  # False: every batch runs through the layers, as without a cache
        self.states: Tensor | None = None  # of the batch that is in the model now
        self.returns_tuple: bool | None = None  # whose first entry is the hidden state; None until a layer ran
        self._signature = inspect.signature(stack.backbone.forward)
        self._handles: list[RemovableHandle] = []
        self._layers: list[nn.Module] = []

    def install(self) -> None:
        """Replace the layers' `forward` and watch the backbone."""
        self.remove()
        for index, layer in enumerate(self.stack.layers[: self.first_trainable]):
            module = unwrap(layer)
            vars(module)["forward"] = _Layer(self, module, enters=index == 0)
            self._layers.append(module)
        if isinstance(self.stack.embeddings, nn.Embedding):
            vars(self.stack.embeddings)["forward"] = _Embeddings(self, self.stack.embeddings)
            self._layers.append(self.stack.embeddings)
        before = torch.compiler.disable(self._before)  # looking samples up is no tensor program
        self._handles = [
            self.stack.backbone.register_forward_pre_hook(before, with_kwargs=True),
            self.stack.backbone.register_forward_hook(self._after, always_call=True),
        ]

    def remove(self) -> None:
        """Leave the model as it was found."""
        for handle in self._handles:
            handle.remove()
        for module in self._layers:
            own = vars(module).pop("forward").own
            if own is not None:
                vars(module)["forward"] = own
        self._handles, self._layers, self.states = [], [], None

    def as_output(self, state: Tensor) -> Any:
        """A state in the form in which this model's layers return it."""
        return (state, None) if self.returns_tuple else state

    def _before(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.states = None
        if self.enabled:
            self.states = self.states_of(self._token_inputs(args, kwargs))

    def _after(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        self.states = None

    def _token_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TokenInputs | None:
        """What a batch can be looked up by, or None where somebody wants more than the last layer's output."""
        given: dict[str, Any] = self._signature.bind_partial(*args, **kwargs).arguments
        for name, parameter in self._signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                given = {**given, **given.pop(name, {})}
        if given.get("past_key_values") is not None or given.get("inputs_embeds") is not None:
            return None
        if given.get("output_hidden_states") or given.get("output_attentions"):
            return None
        ids, mask, positions = (given.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            return None
        for other in (mask, positions):
            if other is not None and not (isinstance(other, Tensor) and other.dim() == 2):
                return None
        return TokenInputs(ids, mask, positions, (args, kwargs))


@contextmanager
def only_the_prefix(stack: DecoderStack, *, first_trainable: int) -> Iterator[Callable[[], Tensor]]:
    """Within the block the layers from k on pass on what they are given; yields a function that returns it.

    What the function returns is the input of layer k in the last call of the backbone, (B, T, D).
    """
    seen: list[Tensor] = []
    form = {"tuple": False}
    layers: Sequence[nn.Module] = [unwrap(layer) for layer in stack.layers[first_trainable:]]

    def note_form(_module: nn.Module, _args: Any, output: Any) -> None:
        form["tuple"] = not isinstance(output, Tensor)

    def pass_on(*args: Any, **kwargs: Any) -> Any:
        state = first_tensor(args if args else kwargs.get("hidden_states"))
        seen.append(state)
        return (state, None) if form["tuple"] else state

    def given_to_first() -> Tensor:
        if len(seen) < len(layers):
            raise PrefixCacheError(f"of the {len(layers)} layers above the cut {len(seen)} ran")
        return seen[-len(layers)]

    handle = unwrap(stack.layers[first_trainable - 1]).register_forward_hook(note_form)
    try:
        with replaced_forward(layers, lambda _own: pass_on):
            yield given_to_first
    finally:
        handle.remove()


@torch.no_grad()
def compute_states(stack: DecoderStack, *, first_trainable: int, inputs: TokenInputs) -> Tensor:
    """Run the embeddings and layers 0..k-1 on a batch, and nothing above; returns what layer k is given, (B, T, D).

    Mode, precision and device are the caller's, and so are the arguments where `inputs` has those of a real call.
    """
    with only_the_prefix(stack, first_trainable=first_trainable) as given_to_first:
        if inputs.call is not None:
            args, kwargs = inputs.call
            stack.backbone(*args, **kwargs)
        else:
            stack.backbone(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, use_cache=False)
        return given_to_first()
