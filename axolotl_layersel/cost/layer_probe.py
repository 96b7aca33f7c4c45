"""What a decoder layer does in a training step: its matrix products, which gradients they need, what it saves.

One layer of each kind runs forward on a few positions (`layer_run.py`), in each of the cases that a cut can put it in:

- `trained`: it is trained, and its input needs gradient.
- `first`: it is trained, and its input needs none; autograd then skips some products of the backward pass.
- `passed`: it is frozen, but gradients flow through it, as they do where the backward pass is not stopped.

Adapters do not exist yet; the model is left as found. `cut_cost.py` turns a probe into FLOPs and bytes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.modules.conv import _ConvNd

from axolotl_layersel.cost.layer_run import CASES, Case, Run, capture, run_head
from axolotl_layersel.model.decoder_stack import DecoderStack, unwrap
from axolotl_layersel.model.latent_states import left_as_found
from axolotl_layersel.model.weight_matrices import Matrix, linear_shape, with_adapters

_LENGTH = 64  # the chunk size of linear attention; one, two and three times this length fix a quadratic
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_k", "top_k")


@dataclass(frozen=True)
class Growth:
    """Bytes as a polynomial of the sequence length; quadratic only where attention keeps its scores."""

    constant: float  # bytes, whatever the batch: weights that autocast has cast
    per_position: float  # bytes for each position of each row
    per_pair: float  # bytes for each pair of positions of each row

    def at(self, *, batch: int, positions: int) -> float:
        """Bytes for a micro batch of `batch` rows of `positions` positions."""
        return self.constant + batch * positions * (self.per_position + positions * self.per_pair)


@dataclass(frozen=True)
class Product:
    """A matrix product of a layer: with a linear module, a router, or the experts of one name together."""

    name: str  # in the layer, "*" for the number of an expert
    inputs: int  # columns of the input
    outputs: int  # columns of the output
    modules: int  # 1, or how many experts
    stacked: bool  # experts in one tensor; PEFT multiplies out their adapters and adds them to the weights
    rows: float  # rows that are multiplied for each position of the batch, over all modules (active experts only)
    rank: int  # of its adapter where the layer is trained, 0 without one
    input_grad: bool  # the backward pass computes the gradient of its input


@dataclass(frozen=True)
class Attention:
    """Scores and weighted sum of one softmax attention, over all pairs of positions."""

    heads: int  # of the queries
    query_size: int  # of a head
    value_size: int  # of a head
    backward: bool  # the backward pass goes through it
    recomputes: bool  # the scores are computed again in backward, as they were not kept


@dataclass(frozen=True)
class LayerPass:
    """A layer in one case."""

    products: tuple[Product, ...]
    attention: tuple[Attention, ...]
    forward_moved: Growth  # read and written by all operations
    backward_moved: Growth
    saved: Growth  # kept for backward: no parameters, nothing that all layers share
    shared: Growth  # kept once for all layers and rows, such as rotary embeddings
    unrepeated: Product | None  # non-reentrant checkpointing leaves it out: nothing after it is kept


@dataclass(frozen=True)
class LayerProbe:
    """One decoder layer in all cases."""

    passes: Mapping[Case, LayerPass]
    parameters: int  # all of them
    input_bytes: float  # of its hidden state, for each position: what checkpointing keeps


@dataclass(frozen=True)
class HeadProbe:
    """Final norm, unembedding and cross-entropy."""

    hidden: int  # D
    vocabulary: int  # V
    parameters: int  # of norm and unembedding
    saved: Growth
    forward_moved: Growth
    backward_moved: Growth


@dataclass(frozen=True)
class StackProbe:
    """All that `cut_cost.py` needs to know about a model in one mode of training."""

    layers: tuple[LayerProbe, ...]  # decoder layers 0..L-1; layers of one kind are one object
    head: HeadProbe


def probe_stack(
    stack: DecoderStack,
    *,
    rank: int,
    target_modules: Collection[str] | None = None,
    target_parameters: Collection[str] = (),
    dropout: float = 0.0,
    train_head: bool = False,
    autocast: torch.dtype | None = None,
) -> StackProbe:
    """Run one layer of each kind in each case, and the read-out, on up to 192 positions.

    Args:
        stack: of a model without adapters, on the device that it will be trained on.
        rank: of the adapters; 0 for full fine-tuning.
        target_modules: names, or ends of dotted names, of the modules with an adapter; None: every linear module.
        target_parameters: the same for the stacked tensors of experts, which PEFT adapts as tensors.
        dropout: of the adapters.
        train_head: final norm and unembedding are trained too.
        autocast: the trainer's autocast dtype, None for full precision.

    Raises:
        ValueError: the model carries adapters already, the targets match nothing, or a layer did not run.
    """
    config = getattr(stack.backbone, "config", None)
    matrices = with_adapters(stack, rank=rank, target_modules=target_modules, target_parameters=target_parameters)
    kinds = [_kind(stack, i, config, matrices[i]) for i in range(stack.num_layers)]
    chosen = {kind: kinds.index(kind) for kind in dict.fromkeys(kinds)}
    runs: dict[tuple[int, Case], list[Run]] = {(i, case): [] for i in chosen.values() for case in CASES}
    read_out: list[tuple[int, int, int]] = []
    unit = min(_LENGTH, (getattr(config, "max_position_embeddings", None) or 3 * _LENGTH) // 3)
    lengths = (unit, 2 * unit, 3 * unit)
    with left_as_found(stack.backbone, autocast=autocast):
        for length in lengths:
            calls = capture(stack, chosen.values(), length)
            for index, case in runs:
                run = Run(unwrap(stack.layers[index]), matrices[index], calls[index], case=case)
                run.go(full=not rank, dropout=dropout)
                runs[index, case].append(run)
            read_out.append(run_head(stack, config, calls[0].state, train_head=train_head))
    probes = {}
    for kind, i in chosen.items():
        layer = unwrap(stack.layers[i])
        probes[kind] = LayerProbe(
            passes={case: _layer_pass(runs[i, case], unit, config) for case in CASES},
            parameters=sum(parameter.numel() for parameter in layer.parameters()),
            input_bytes=calls[i].state.nbytes / lengths[-1],
        )
    hidden, vocabulary = linear_shape(stack.head)
    parameters = sum(p.numel() for part in (stack.final_norm, stack.head) for p in part.parameters())
    saved, forward, backward = (_fit(sizes, unit) for sizes in zip(*read_out, strict=True))
    head = HeadProbe(hidden, vocabulary, parameters, saved=saved, forward_moved=forward, backward_moved=backward)
    return StackProbe(layers=tuple(probes[kind] for kind in kinds), head=head)


def _kind(stack: DecoderStack, index: int, config: Any, matrices: Sequence[Matrix]) -> tuple[Any, ...]:
    """Layers of one kind cost the same: equal structure, equal adapters, equal type of attention."""
    layer = unwrap(stack.layers[index])
    types = getattr(config, "layer_types", None) or [None] * stack.num_layers
    shapes = tuple((name, tuple(parameter.shape)) for name, parameter in layer.named_parameters())
    return type(layer), types[index], shapes, tuple(matrix.rank for matrix in matrices)


def _layer_pass(runs: Sequence[Run], unit: int, config: Any) -> LayerPass:
    longest = runs[-1]  # reaches the most experts
    experts = float(next((getattr(config, name) for name in _TOP_K if getattr(config, name, None)), 1))
    grouped: dict[tuple[str, int, int], list[int]] = {}
    for i, matrix in enumerate(longest.matrices):
        name = re.sub(r"\.\d+(?=\.)", ".*", matrix.name)
        grouped.setdefault((name, matrix.inputs, matrix.outputs), []).append(i)
    products = []
    unrepeated = None
    for (name, inputs, outputs), members in grouped.items():
        one = longest.matrices[members[0]]
        rows = sum(longest.rows[i] for i in members) or 1.0
        if isinstance(one.module, _ConvNd):  # channels come before positions
            rows = 1.0
        elif one.stacked is not None and rows == 1.0:  # otherwise they were repeated for the experts before
            rows = experts
        known = [grad for i in members if (grad := longest.input_grad[i]) is not None]
        product = Product(
            name=name,
            inputs=inputs,
            outputs=outputs,
            modules=len(members) * one.experts,
            stacked=one.stacked is not None,
            rows=rows,
            rank=one.rank,
            input_grad=any(known) if known else longest.case != "first",
        )
        products.append(product)
        if one.linear and longest.order[-1] in members and longest.kept_by_last == longest.saved.tensors:
            unrepeated = product
    saved = _fit([run.kept_bytes() for run in runs], unit)
    attention = tuple(_attention(longest, config, kept=saved.per_pair / longest.state.element_size()))
    if any(product.modules > 1 for product in products) and all(one.recomputes for one in attention):
        # Few positions reach few experts, which bends the curve without being quadratic.
        linear, saved = True, _fit([run.kept_bytes() for run in runs], unit, linear=True)
    else:
        linear = False
    return LayerPass(
        products=tuple(products),
        attention=attention,
        forward_moved=_fit([run.forward_moved for run in runs], unit, linear=linear),
        backward_moved=_fit([run.backward_moved for run in runs], unit, linear=linear),
        saved=saved,
        shared=_fit([sum(run.saved.shared_bytes.values()) for run in runs], unit),
        unrepeated=unrepeated,
    )


def _attention(run: Run, config: Any, *, kept: float) -> Iterator[Attention]:
    """Softmax attentions are the modules that say whether they are causal, as fused kernels want to know.

    Args:
        kept: numbers that are kept for each pair of positions: less than one a head is a mask, not the scores.
    """
    found: list[str] = []
    for name, module in run.layer.named_modules():
        if not hasattr(module, "is_causal") or any(name.startswith(f"{outer}.") for outer in found):
            continue
        found.append(name)
        heads = getattr(module, "num_heads", None) or config.num_attention_heads
        size = getattr(module, "head_dim", None) or config.hidden_size // config.num_attention_heads
        inside = [i for i in run.order if run.matrices[i].name.startswith(f"{name}.")]
        yield Attention(
            heads=heads,
            query_size=getattr(module, "qk_head_dim", None) or size,
            value_size=getattr(module, "v_head_dim", None) or size,
            backward=bool(run.input_grad[inside[-1]]) if inside else run.case != "first",
            recomputes=kept < heads,
        )


def _fit(sizes: Sequence[float], unit: int, *, linear: bool = False) -> Growth:
    """The polynomial through the bytes at one, two and three times `unit` positions, or the line through the last."""
    one, two, three = sizes
    pair = 0.0 if linear else (three - 2 * two + one) / (2 * unit**2)
    position = (three - two) / unit - 5 * unit * pair
    return Growth(constant=three - 3 * unit * position - 9 * unit**2 * pair, per_position=position, per_pair=pair)
