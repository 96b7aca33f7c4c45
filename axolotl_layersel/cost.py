"""What a cut costs: FLOPs, kept activations, trained parameters and optimizer state of a step, for every cut.

`probe.py` says which products a layer multiplies and which gradients autograd asks for; here they are added up for
the run's own mode and shapes. A product of N rows with an (inputs x outputs) matrix is 2 N inputs outputs FLOPs, once
forward, once more where its input needs gradient, once more where its weight is trained; the two matrices of an adapter
count like any others. Softmax attention multiplies all pairs of positions, masked or not, and fused kernels compute
its scores once more in backward.

Counted are matrix products, convolutions and softmax attention: what bounds a step of a model that is wide enough.
Norms, activations, rotary embeddings, recurrences of state-space layers and the optimizer's arithmetic are not. They
belong to the trained layers more than to the frozen ones, so on narrow models a cut saves more time than FLOPs.
Ratios are to training every decoder layer in the same mode, by the stock trainer. `plan.py` carries them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from axolotl_layersel.probe import Attention, HeadProbe, LayerProbe, Product, StackProbe, probe_stack
from axolotl_layersel.stack import DecoderStack
from axolotl_layersel.watch import Case

HEAD_SHARE_TOLD = 0.2  # from this share of a step on, `explain` says that the unembedding bounds the saving


@dataclass(frozen=True)
class StepShape:
    """One micro batch, padding included."""

    batch: int  # rows
    positions: int  # of a row


@dataclass(frozen=True)
class Mode:
    """How the run trains."""

    adapter: str | None  # "lora", "qlora", or None for full fine-tuning
    rank: int = 0  # of the adapters
    target_modules: tuple[str, ...] | None = None  # ends of module names; None: all linear modules of decoder layers
    target_parameters: tuple[str, ...] = ()  # ends of names of stacked expert tensors with an adapter
    dropout: float = 0.0  # of the adapters
    checkpointing: bool = False  # recompute layers in backward
    reentrant: bool = False  # the older kind of checkpointing
    train_norm_and_head: bool = False  # full fine-tuning only; both stay frozen under adapters
    stop_backward: bool = True  # False: gradients flow to the embeddings, as in the stock trainer
    optimizer_bytes_per_parameter: float = 8.0  # Adam's two moments in float32; 2 for 8-bit Adam

    def __post_init__(self) -> None:
        if bool(self.adapter) != (self.rank > 0):
            raise ValueError(
                f"adapter is {self.adapter!r} and rank {self.rank}; "
                "allowed are an adapter with a rank above 0, or None with rank 0"
            )
        if self.adapter and self.train_norm_and_head:
            raise ValueError("train_norm_and_head is for full fine-tuning; with an adapter leave it False")


@dataclass(frozen=True)
class StepCost:
    """One forward and backward pass over one micro batch."""

    forward_flops: float
    backward_flops: float  # recomputation included
    head_flops: float  # of both, what norm, unembedding and loss take
    saved_activation_bytes: float  # kept from forward for backward, parameters excluded
    trainable_parameters: int
    optimizer_bytes: float

    @property
    def flops(self) -> float:
        """Of the whole step."""
        return self.forward_flops + self.backward_flops


@dataclass(frozen=True)
class CutCost:
    """What training layers k..L-1 costs; ratios are to training every layer in the same mode."""

    first_trainable: int  # k
    forward: float  # ratio of FLOPs; near 1, as frozen layers lack only their adapters
    backward: float  # ratio of FLOPs
    step: float  # ratio of FLOPs
    saved_activation_bytes: float  # ratio
    trainable_parameters: float  # ratio
    optimizer_bytes: float  # ratio
    head_share: float  # share of this cut's FLOPs that the unembedding takes, whatever the cut
    floor: float  # step ratio that no cut can go below: everything forward, and back to the last layer's output
    cut: StepCost  # in FLOPs, bytes and numbers
    all_layers: StepCost  # what the ratios are to


def cut_costs(
    stack: DecoderStack, *, mode: Mode, shape: StepShape, autocast: torch.dtype | None = None
) -> list[CutCost]:
    """The cost of every cut k = 0..L-1, from the model's own shapes and a short forward pass.

    Args:
        stack: of the bare model, before adapters, quantised or not.
        mode: of the run.
        shape: of its micro batches.
        autocast: the trainer's autocast dtype, None for full precision.

    Raises:
        ValueError: the model carries adapters, or the mode's target modules match nothing.
    """
    return price_cuts(probe_mode(stack, mode=mode, autocast=autocast), mode=mode, shape=shape)


def probe_mode(stack: DecoderStack, *, mode: Mode, autocast: torch.dtype | None = None) -> StackProbe:
    """The measurements behind `cut_costs`; they serve every shape, with and without checkpointing."""
    return probe_stack(
        stack,
        rank=mode.rank,
        target_modules=mode.target_modules,
        target_parameters=mode.target_parameters,
        dropout=mode.dropout,
        train_head=mode.train_norm_and_head,
        autocast=autocast,
    )


def price_cuts(probe: StackProbe, *, mode: Mode, shape: StepShape) -> list[CutCost]:
    """The cost of every cut k = 0..L-1, from measurements of the same mode."""
    stock = dataclasses.replace(mode, stop_backward=False)
    base = step_cost(probe, mode=stock, shape=shape, first_trainable=0)
    head = head_flops(probe.head, mode=mode, shape=shape)
    floor = sum(_forward(layer, shape, trained=False) for layer in probe.layers) + sum(head)
    costs = []
    for k in range(len(probe.layers)):
        cut = step_cost(probe, mode=mode, shape=shape, first_trainable=k)
        costs.append(
            CutCost(
                first_trainable=k,
                forward=cut.forward_flops / base.forward_flops,
                backward=cut.backward_flops / base.backward_flops,
                step=cut.flops / base.flops,
                saved_activation_bytes=cut.saved_activation_bytes / base.saved_activation_bytes,
                trainable_parameters=cut.trainable_parameters / base.trainable_parameters,
                optimizer_bytes=cut.optimizer_bytes / base.optimizer_bytes,
                head_share=cut.head_flops / cut.flops,
                floor=floor / base.flops,
                cut=cut,
                all_layers=base,
            )
        )
    return costs


def step_cost(probe: StackProbe, *, mode: Mode, shape: StepShape, first_trainable: int) -> StepCost:
    """FLOPs and bytes of one step that trains layers k..L-1. k = 0 stops nothing, so gradients reach the embeddings."""
    through = first_trainable == 0 or not mode.stop_backward
    forward = backward = saved = shared = 0.0
    parameters = 0
    for index, layer in enumerate(probe.layers):
        trained = index >= first_trainable
        forward += _forward(layer, shape, trained=trained)
        if trained:
            parameters += _trained_parameters(layer, mode)
        elif not through:
            continue
        leaf = index == first_trainable and not through and not (mode.checkpointing and mode.reentrant)
        case: Case = "passed" if not trained else "first" if leaf else "trained"
        backward += _backward(layer, shape, mode=mode, case=case)
        if mode.checkpointing:
            saved += layer.input_bytes * shape.batch * shape.positions
        else:
            saved += layer.passes[case].saved.at(batch=shape.batch, positions=shape.positions)
            shared = max(shared, layer.passes[case].shared.at(batch=1, positions=shape.positions))
    saved += shared + probe.head.saved.at(batch=shape.batch, positions=shape.positions)
    head_forward, head_backward = head_flops(probe.head, mode=mode, shape=shape)
    parameters += probe.head.parameters if mode.train_norm_and_head else 0
    return StepCost(
        forward_flops=forward + head_forward,
        backward_flops=backward + head_backward,
        head_flops=head_forward + head_backward,
        saved_activation_bytes=saved,
        trainable_parameters=parameters,
        optimizer_bytes=parameters * mode.optimizer_bytes_per_parameter,
    )


def head_flops(head: HeadProbe, *, mode: Mode, shape: StepShape) -> tuple[float, float]:
    """(forward, backward) FLOPs of the unembedding; backward always reaches its input."""
    product = 2.0 * shape.batch * shape.positions * head.hidden * head.vocabulary
    return product, product * (2 if mode.train_norm_and_head else 1)


def product_flops(product: Product, shape: StepShape) -> float:
    """FLOPs of one product with the bare matrix, or matrices of the active experts."""
    return 2.0 * product.rows * shape.batch * shape.positions * product.inputs * product.outputs


def attention_flops(attention: Attention, shape: StepShape) -> tuple[float, float]:
    """(forward, backward) FLOPs over all pairs of positions: two products forward, four or five backward."""
    pairs = 2.0 * shape.batch * shape.positions**2 * attention.heads
    scores, sums = pairs * attention.query_size, pairs * attention.value_size
    return scores + sums, 2 * (scores + sums) + (scores if attention.recomputes else 0.0)


def explain(cost: CutCost, *, num_layers: int) -> str:
    """The prediction for one cut in a sentence or two, for a log or a report."""
    trained = f"decoder layers {cost.first_trainable} to {num_layers - 1} of {num_layers}"
    said = (
        f"Predicted for training {trained}, against training all of them: {cost.step:.2f} of the FLOPs of a step "
        f"(forward {cost.forward:.2f}, backward {cost.backward:.2f}), {cost.saved_activation_bytes:.2f} of the "
        f"activations kept for backward, {cost.optimizer_bytes:.2f} of the optimizer state."
    )
    if cost.head_share >= HEAD_SHARE_TOLD:
        said += (
            f" The unembedding takes {cost.head_share:.2f} of the FLOPs that are left and is the same for every cut; "
            f"no cut can bring a step below {cost.floor:.2f}."
        )
    return said


def _forward(layer: LayerProbe, shape: StepShape, *, trained: bool) -> float:
    chosen = layer.passes["trained" if trained else "passed"]
    flops = sum(attention_flops(attention, shape)[0] for attention in chosen.attention)
    for product in chosen.products:
        flops += product_flops(product, shape) + (_adapter_flops(product, shape)[0] if trained else 0.0)
    return flops


def _backward(layer: LayerProbe, shape: StepShape, *, mode: Mode, case: Case) -> float:
    """Gradients, and what checkpointing recomputes for them."""
    chosen, trained = layer.passes[case], case != "passed"
    flops = sum(attention_flops(attention, shape)[1] for attention in chosen.attention if attention.backward)
    for product in chosen.products:
        weight_grad = trained and not mode.adapter
        flops += product_flops(product, shape) * (product.input_grad + weight_grad)
        flops += _adapter_flops(product, shape)[1] if trained else 0.0
    if mode.checkpointing:
        flops += _forward(layer, shape, trained=trained)
        if (last := chosen.unrepeated) is not None and not mode.reentrant:
            flops -= _rank_flops(last, shape)[1] if trained and last.rank else product_flops(last, shape)
    return flops


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


def _trained_parameters(layer: LayerProbe, mode: Mode) -> int:
    if not mode.adapter:
        return layer.parameters
    products = layer.passes["trained"].products
    return sum(product.modules * product.rank * (product.inputs + product.outputs) for product in products)
