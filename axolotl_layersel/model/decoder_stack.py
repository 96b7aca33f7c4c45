"""Find the decoder layers, the final norm and the unembedding of a model by structure, and prove the finding.

There is no table of class names here. The decoder layers are the module list that sits beside the input
embeddings; the final norm is the module beside them that turns the output of the last layer into the input of
the unembedding. Structure only proposes: `verify_stack.py` proves it on one batch. On doubt both raise `StackError` and
list the candidates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from axolotl_layersel.model.weights_here import whole_bytes, whole_shape


class StackError(ValueError):
    """The decoder stack or its read-out was not found, or the model computes something else than was found."""


@dataclass(frozen=True)
class DecoderStack:
    """Where a model keeps what layer selection reads; modules are references into the model, never copies."""

    backbone: nn.Module  # owns embeddings, layers and final norm; called with input_ids
    backbone_name: str  # dotted name in the model, "" for the model itself
    layers: tuple[nn.Module, ...]  # decoder layers 0..L-1, input side first
    layers_name: str  # dotted name of their module list, e.g. "model.layers"
    final_norm: nn.Module
    final_norm_name: str
    head: nn.Module  # unembedding, weight of shape (V, D)
    head_name: str
    embeddings: nn.Module
    embeddings_name: str
    tied: bool  # the unembedding shares its weight with the input embeddings

    @property
    def num_layers(self) -> int:
        """L, the number of decoder layers; there are L + 1 latent states."""
        return len(self.layers)


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside torch's activation-checkpoint wrapper, or the module itself."""
    return getattr(module, "_checkpoint_wrapped_module", module)


def first_tensor(output: Any) -> Tensor:
    """The hidden state in what a decoder layer was given or returned: a tensor, or the first tensor of a tuple."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, (tuple, list)):
        for item in output:
            if isinstance(item, Tensor):
                return item
    raise StackError(
        f"a decoder layer returned or was given {type(output).__name__}, which holds no tensor at its top level"
    )


def given_state(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden state that a decoder layer is called with, by position or by name."""
    return first_tensor(args or kwargs.get("hidden_states"))


def find_stack(model: nn.Module) -> DecoderStack:
    """Propose the decoder stack of a causal language model that transformers loaded, before or after PEFT wraps it.

    Args:
        model: anything with `get_input_embeddings` and `get_output_embeddings`.

    Raises:
        StackError: there is no unembedding, no module list beside the embeddings, or no final norm.
    """
    names = {id(module): name for name, module in model.named_modules()}
    embeddings = _ask(model, "get_input_embeddings")
    head = _ask(model, "get_output_embeddings")
    if embeddings is None or id(embeddings) not in names:
        raise StackError(f"{type(model).__name__} has no input embeddings; layer selection needs a decoder model")
    if head is None or id(head) not in names:
        raise StackError(
            f"{type(model).__name__} has no unembedding (LM head), so labels have no semantic basis; "
            "allowed are causal language models"
        )
    embeddings_name, head_name = names[id(embeddings)], names[id(head)]
    backbone_name, backbone = _backbone(model, embeddings_name)
    list_name, layers = max(_layer_lists(backbone), key=lambda item: (len(item[1]), whole_bytes(item[1])))
    norm_name, norm = _final_norm(backbone, list_name)
    prefix = f"{backbone_name}." if backbone_name else ""
    return DecoderStack(
        backbone=backbone,
        backbone_name=backbone_name,
        layers=tuple(layers),
        layers_name=prefix + list_name,
        final_norm=norm,
        final_norm_name=prefix + norm_name,
        head=head,
        head_name=head_name,
        embeddings=embeddings,
        embeddings_name=embeddings_name,
        tied=_shares_weight(embeddings, head),
    )


def _ask(model: nn.Module, method: str) -> nn.Module | None:
    answer = getattr(model, method, lambda: None)()
    return answer if isinstance(answer, nn.Module) else None


def _shares_weight(embeddings: nn.Module, head: nn.Module) -> bool:
    one, other = getattr(embeddings, "weight", None), getattr(head, "weight", None)
    return one is not None and one is other


def _backbone(model: nn.Module, embeddings_name: str) -> tuple[str, nn.Module]:
    """The nearest module around the embeddings that also owns a list of layers."""
    name = embeddings_name
    while name:
        name = name.rpartition(".")[0]
        module = model.get_submodule(name)
        if any(_layer_lists(module)):
            return name, module
    raise StackError(
        f"no module around {embeddings_name!r} owns a list of layers; module lists in the model: {_all_lists(model)}"
    )


def _layer_lists(module: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList) and len(child) and all(_has_weights(layer) for layer in child):
            yield name, child


def _has_weights(layer: nn.Module) -> bool:
    return next(layer.parameters(), None) is not None


def _all_lists(model: nn.Module) -> str:
    found = [f"{n} ({len(m)})" for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    return ", ".join(found) or "none"


def _final_norm(backbone: nn.Module, list_name: str) -> tuple[str, nn.Module]:
    """The child of the backbone whose parameters are all vectors: a norm. Most models register it after their layers.

    Some register it before them, beside a norm of the embeddings, and in some it has no weights: the last such child
    comes first then. `verify_stack.py` refuses a wrong choice.
    """
    children = dict(backbone.named_children())
    place = list(children).index(list_name)
    after, before = list(children)[place + 1 :], list(children)[:place]
    norms = [n for n in after if _is_norm(children[n])] or [n for n in before[::-1] if _is_norm(children[n])]
    norms = norms or [n for n in after if next(children[n].buffers(), None) is None and not _has_weights(children[n])]
    if not norms:
        raise StackError(f"no final norm beside {list_name!r}; candidates were {list(children)}")
    return norms[0], children[norms[0]]


def _is_norm(module: nn.Module) -> bool:
    return _has_weights(module) and all(len(whole_shape(p)) == 1 for p in module.parameters())
