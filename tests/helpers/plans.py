"""Plans for the tests of what people look at: scored ones of any depth, and a cut given by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from axolotl_layersel.method import gain as gains
from axolotl_layersel.plan import Plan
from axolotl_layersel.plan_parts import (
    CacheCosts,
    CostOfCuts,
    PeakMemory,
    Pilot,
    PilotCut,
    Prediction,
    ScoredSample,
    Scores,
    StepAmounts,
)


def scored_plan(
    *, num_layers: int = 12, first_trainable: int | None = None, scores: dict[str, Any] | None = None, **overrides: Any
) -> Plan:
    """A plan as scoring leaves it: a falling deviation, the package's own gains, costs that fall with the cut.

    Args:
        scores: what is different in `Plan.scores`.
    """
    depth = np.linspace(0.0, 1.0, num_layers + 1)
    deviation_S = 0.97 - 0.1 * (depth > 0) - 0.35 * depth**2 + 0.02 * np.sin(9 * depth)
    share_L = gains.descent(deviation_S)
    low_L, retention_L, high_L = (gains.retention(share_L, exponent=exponent) for exponent in (0.14, 0.1, 0.07))
    k = int(np.flatnonzero(retention_L >= 0.95)[-1]) if first_trainable is None else first_trainable
    near = [cut for cut in (k - 2, k - 1, k, k + 1) if 0 <= cut < num_layers]
    shares = [{-2: 0.04, -1: 0.19, 0: 0.66, 1: 0.11}[cut - k] for cut in near]
    values: dict[str, Any] = {
        "base_model": "HuggingFaceTB/SmolLM2-135M",
        "adapter": "lora",
        "num_layers": num_layers,
        "first_trainable": k,
        "created_by": {"axolotl_layersel": "0.1.0", "torch": "2.13.0"},
        "options": {"policy": "coverage", "coverage": 0.95, "deviation": "cosine"},
        "scores": replace(
            Scores(
                deviation=deviation_S.tolist(),
                deviation_stderr=(0.004 + 0.012 * depth).tolist(),
                descent=share_L.tolist(),
                retention=retention_L.tolist(),
                retention_low=low_L.tolist(),
                retention_high=high_L.tolist(),
                exponent=0.1,
                stability={cut: share / math.fsum(shares) for cut, share in zip(near, shares, strict=True)},
                row_cuts={cut: 1 + round(60 * math.exp(-(((cut - k) / 2) ** 2))) for cut in range(num_layers)},
                tokens=23_456,
                loss=2.5,
            ),
            **(scores or {}),
        ),
        "prediction": prediction(num_layers=num_layers, first_trainable=k),
        "sample": sample("yahma/alpaca-cleaned"),
        "notes": [],
        "seconds": 21.5,
    }
    return Plan(**{**values, **overrides})


def pilot(*, first_trainable: int = 10) -> Pilot:
    """A pilot that kept 0.6 with the layers from `first_trainable` on, and 0.8 with those from half of that on."""
    half = PilotCut(first_trainable // 2, 3.6e-3, 2.1, 0.8, 0.02)
    cuts = [PilotCut(0, 3e-3, 2.0, 1.0, 0.0), half, PilotCut(first_trainable, 4.7e-3, 2.2, 0.6, 0.03)]
    return Pilot(8, 8, 64, 24, 2.5, cuts, switched_off={6: 0.8, first_trainable: 0.4}, cost_share=0.019)


def sample(*datasets: str) -> ScoredSample:
    """128 rows of these data sets."""
    return ScoredSample(
        128, seed=42, dataset_fingerprint="d" * 12, tokenizer_fingerprint="t" * 12, datasets=[*datasets]
    )


def cached(plan: Plan, *, epochs: float = 3.0, tokens: int | None = 1_000_000) -> Plan:
    """The plan of a run with a prefix cache on the disk, whose frozen weights leave the device."""
    assert plan.prediction
    step, k = plan.prediction.per_cut.step, plan.first_trainable
    frozen = [0.3 * cut / plan.num_layers for cut in range(plan.num_layers)]
    runs = [one - part * (1 - 1 / epochs) for one, part in zip(step, frozen, strict=True)]
    cache = CacheCosts("disk", epochs, step[k], step[k] - frozen[k], runs[k], 8192, tokens, offloaded_bytes=3 * 10**9)
    memory = PeakMemory(
        weights=4 * 10**9,
        offloaded=3 * 10**9,
        gradients=10**7,
        optimizer=2 * 10**7,
        activations=10**9,
        passing=5 * 10**8,
        total=553 * 10**7,
        all_layers=9 * 10**9,
    )
    per_cut = replace(plan.prediction.per_cut, frozen_forward=frozen, whole_run=runs)
    return replace(plan, prediction=replace(plan.prediction, per_cut=per_cut, cache=cache, memory=memory))


def prediction(*, num_layers: int, first_trainable: int, why: str | None = None) -> Prediction:
    """Costs as ratios to training every layer, for the chosen cut and for every cut."""
    left = [1 - cut / num_layers for cut in range(num_layers)]
    curves = {
        "forward": [1.0] * num_layers,
        "step": [0.46 + 0.54 * share for share in left],
        "backward": [0.12 + 0.88 * share for share in left],
        "saved_activation_bytes": [0.08 + 0.92 * share for share in left],
        "trainable_parameters": left,
    }
    chosen = {name: curve[first_trainable] for name, curve in curves.items()}
    return Prediction(
        **chosen,
        head_share=0.1,
        floor=0.46,
        gradient_checkpointing=True,
        why=why,
        per_cut=CostOfCuts(**curves),
        absolute=StepAmounts(
            rows=2,
            positions=2048,
            forward_flops=1e12,
            backward_flops=2e12 * chosen["backward"],
            all_layers_backward_flops=2e12,
            saved_activation_bytes=1.5e9 * chosen["saved_activation_bytes"],
            trainable_parameters=round(4_884_480 * chosen["trainable_parameters"]),
        ),
    )


def given_plan(*, num_layers: int = 12, first_trainable: int = 5, **overrides: Any) -> Plan:
    """A cut given by hand: nothing was scored."""
    return Plan(
        base_model="HuggingFaceTB/SmolLM2-135M",
        adapter="lora",
        num_layers=num_layers,
        first_trainable=first_trainable,
        **overrides,
    )
