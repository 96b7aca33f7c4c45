"""What a run's cut will cost, as the plan carries it."""

from __future__ import annotations

import torch

from axolotl_layersel.cost.cut_cost import CutCost, Mode, StepShape, cut_costs
from axolotl_layersel.model.decoder_stack import DecoderStack
from axolotl_layersel.plan_parts import CostOfCuts, Prediction, StepAmounts

RATIOS = ("forward", "backward", "step", "saved_activation_bytes", "trainable_parameters")


def predict(
    stack: DecoderStack,
    *,
    mode: Mode,
    first_trainable: int,
    shape: StepShape,
    autocast: torch.dtype | None,
    why: str | None,
) -> tuple[Prediction, list[CutCost]]:
    """Ratios to training every layer in the same mode, for the cut and for all cuts, and what they were made from.

    Args:
        stack: of the bare model; a short forward pass of its own layers is run.
        why: why nothing below the cut is saved, or None.
    """
    costs = cut_costs(stack, mode=mode, shape=shape, autocast=autocast)
    chosen = costs[first_trainable]
    prediction = Prediction(
        **{name: getattr(chosen, name) for name in RATIOS},
        head_share=chosen.head_share,
        floor=chosen.floor,
        gradient_checkpointing=mode.checkpointing,
        why=why,
        per_cut=CostOfCuts(**{name: [getattr(cost, name) for cost in costs] for name in (*RATIOS, "frozen_forward")}),
        absolute=_absolute(chosen, shape),
    )
    return prediction, costs


def _absolute(chosen: CutCost, shape: StepShape) -> StepAmounts:
    return StepAmounts(
        rows=shape.batch,
        positions=shape.positions,
        forward_flops=chosen.cut.forward_flops,
        backward_flops=chosen.cut.backward_flops,
        all_layers_backward_flops=chosen.all_layers.backward_flops,
        saved_activation_bytes=chosen.cut.saved_activation_bytes,
        trainable_parameters=chosen.cut.trainable_parameters,
    )
