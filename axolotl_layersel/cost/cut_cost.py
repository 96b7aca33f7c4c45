"""What a cut costs: FLOPs, kept activations, trained parameters and optimizer state of a step, for every cut.

`layer_probe.py` says what a layer computes and which gradients autograd asks for, `flops.py` counts it, and here it is
added up for the run's own mode and shape. Ratios are to training every decoder layer in the same mode, by the stock
trainer.

FLOPs alone are not time. Norms, activations and rotary embeddings have hardly any, and neither has an adapter, but all
of them move bytes. `balance` weighs those: it is the FLOPs that a machine computes in the time in which it moves a byte
(`balance.py` measures it), and ratios are then of FLOPs + balance * bytes. Balance 0, the default, gives ratios of
FLOPs. Not counted: arithmetic of the optimizer, recurrences of state-space layers, kernels that fuse operations.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from axolotl_layersel.cost.flops import StepShape as StepShape
from axolotl_layersel.cost.flops import backward_flops, forward_flops, head_flops, recomputed_flops
from axolotl_layersel.cost.layer_probe import LayerProbe, StackProbe, probe_stack
from axolotl_layersel.cost.layer_run import Case
from axolotl_layersel.model.decoder_stack import DecoderStack

HEAD_SHARE_TOLD = 0.2  # from this share of a step on, `explain` says that the unembedding bounds the saving


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
    head_flops: float  # of both, what the unembedding takes
    forward_moved: float  # bytes read and written by all operations
    backward_moved: float  # bytes, recomputation included
    head_moved: float  # bytes of both, what norm, unembedding and loss take
    saved_activation_bytes: float  # kept from forward for backward, parameters excluded
    trainable_parameters: int
    optimizer_bytes: float

    def forward(self, balance: float = 0.0) -> float:
        """FLOPs and weighed bytes of the forward pass."""
        return self.forward_flops + balance * self.forward_moved

    def backward(self, balance: float = 0.0) -> float:
        """FLOPs and weighed bytes of the backward pass."""
        return self.backward_flops + balance * self.backward_moved

    def step(self, balance: float = 0.0) -> float:
        """FLOPs and weighed bytes of both passes."""
        return self.forward(balance) + self.backward(balance)


@dataclass(frozen=True)
class CutCost:
    """What training layers k..L-1 costs; ratios are to training every layer in the same mode."""

    first_trainable: int  # k
    forward: float  # ratio of FLOPs, with a balance also of bytes; near 1, as frozen layers lack only their adapters
    backward: float  # ratio, likewise
    step: float  # ratio, likewise
    saved_activation_bytes: float  # ratio
    trainable_parameters: float  # ratio
    optimizer_bytes: float  # ratio
    head_share: float  # share of this cut's step that the unembedding takes, whatever the cut
    floor: float  # step ratio that no cut can go below: everything forward, and back to the last layer's output
    cut: StepCost  # in FLOPs, bytes and numbers
    all_layers: StepCost  # what the ratios are to


def cut_costs(
    stack: DecoderStack, *, mode: Mode, shape: StepShape, autocast: torch.dtype | None = None, balance: float = 0.0
) -> list[CutCost]:
    """The cost of every cut k = 0..L-1, from the model's own shapes and a short forward pass.

    Args:
        stack: of the bare model, before adapters, quantised or not.
        mode: of the run.
        shape: of its micro batches.
        autocast: the trainer's autocast dtype, None for full precision.
        balance: FLOPs per byte of the machine; 0 compares FLOPs alone.

    Raises:
        ValueError: the model carries adapters, or the mode's target modules match nothing.
    """
    return price_cuts(probe_mode(stack, mode=mode, autocast=autocast), mode=mode, shape=shape, balance=balance)


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


def price_cuts(probe: StackProbe, *, mode: Mode, shape: StepShape, balance: float = 0.0) -> list[CutCost]:
    """The cost of every cut k = 0..L-1, from measurements of the same mode."""
    base = step_cost(probe, mode=dataclasses.replace(mode, stop_backward=False), shape=shape, first_trainable=0)
    frozen = sum(forward_flops(layer, shape, trained=False) for layer in probe.layers)
    frozen += balance * sum(_moved(layer, shape, "passed")[0] for layer in probe.layers)
    costs = []
    for k in range(len(probe.layers)):
        cut = step_cost(probe, mode=mode, shape=shape, first_trainable=k)
        costs.append(
            CutCost(
                first_trainable=k,
                forward=cut.forward(balance) / base.forward(balance),
                backward=cut.backward(balance) / base.backward(balance),
                step=cut.step(balance) / base.step(balance),
                saved_activation_bytes=cut.saved_activation_bytes / base.saved_activation_bytes,
                trainable_parameters=cut.trainable_parameters / base.trainable_parameters,
                optimizer_bytes=cut.optimizer_bytes / base.optimizer_bytes,
                head_share=(cut.head_flops + balance * cut.head_moved) / cut.step(balance),
                floor=(frozen + base.head_flops + balance * base.head_moved) / base.step(balance),
                cut=cut,
                all_layers=base,
            )
        )
    return costs


def step_cost(probe: StackProbe, *, mode: Mode, shape: StepShape, first_trainable: int) -> StepCost:
    """FLOPs and bytes of one step that trains layers k..L-1. k = 0 stops nothing, so gradients reach the embeddings."""
    through = first_trainable == 0 or not mode.stop_backward
    size = {"batch": shape.batch, "positions": shape.positions}
    forward, backward = head_flops(probe.head, shape, trained=mode.train_norm_and_head)
    forward_moved, backward_moved = probe.head.forward_moved.at(**size), probe.head.backward_moved.at(**size)
    head, head_moved = forward + backward, forward_moved + backward_moved
    saved, shared = probe.head.saved.at(**size), 0.0
    parameters = probe.head.parameters if mode.train_norm_and_head else 0
    for index, layer in enumerate(probe.layers):
        trained = index >= first_trainable
        leaf = index == first_trainable and not through and not (mode.checkpointing and mode.reentrant)
        case: Case = "passed" if not trained else "first" if leaf else "trained"
        moved = _moved(layer, shape, case)
        forward += forward_flops(layer, shape, trained=trained)
        forward_moved += moved[0]
        if not (trained or through):
            continue
        parameters += _trained_parameters(layer, mode) if trained else 0
        backward += backward_flops(layer, shape, case=case, full=not mode.adapter)
        backward_moved += moved[1]
        if mode.checkpointing:
            backward += recomputed_flops(layer, shape, case=case, reentrant=mode.reentrant)
            backward_moved += moved[0]
            saved += layer.input_bytes * shape.batch * shape.positions
        else:
            saved += layer.passes[case].saved.at(**size)
            shared = max(shared, layer.passes[case].shared.at(batch=1, positions=shape.positions))
    return StepCost(
        forward_flops=forward,
        backward_flops=backward,
        head_flops=head,
        forward_moved=forward_moved,
        backward_moved=backward_moved,
        head_moved=head_moved,
        saved_activation_bytes=saved + shared,
        trainable_parameters=parameters,
        optimizer_bytes=parameters * mode.optimizer_bytes_per_parameter,
    )


def explain(cost: CutCost, *, num_layers: int) -> str:
    """The prediction for one cut in a sentence or two, for a log or a report."""
    trained = f"decoder layers {cost.first_trainable} to {num_layers - 1} of {num_layers}"
    said = (
        f"Predicted for training {trained}, against training all of them: {cost.step:.2f} of the work of a step "
        f"(forward {cost.forward:.2f}, backward {cost.backward:.2f}), {cost.saved_activation_bytes:.2f} of the "
        f"activations kept for backward, {cost.optimizer_bytes:.2f} of the optimizer state."
    )
    if cost.head_share >= HEAD_SHARE_TOLD:
        said += (
            f" The unembedding takes {cost.head_share:.2f} of the work that is left and is the same for every cut; "
            f"no cut can bring a step below {cost.floor:.2f}."
        )
    return said


def _trained_parameters(layer: LayerProbe, mode: Mode) -> int:
    if not mode.adapter:
        return layer.parameters
    products = layer.passes["trained"].products
    return sum(product.modules * product.rank * (product.inputs + product.outputs) for product in products)


def _moved(layer: LayerProbe, shape: StepShape, case: Case) -> tuple[float, float]:
    """Bytes that a layer moves forward and backward."""
    chosen, size = layer.passes[case], {"batch": shape.batch, "positions": shape.positions}
    return chosen.forward_moved.at(**size), chosen.backward_moved.at(**size)
