"""What a cut costs: FLOPs, saved activations and trained parameters of a step, for every cut.

`layer_costs.py` says what a layer costs in each case that a cut can put it in; here that is added up for the run's own
mode and shape. Ratios are to training every decoder layer in the same mode, by the stock trainer.

FLOPs alone are not time: norms, activations, rotary embeddings and adapters have hardly any and still take some.
Not counted: the optimizer's arithmetic, and kernels that are no operations of torch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from axolotl_layersel.cost.layer_costs import Case, StackCost, measure_layers
from axolotl_layersel.model.adapted_modules import Adapters
from axolotl_layersel.model.decoder_stack import DecoderStack


@dataclass(frozen=True)
class StepShape:
    """One micro batch, padding included."""

    batch: int  # rows
    positions: int  # of a row


@dataclass(frozen=True)
class Mode:
    """How the run trains."""

    adapters: Adapters | None  # None for full fine-tuning
    checkpointing: bool = False  # recompute layers in backward
    reentrant: bool = False  # the older kind of checkpointing
    train_norm_and_head: bool = False  # full fine-tuning only; both stay frozen under adapters
    stop_backward: bool = True  # False: gradients flow to the embeddings, as in the stock trainer

    def __post_init__(self) -> None:
        if self.adapters and self.train_norm_and_head:
            raise ValueError("train_norm_and_head is for full fine-tuning; with adapters leave it False")


@dataclass(frozen=True)
class StepCost:
    """One forward and backward pass over one micro batch."""

    forward_flops: float
    frozen_flops: float  # of the forward pass, what the layers below the cut take
    backward_flops: float  # recomputation included
    head_flops: float  # of both, what the unembedding takes
    saved_activation_bytes: float  # from forward for backward, parameters excluded
    recomputed_bytes: float  # saved anew, by one layer at a time, where checkpointing recomputes it
    trainable_parameters: int

    @property
    def flops(self) -> float:
        """Of both passes."""
        return self.forward_flops + self.backward_flops


@dataclass(frozen=True)
class CutCost:
    """What training layers k..L-1 costs; ratios are to training every layer in the same mode."""

    first_trainable: int  # k
    forward: float  # ratio of FLOPs; near 1, as frozen layers lack only their adapters
    backward: float  # ratio of FLOPs
    step: float  # ratio of FLOPs
    saved_activation_bytes: float  # ratio
    trainable_parameters: float  # ratio; the same for the optimizer's state, which is proportional
    head_share: float  # share of this cut's step that the unembedding takes, whatever the cut
    floor: float  # step ratio that no cut can go below: everything forward, and back to the last layer's output
    frozen_forward: float  # share of a step with all layers that layers 0..k-1 take forward; a prefix cache saves it
    state_bytes: int  # of the hidden state that layer k is given, for each position; a prefix cache keeps it
    state_width: int  # its numbers
    cut: StepCost  # in FLOPs, bytes and numbers
    all_layers: StepCost  # what the ratios are to


def cut_costs(
    stack: DecoderStack, *, mode: Mode, shape: StepShape, autocast: torch.dtype | None = None
) -> list[CutCost]:
    """The cost of every cut k = 0..L-1, counted in short passes through the model's own layers.

    Args:
        stack: of the bare model, before adapters, quantised or not.
        mode: of the run.
        shape: of its micro batches.
        autocast: the trainer's autocast dtype, None for full precision.

    Raises:
        ValueError: the model carries adapters, or no decoder layer gets one in a mode with adapters.
    """
    return price_cuts(measure_mode(stack, mode=mode, autocast=autocast), mode=mode, shape=shape)


def measure_mode(stack: DecoderStack, *, mode: Mode, autocast: torch.dtype | None = None) -> StackCost:
    """The measurements behind `cut_costs`; they serve every shape, with and without checkpointing."""
    return measure_layers(
        stack, adapters=mode.adapters, train_norm_and_head=mode.train_norm_and_head, autocast=autocast
    )


def price_cuts(measured: StackCost, *, mode: Mode, shape: StepShape) -> list[CutCost]:
    """The cost of every cut k = 0..L-1, from measurements of the same mode."""
    base = step_cost(measured, mode=dataclasses.replace(mode, stop_backward=False), shape=shape, first_trainable=0)
    all_frozen = step_cost(measured, mode=mode, shape=shape, first_trainable=len(measured.layers))
    costs = []
    for k in range(len(measured.layers)):
        cut = step_cost(measured, mode=mode, shape=shape, first_trainable=k)
        costs.append(
            CutCost(
                first_trainable=k,
                forward=cut.forward_flops / base.forward_flops,
                backward=cut.backward_flops / base.backward_flops,
                step=cut.flops / base.flops,
                saved_activation_bytes=cut.saved_activation_bytes / base.saved_activation_bytes,
                trainable_parameters=cut.trainable_parameters / base.trainable_parameters,
                head_share=cut.head_flops / cut.flops,
                floor=(all_frozen.frozen_flops + all_frozen.head_flops) / base.flops,
                frozen_forward=cut.frozen_flops / base.flops,
                state_bytes=round(measured.layers[k].input_bytes),
                state_width=measured.layers[k].input_width,
                cut=cut,
                all_layers=base,
            )
        )
    return costs


def step_cost(measured: StackCost, *, mode: Mode, shape: StepShape, first_trainable: int) -> StepCost:
    """One step that trains layers k..L-1. k = 0 stops nothing, so gradients reach the embeddings."""
    through = first_trainable == 0 or not mode.stop_backward
    size = {"batch": shape.batch, "positions": shape.positions}
    forward, backward = measured.head.forward_flops.at(**size), measured.head.backward_flops.at(**size)
    head, frozen = forward + backward, 0.0
    saved, shared, recomputed = measured.head.saved_bytes.at(**size), 0.0, 0.0
    parameters = measured.head_parameters
    for index, layer in enumerate(measured.layers):
        trained = index >= first_trainable
        leaf = index == first_trainable and not through and not (mode.checkpointing and mode.reentrant)
        case: Case = "passed" if not trained else "first" if leaf else "trained"
        cost = layer.cases[case]
        forward += cost.forward_flops.at(**size)
        if not trained:
            frozen += cost.forward_flops.at(**size)
        if not (trained or through):
            continue
        parameters += layer.trainable_parameters if trained else 0
        backward += cost.backward_flops.at(**size)
        if mode.checkpointing:
            backward += (cost.forward_flops if mode.reentrant else cost.recomputed_flops).at(**size)
            saved += layer.input_bytes * shape.batch * shape.positions
            recomputed = max(recomputed, cost.saved_bytes.at(**size))
        else:
            saved += cost.saved_bytes.at(**size)
            shared = max(shared, cost.shared_bytes.at(batch=1, positions=shape.positions))
    return StepCost(
        forward_flops=forward,
        frozen_flops=frozen,
        backward_flops=backward,
        head_flops=head,
        saved_activation_bytes=saved + shared,
        recomputed_bytes=recomputed,
        trainable_parameters=parameters,
    )
