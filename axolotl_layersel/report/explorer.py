"""The page's slider over cuts: the layers in a row, and what each cut is predicted to keep and cost.

Every text that the slider can show is written here, once for each cut; `page.js` only picks one and moves the charts.
"""

from __future__ import annotations

import math
from html import escape
from typing import Any

from axolotl_layersel.plan import Plan
from axolotl_layersel.report.wording import (
    checkpointing,
    every_layer,
    layer_range,
    mode_name,
    per_cut,
    printable,
    summary,
)

BYTES = (1024, ("B", "KiB", "MiB", "GiB", "TiB"))
SCALES = {"saved_activation_bytes": BYTES, "trainable_parameters": (1000, ("", "K", "M", "B"))}  # base, units
TILES = {  # name in the plan -> (colour, label)
    "retention": ("trained", "improvement kept"),
    "step": ("step", "FLOPs of a step"),
    "whole_run": ("step", "FLOPs of the run, cached"),
    "backward": ("step", "FLOPs of backward"),
    "saved_activation_bytes": ("memory", "activation memory"),
    "trainable_parameters": ("soft", "trainable parameters"),
}


def script_data(plan: Plan) -> dict[str, Any]:
    """What the script needs: the curves, and for each cut the numbers and the sentence that the page shows."""
    cuts, curves = range(plan.num_layers), _curves(plan)
    return {
        "first": plan.first_trainable,
        "curves": curves,
        "amounts": {name: [_amount(plan, name, cut) for cut in cuts] for name in curves},
        "ratios": {name: [f"{value:.2f}" for value in values] for name, values in curves.items()},
        "sentences": [_sentence(plan, curves, cut) for cut in cuts],
    }


def explorer(plan: Plan) -> str:
    """The layers in a row, the slider, and a tile for each predicted number."""
    k, last = plan.first_trainable, plan.num_layers - 1
    curves = _curves(plan)
    tiles = "".join(
        f'<li class="tile" data-curve="{name}"><small>{TILES[name][1]}</small><b>{values[k]:.2f}</b>'
        f"{bar(values[k], of=1.0, name=TILES[name][0])}"
        f'<small class="amount">{_amount(plan, name, k)}</small></li>'
        for name, values in curves.items()
    )
    return (
        f'<section class="explore"><h2>What this cut keeps and costs</h2>{_strip(plan)}'
        '<div class="sides"><span>input side</span><span>output side</span></div>'
        '<div id="control" hidden>'
        f'<input type="range" id="first" min="0" max="{last}" step="1" value="{k}"{" disabled" if last == 0 else ""}>'
        f'<div class="control"><label for="first">First trainable layer: <span id="at">{k}</span></label>'
        f'<button type="button" id="reset" disabled>Back to the plan: {k}</button></div></div>'
        f'<ul class="tiles">{tiles}</ul>'
        f'<output for="first" id="sentence" aria-live="polite">{escape(_sentence(plan, curves, k))}</output>'
        f'<p class="soft">{escape(_basis(plan))}</p></section>'
    )


def bar(value: float, *, of: float, name: str) -> str:
    """A small horizontal bar for a table's cell, from zero; `name` is its colour."""
    width = 100 * min(max(value / of, 0.0), 1.0) if of > 0 else 0.0
    return (
        '<svg class="cell" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="{name}" x="0" y="0" width="{width:.2f}" height="10"/></svg>'
    )


def _strip(plan: Plan) -> str:
    """A box for each layer, input side left."""
    width = 100 / plan.num_layers
    gap = min(0.5, width * 0.15)
    boxes = "".join(
        f'<g class="{"trained" if i >= plan.first_trainable else "frozen"}" data-layer="{i}"><rect '
        f'x="{i * width + gap / 2:.3f}" y="0" width="{width - gap:.3f}" height="10"/></g>'
        for i in range(plan.num_layers)
    )
    return f'<svg class="strip" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">{boxes}</svg>'


def _curves(plan: Plan) -> dict[str, list[float]]:
    """What is known of every cut, by name; the order of `TILES`."""
    known = {name: per_cut(plan, name) for name in TILES}
    return {name: values for name, values in known.items() if values is not None}


def _sentence(plan: Plan, curves: dict[str, list[float]], cut: int) -> str:
    parts = [
        f"{layer_range(cut, plan.num_layers - 1)} trained ({plan.num_layers - cut} of {plan.num_layers})",
        *(f"{TILES[name][1]} {values[cut]:.2f}" for name, values in curves.items()),
    ]
    return f"Cut at {cut}: {', '.join(parts)}."


def _amount(plan: Plan, name: str, cut: int) -> str:
    """A ratio as an amount, such as 1.2 GiB or 4.1 M; the band of the retention; or nothing."""
    if name == "retention" and plan.scores and plan.scores.retention_low and plan.scores.retention_high:
        return f"{plan.scores.retention_low[cut]:.2f} to {plan.scores.retention_high[cut]:.2f}"
    whole, ratios = every_layer(plan, name) if name in SCALES else None, per_cut(plan, name)
    if whole is None or ratios is None:
        return ""
    base, units = SCALES[name]
    amount = whole * ratios[cut]
    power = max(0, min(len(units) - 1, math.floor(math.log(amount, base) + 1e-9))) if amount > 0 else 0
    return f"{amount / base**power:.1f} {units[power]}".strip()


def _basis(plan: Plan) -> str:
    """What the numbers are ratios of, and in which mode."""
    if plan.prediction is None:
        known = "Predicted share of the improvement of training every layer. " if plan.scores else ""
        return f"{known}No cost is known for this plan."
    size, told = plan.prediction.absolute, summary(plan)
    sentences = [
        f"Predicted ratios to training every layer, {mode_name(plan)} {checkpointing(plan.prediction)}.",
        f"Amounts are for a micro batch of {size.rows} x {size.positions} tokens.",
        f"No cut brings a step below {plan.prediction.floor:.2f} of the FLOPs.",
        printable(plan.prediction.why or ""),
        *(f"{name.capitalize()}: {told[name]}" for name in ("cache", "memory") if name in told),
    ]
    return " ".join(filter(None, sentences))
