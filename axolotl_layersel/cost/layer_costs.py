"""What each decoder layer and the read-out cost in a training step, as functions of the shape of a micro batch.

One layer of each kind runs on a few positions, in each of the cases that a cut can put it in:

- `trained`: it is trained, and its input needs gradient.
- `first`: it is trained, and its input needs none; autograd then skips some products of the backward pass.
- `passed`: it is frozen, but gradients flow through it, as they do where the backward pass is not stopped.

Counts at three lengths fix a polynomial of the length. `cut_cost.py` adds layers up for each cut.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from axolotl_layersel.cost.as_in_training import Learnt, add_adapters, in_training, own_parts, unpack_weights
from axolotl_layersel.cost.count_step import StepCount, count_step
from axolotl_layersel.cost.visible_kernels import visible_kernels
from axolotl_layersel.model.adapted_modules import Adapters
from axolotl_layersel.model.decoder_stack import DecoderStack, first_tensor, unwrap
from axolotl_layersel.model.latent_states import left_as_found
from axolotl_layersel.model.layer_inputs import LayerInput, record_inputs
from axolotl_layersel.model.verify_layers import read_out_here
from axolotl_layersel.model.weights_here import computing_device, weights_here

Case = Literal["trained", "first", "passed"]
CASES: tuple[Case, ...] = ("passed", "first", "trained")  # in this order: adapters are added before the second
_UNIT = 64  # the chunk of linear attention; one, two and three times a multiple of it fix a quadratic


@dataclass(frozen=True)
class Growth:
    """FLOPs or bytes as a polynomial of the sequence length."""

    constant: float  # whatever the batch: products of adapters for stacked experts, weights that autocast has cast
    per_position: float  # for each position of each row
    per_pair: float  # for each pair of positions of each row: attention

    def at(self, *, batch: int, positions: int) -> float:
        """The amount for a micro batch of `batch` rows of `positions` positions."""
        return self.constant + batch * positions * (self.per_position + positions * self.per_pair)


@dataclass(frozen=True)
class PassCost:
    """One part of the model in one case."""

    forward_flops: Growth
    recomputed_flops: Growth  # by non-reentrant checkpointing
    backward_flops: Growth
    saved_bytes: Growth  # for backward: no parameters, nothing that all layers share
    shared_bytes: Growth  # once for all layers and rows


@dataclass(frozen=True)
class LayerCost:
    """One decoder layer in all cases."""

    cases: Mapping[Case, PassCost]
    trainable_parameters: int  # where it is trained
    input_bytes: float  # of its hidden state, for each position: what checkpointing saves
    input_width: int  # numbers in it


@dataclass(frozen=True)
class StackCost:
    """All that `cut_cost.py` needs to know about a model in one mode of training."""

    layers: tuple[LayerCost, ...]  # decoder layers 0..L-1; layers of one kind are one object
    head: PassCost  # final norm, unembedding and cross-entropy
    head_parameters: int  # that are trained there


def measure_layers(
    stack: DecoderStack,
    *,
    adapters: Adapters | None,
    train_norm_and_head: bool = False,
    autocast: torch.dtype | None = None,
) -> StackCost:
    """Run one layer of each kind in each case, and the read-out, on a few positions; the model is left as found.

    Args:
        stack: of a model without adapters, on the device that it will be trained on.
        adapters: of the run; None for full fine-tuning.
        train_norm_and_head: final norm and unembedding are trained too.
        autocast: the trainer's autocast dtype, None for full precision.

    Raises:
        ValueError: the model carries adapters already, no decoder layer gets one, or a layer did not run.
    """
    _check(stack, adapters)
    config = getattr(stack.backbone, "config", None)
    kinds = [_kind(stack, i, config, adapters) for i in range(stack.num_layers)]
    chosen = {kind: kinds.index(kind) for kind in dict.fromkeys(kinds)}
    unit = math.lcm(
        _UNIT, *(n for p in stack.backbone.modules() if isinstance(n := getattr(p, "chunk_size", 0), int) and n)
    )
    unit = min(unit, (getattr(config, "max_position_embeddings", None) or 3 * unit) // 3)
    lengths = (unit, 2 * unit, 3 * unit)
    away = any(parameter.is_meta for parameter in stack.backbone.parameters())  # offloaded by accelerate
    device = computing_device(stack.backbone) if away else next(stack.backbone.parameters()).device
    needed = [stack.embeddings, *stack.layers[: max(chosen.values()) + 1]] if away else []
    with (
        left_as_found(stack.backbone, autocast=autocast, device=device),
        read_out_here(stack, device) if away else nullcontext(),
        weights_here(needed, device),
        visible_kernels(stack.backbone) as saves_pairs,
    ):
        inputs = [
            record_inputs(stack, chosen.values(), input_ids=_some_ids(stack, length).to(device)) for length in lengths
        ]
        probes = {
            kind: _layer_cost(stack, i, [calls[i] for calls in inputs], adapters, autocast, saves_pairs)
            for kind, i in chosen.items()
        }
        states = [calls[0] for calls in inputs]
        head = _pass_cost([_count_head(stack, config, call.state, train_norm_and_head) for call in states], states)
    parts = (stack.final_norm, stack.head) if train_norm_and_head else ()
    parameters = sum(parameter.numel() for part in parts for parameter in part.parameters())
    return StackCost(layers=tuple(probes[kind] for kind in kinds), head=head, head_parameters=parameters)


def _some_ids(stack: DecoderStack, length: int) -> Tensor:
    weight = stack.embeddings.get_parameter("weight")
    return (torch.arange(length, device=weight.device) * 31 % weight.shape[0])[None]


def _check(stack: DecoderStack, adapters: Adapters | None) -> None:
    for name, module in stack.backbone.named_modules():
        if hasattr(module, "base_layer"):
            raise ValueError(f"{name!r} carries an adapter already; costs are predicted for a model without adapters")
    if adapters and not any(n.startswith(f"{stack.layers_name}.") for n in (*adapters.modules, *adapters.parameters)):
        allowed = [name for name, module in stack.layers[0].named_modules() if isinstance(module, nn.Linear)]
        raise ValueError(
            f"target_modules {adapters.config.target_modules} and target_parameters "
            f"{adapters.config.target_parameters} match nothing in {stack.layers_name!r}; linear modules of its first "
            f"layer are {allowed}"
        )


def _kind(stack: DecoderStack, index: int, config: Any, adapters: Adapters | None) -> tuple[Any, ...]:
    """Layers of one kind cost the same: equal structure, equal adapters, equal type of attention."""
    layer = unwrap(stack.layers[index])
    types = getattr(config, "layer_types", None) or [None] * stack.num_layers
    shapes = tuple((name, tuple(parameter.shape)) for name, parameter in layer.named_parameters())
    prefix = f"{stack.layers_name}.{index}."
    ranks = []
    if adapters:
        adapted = [name for name in (*adapters.modules, *adapters.parameters) if name.startswith(prefix)]
        pattern, usual = adapters.config.rank_pattern, adapters.config.r
        ranks = [(n.removeprefix(prefix), pattern.get(get_pattern_key(pattern, n), usual)) for n in adapted]
    return type(layer), types[index], shapes, tuple(ranks)


def _layer_cost(
    stack: DecoderStack,
    index: int,
    calls: Sequence[LayerInput],
    adapters: Adapters | None,
    autocast: torch.dtype | None,
    saves_pairs: bool,
) -> LayerCost:
    layer, name = unwrap(stack.layers[index]), f"{stack.layers_name}.{index}"
    least_pair = -math.inf
    if any(_stacks_experts(part) for part in layer.modules()):
        # Few positions reach few experts, which bends the curve. Only scores are quadratic: a number for each head.
        heads = getattr(getattr(stack.backbone, "config", None), "num_attention_heads", 1)
        least_pair = calls[0].state.element_size() * heads
    cases: dict[Case, PassCost] = {}
    with own_parts(layer):
        unpack_weights(layer, dtype=autocast or calls[0].state.dtype)
        for case in CASES:
            if case == "first" and adapters:
                add_adapters(layer, name, adapters)
            learns: Learnt = "nothing" if case == "passed" else "adapters" if adapters else "everything"
            with in_training(layer, learns=learns):
                counts = [_count_layer(layer, call, input_grad=case != "first") for call in calls]
                trainable = sum(parameter.numel() for parameter in layer.parameters() if parameter.requires_grad)
            cases[case] = _pass_cost(counts, calls, least_pair=least_pair, saves_pairs=saves_pairs)
    positions, width = calls[0].state.shape[-2:]
    return LayerCost(cases, trainable, input_bytes=calls[0].state.nbytes / positions, input_width=width)


def _stacks_experts(module: nn.Module) -> bool:
    matrices = any(parameter.dim() == 3 for parameter in module.parameters(recurse=False))
    return (matrices and not isinstance(module, _ConvNd)) or hasattr(module, "parametrizations")


def _count_layer(layer: nn.Module, call: LayerInput, *, input_grad: bool) -> StepCount:
    state = call.state.detach().requires_grad_(input_grad)
    given = [t for t in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(t, Tensor) and t is not call.state]
    args, kwargs = pytree.tree_map(lambda item: state if item is call.state else item, (call.args, call.kwargs))
    weights = [*layer.parameters(), *layer.buffers()]
    return count_step(lambda: first_tensor(layer(*args, **kwargs)), inputs=[state], weights=weights, given=given)


def _count_head(stack: DecoderStack, config: Any, state: Tensor, train_norm_and_head: bool) -> StepCount:
    """Norm, unembedding and cross-entropy of one short row."""
    cap = getattr(config, "final_logit_softcapping", None)
    state = state.detach().requires_grad_(True)

    def loss() -> Tensor:
        logits_NV = stack.head(stack.final_norm(state))[0].float()
        if cap:
            logits_NV = torch.tanh(logits_NV / cap) * cap
        return F.cross_entropy(logits_NV, torch.zeros(len(logits_NV), dtype=torch.long, device=logits_NV.device))

    learns: Learnt = "everything" if train_norm_and_head else "nothing"
    with in_training(stack.final_norm, learns=learns), in_training(stack.head, learns=learns):
        return count_step(loss, inputs=[state], weights=[*stack.final_norm.parameters(), *stack.head.parameters()])


def _pass_cost(
    counts: Sequence[StepCount], calls: Sequence[LayerInput], *, least_pair: float = -math.inf, saves_pairs: bool = True
) -> PassCost:
    """Counts at one, two and three times a length, as polynomials.

    Args:
        least_pair: bytes that are saved grow with pairs of positions at least so fast, or not at all.
        saves_pairs: False: the run saves no bytes for pairs of positions, whatever was counted.
    """
    unit = calls[0].state.shape[-2]

    def growth(name: str) -> Growth:
        one, two, three = (getattr(count, name) for count in counts)
        of_bytes = name.endswith("_bytes")
        pair = (three - 2 * two + one) / (2 * unit**2)
        pair = 0.0 if name == "saved_bytes" and pair < least_pair else pair
        position = (three - two) / unit - 5 * unit * pair
        constant = three - 3 * unit * position - 9 * unit**2 * pair
        return Growth(constant, position, 0.0 if of_bytes and not saves_pairs else pair)

    return PassCost(**{field.name: growth(field.name) for field in dataclasses.fields(PassCost)})
