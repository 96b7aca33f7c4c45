"""What a run's cut will cost, as the plan carries it: `cut_cost.py` asked in the terms of an axolotl config."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from axolotl_layersel.cost.cut_cost import CutCost, Mode, StepShape, cut_costs
from axolotl_layersel.model.decoder_stack import DecoderStack
from axolotl_layersel.plan import CostOfCuts, Prediction, StepAmounts

RATIOS = ("forward", "backward", "step", "saved_activation_bytes", "trainable_parameters")


def mode_of(
    cfg: Mapping[str, Any],
    *,
    module_names: Sequence[str],
    expert_parameters: Sequence[str] = (),
    train_head: bool,
    stops_backward: bool,
) -> Mode:
    """How a config trains, in the cost model's terms.

    Args:
        cfg: axolotl's validated config.
        module_names: names of the base model's modules, which a regex of targets is matched with.
        expert_parameters: full names of the stacked expert tensors that get an adapter, as the run writes them.
        train_head: full fine-tuning also trains final norm and head.
        stops_backward: the backward pass ends at the cut.
    """
    adapter = cfg.get("adapter")
    return Mode(
        adapter=adapter,
        rank=int(cfg.get("lora_r") or 0) if adapter else 0,
        target_modules=_target_modules(cfg, module_names) if adapter else None,
        target_parameters=tuple(sorted({_in_layer(name) for name in expert_parameters})),
        dropout=float(cfg.get("lora_dropout") or 0.0) if adapter else 0.0,
        checkpointing=bool(cfg.get("gradient_checkpointing")),
        reentrant=bool((cfg.get("gradient_checkpointing_kwargs") or {}).get("use_reentrant")),
        train_norm_and_head=train_head,
        stop_backward=stops_backward,
        optimizer_bytes_per_parameter=2.0 if "8bit" in str(cfg.get("optimizer")) else 8.0,
    )


def _target_modules(cfg: Mapping[str, Any], module_names: Sequence[str]) -> tuple[str, ...] | None:
    targets = cfg.get("lora_target_modules")
    if cfg.get("lora_target_parameters") and not (targets or cfg.get("lora_target_linear")):
        return ()
    if cfg.get("lora_target_linear") or targets in (None, [], "all-linear"):
        return None
    if isinstance(targets, str):
        return tuple(sorted({name.rpartition(".")[2] for name in module_names if re.fullmatch(targets, name)}))
    return tuple(str(target).rpartition(".")[2] for target in targets)


def _in_layer(name: str) -> str:
    """`model.layers.3.mlp.experts.down_proj` -> `mlp.experts.down_proj`."""
    return re.split(r"[.]\d+[.]", name, maxsplit=1)[-1]


def predict(
    stack: DecoderStack,
    *,
    mode: Mode,
    first_trainable: int,
    shape: StepShape,
    autocast: torch.dtype | None,
    why: str | None,
) -> Prediction:
    """Ratios to training every layer in the same mode, for the cut and for all cuts.

    Args:
        stack: of the bare model; a short forward pass of its own layers is run.
        why: why nothing below the cut is saved, or None.
    """
    costs = cut_costs(stack, mode=mode, shape=shape, autocast=autocast)
    chosen = costs[first_trainable]
    return Prediction(
        **{name: getattr(chosen, name) for name in RATIOS},
        head_share=chosen.head_share,
        floor=chosen.floor,
        gradient_checkpointing=mode.checkpointing,
        why=why,
        per_cut=CostOfCuts(**{name: [getattr(cost, name) for cost in costs] for name in RATIOS}),
        absolute=_absolute(chosen, shape),
    )


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
