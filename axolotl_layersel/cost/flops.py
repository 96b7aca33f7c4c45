"""FLOPs of a probed layer and of the read-out: matrix products, convolutions and softmax attention.

A product of N rows with an (inputs x outputs) matrix is 2 N inputs outputs FLOPs, once forward, once more where its
input needs gradient, once more where its weight is trained; the two matrices of an adapter count like any others.
Softmax attention multiplies all pairs of positions, masked or not, and fused kernels compute its scores once more in
backward. `cut_cost.py` adds up over layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from axolotl_layersel.cost.layer_probe import Attention, HeadProbe, LayerProbe, Product
from axolotl_layersel.cost.layer_run import Case


@dataclass(frozen=True)
class StepShape:
    """One micro batch, padding included."""

    batch: int  # rows
    positions: int  # of a row


def head_flops(head: HeadProbe, shape: StepShape, *, trained: bool) -> tuple[float, float]:
    """(forward, backward) FLOPs of the unembedding; backward always reaches its input."""
    product = 2.0 * shape.batch * shape.positions * head.hidden * head.vocabulary
    return product, product * (2 if trained else 1)


def product_flops(product: Product, shape: StepShape) -> float:
    """FLOPs of one product with the bare matrix, or matrices of the active experts."""
    return 2.0 * product.rows * shape.batch * shape.positions * product.inputs * product.outputs


def attention_flops(attention: Attention, shape: StepShape) -> tuple[float, float]:
    """(forward, backward) FLOPs over all pairs of positions: two products forward, four or five backward."""
    pairs = 2.0 * shape.batch * shape.positions**2 * attention.heads
    scores, sums = pairs * attention.query_size, pairs * attention.value_size
    return scores + sums, 2 * (scores + sums) + (scores if attention.recomputes else 0.0)


def forward_flops(layer: LayerProbe, shape: StepShape, *, trained: bool) -> float:
    """FLOPs of a layer's forward pass, its adapters included where it is trained."""
    chosen = layer.passes["trained" if trained else "passed"]
    flops = sum(attention_flops(attention, shape)[0] for attention in chosen.attention)
    for product in chosen.products:
        flops += product_flops(product, shape) + (_adapter_flops(product, shape)[0] if trained else 0.0)
    return flops


def backward_flops(layer: LayerProbe, shape: StepShape, *, case: Case, full: bool) -> float:
    """FLOPs of the gradients; with `full` all weights of a trained layer get one, otherwise its adapters."""
    chosen, trained = layer.passes[case], case != "passed"
    flops = sum(attention_flops(attention, shape)[1] for attention in chosen.attention if attention.backward)
    for product in chosen.products:
        weight_grad = trained and full
        flops += product_flops(product, shape) * (product.input_grad + weight_grad)
        flops += _adapter_flops(product, shape)[1] if trained else 0.0
    return flops


def recomputed_flops(layer: LayerProbe, shape: StepShape, *, case: Case, reentrant: bool) -> float:
    """FLOPs that checkpointing computes again; non-reentrant checkpointing stops at the last tensor that was kept."""
    trained, last = case != "passed", layer.passes[case].unrepeated
    flops = forward_flops(layer, shape, trained=trained)
    if last is None or reentrant:
        return flops
    return flops - (_rank_flops(last, shape)[1] if trained and last.rank else product_flops(last, shape))


def _adapter_flops(product: Product, shape: StepShape) -> tuple[float, float]:
    """(forward, backward) FLOPs of the adapter of a product, 0 without one."""
    if product.stacked and product.rank:
        multiplied = 2.0 * product.modules * product.rank * product.inputs * product.outputs
        return multiplied, 2 * multiplied + product_flops(product, shape)
    down, up = _rank_flops(product, shape)
    return down + up, 2 * up + down * (1 + product.input_grad)


def _rank_flops(product: Product, shape: StepShape) -> tuple[float, float]:
    """FLOPs into the rank of an adapter, and out of it."""
    rows = 2.0 * product.rows * shape.batch * shape.positions * product.rank
    return rows * product.inputs, rows * product.outputs
