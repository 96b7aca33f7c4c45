"""`report.html`: the plan as one page that needs nothing else, for a desk, a phone, a dark screen and a keyboard.

The page is whole without its script; the script adds a slider that shows what every other cut would keep and cost. A
plan is data from elsewhere: every text in it is escaped, its numbers travel as escaped JSON, and the page's policy
allows no connection and no script or style but the two whose hashes it names.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from axolotl_layersel.plan import Plan, write_text
from axolotl_layersel.report.charts import bar, charts, strip
from axolotl_layersel.report.figure import draw
from axolotl_layersel.report.wording import (
    SALF,
    dataset_name,
    every_layer,
    layer_range,
    mode_name,
    model_name,
    notes,
    per_cut,
    printable,
    recipe,
    summary,
)

BYTES = (1024, ("B", "KiB", "MiB", "GiB", "TiB"))
SCALES = {"saved_activation_bytes": BYTES, "trainable_parameters": (1000, ("", "K", "M", "B"))}  # base, units
REPORT_FILE = "report.html"
CURVES = {  # name in the plan -> (colour class, label)
    "retention": ("kept", "improvement kept"),
    "step": ("step", "FLOPs of a step"),
    "backward": ("step", "FLOPs of backward"),
    "saved_activation_bytes": ("memory", "activation memory"),
    "trainable_parameters": ("rest", "trainable parameters"),
}


def write_report(plan: Plan, folder: Path, *, config_text: str | None) -> list[Path]:
    """Write `deviation.png`, `deviation.svg` and `report.html` into a folder, each whole or not at all.

    Args:
        plan: what to show.
        folder: made if it is missing.
        config_text: the run's config as YAML, or None.

    Returns:
        The files written; without the figures for a plan that has nothing to draw.

    Raises:
        OSError: the folder cannot be written.
    """
    drawn = draw(plan, folder)
    write_text(folder / REPORT_FILE, render(plan, config_text=config_text))
    return [*drawn, folder / REPORT_FILE]


def render(plan: Plan, *, config_text: str | None = None) -> str:
    """The page as text; equal plans give equal text."""
    style, script = _asset("page.css"), _asset("page.js")
    k, count = plan.first_trainable, plan.num_layers
    title = f"Train {layer_range(k, count - 1)} ({count - k} of {count})"
    subject = [part for part in (model_name(plan), mode_name(plan), dataset_name(plan)) if part]
    lines = summary(plan)
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    drawn = "".join(charts(plan))
    body = [
        f"<header><h1>{escape(title)}</h1><p>{escape(', '.join(subject))}</p></header>",
        *(f'<p class="note">{escape(note)}</p>' for note in notes(plan)),
        _explorer(plan),
        f'<h2>Why this cut</h2><p>{escape(_sentence(lines["cut"]))}</p><div class="figures">{drawn}</div>',
        _table(plan),
        f"<h2>Train the same layers again</h2><p>These lines in a config give this cut without scoring:</p>"
        f"<pre>plugins:\n  - layersel\n{escape(recipe(plan))}</pre>",
        f'<p>The config of this run:</p><pre tabindex="0">{escape(config_text)}</pre>' if config_text else "",
        _origin(plan),
        f"<footer><p>The deviation follows {escape(SALF)}. Predicted retention, gain and costs are this tool's own.</p>"
        "</footer>",
    ]
    head = [
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="referrer" content="no-referrer">',
        f"<title>{escape(title)}, {escape(model_name(plan))}</title>",
        f"<style>{style}</style>",
    ]
    data = f'<script type="application/json" id="plan">{_json(_data(plan))}</script><script>{script}</script>'
    return (
        '<!DOCTYPE html>\n<html lang="en"><head>'
        + "\n".join(head)
        + "</head>\n<body><main>"
        + "\n".join(body)
        + f"</main>\n{data}</body></html>\n"
    )


def _asset(name: str) -> str:
    return files("axolotl_layersel.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json(values: Any) -> str:
    """JSON that cannot end the script element it stands in, whatever the texts."""
    text = json.dumps(values, allow_nan=False, ensure_ascii=False, sort_keys=True)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _curves(plan: Plan) -> dict[str, list[float]]:
    """What is known of every cut, by name; the order of `CURVES`."""
    known = {name: per_cut(plan, name) for name in CURVES}
    return {name: values for name, values in known.items() if values is not None}


def _amount(plan: Plan, name: str, ratio: float) -> str:
    """A ratio as an amount, such as 1.2 GiB or 4.1 M, or nothing; `page.js` writes the same."""
    whole = every_layer(plan, name) if name in SCALES else None
    if whole is None:
        return ""
    base, units = SCALES[name]
    amount = whole * ratio
    power = max(0, min(len(units) - 1, math.floor(math.log(amount, base) + 1e-9))) if amount > 0 else 0
    return f"{amount / base**power:.1f} {units[power]}".strip()


def _data(plan: Plan) -> dict[str, Any]:
    """What the script needs."""
    curves: dict[str, dict[str, Any]] = {
        name: {"label": CURVES[name][1], "values": values} for name, values in _curves(plan).items()
    }
    for name in curves.keys() & SCALES.keys():
        base, units = SCALES[name]
        curves[name] |= {"whole": every_layer(plan, name), "base": base, "units": units}
    return {"layers": plan.num_layers, "first": plan.first_trainable, "curves": curves}


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _explorer(plan: Plan) -> str:
    """The layers in a row, the slider, and a tile for each predicted number."""
    k, last = plan.first_trainable, plan.num_layers - 1
    curves = _curves(plan)
    tiles = "".join(
        f'<li class="tile" data-curve="{name}"><small>{CURVES[name][1]}</small><b>{values[k]:.2f}</b>'
        f"{bar(values[k], of=1.0, name=CURVES[name][0])}"
        f'<small class="amount">{_amount(plan, name, values[k])}</small></li>'
        for name, values in curves.items()
    )
    told = ", ".join(f"{CURVES[name][1]} {values[k]:.2f}" for name, values in curves.items())
    trained = f"{layer_range(k, last)} trained ({plan.num_layers - k} of {plan.num_layers})"
    sentence = f"Cut at {k}: {', '.join([trained, told] if told else [trained])}."
    return (
        f'<section class="explore"><h2>What this cut keeps and costs</h2>{strip(plan)}'
        '<div class="sides"><span>input side</span><span>output side</span></div>'
        '<div id="control" hidden>'
        f'<input type="range" id="first" min="0" max="{last}" step="1" value="{k}"{" disabled" if last == 0 else ""}>'
        f'<div class="control"><label for="first">First trainable layer: <span id="at">{k}</span></label>'
        f'<button type="button" id="reset" disabled>Back to the plan: {k}</button></div></div>'
        f'<ul class="tiles">{tiles}</ul>'
        f'<output for="first" id="told" aria-live="polite">{escape(sentence)}</output>'
        f'<p class="soft">{escape(_basis(plan))}</p></section>'
    )


def _basis(plan: Plan) -> str:
    """What the numbers are ratios of, and in which mode."""
    if not _curves(plan):
        return "No cost is known for this plan."
    if plan.prediction is None:
        return f"Predicted ratios to training every layer, {mode_name(plan)}."
    mode = f"{'with' if plan.prediction.gradient_checkpointing else 'without'} gradient checkpointing"
    size = plan.prediction.absolute
    return (
        f"Predicted ratios to training every layer, {mode_name(plan)} {mode}. Amounts are for a micro batch of "
        f"{size.rows} x {size.positions} tokens. No cut brings a step below {plan.prediction.floor:.2f} of the FLOPs. "
        f"{printable(plan.prediction.why or '')}"
    ).rstrip()


def _table(plan: Plan) -> str:
    """Layer by layer; nothing where the layers do not differ."""
    if plan.scores is None:
        return ""
    deviation, gains = plan.scores.deviation[1:], plan.scores.gain
    rows = []
    for i, (after, gain, kept) in enumerate(zip(deviation, gains, plan.scores.retention, strict=True)):
        state = "trained" if i >= plan.first_trainable else "frozen"
        row = f"{state} cut" if i == plan.first_trainable and i else state
        rows.append(
            f'<tr class="{row}"><th scope="row">{i}</th>'
            f'<td>{after:.3f}</td><td class="bar">{bar(after, of=max(deviation), name=state)}</td>'
            f'<td>{gain:.3f}</td><td class="bar">{bar(gain, of=max(gains), name=state)}</td>'
            f"<td>{kept:.3f}</td><td>{state}</td></tr>"
        )
    return (
        '<h2>Layer by layer</h2><p class="soft">Deviation: of the state after the layer from the semantics of the '
        "labels. Kept: the predicted share of the improvement of training all layers that training from this layer on "
        'keeps; gain is what it loses when this layer is frozen as well.</p><div class="scroll"><table><thead><tr>'
        '<th scope="col">layer</th><th scope="col">deviation</th><td class="bar"></td><th scope="col">gain</th>'
        '<td class="bar"></td><th scope="col">kept</th><th scope="col">state</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _origin(plan: Plan) -> str:
    """The options in force, the sample, and the versions."""
    scoring: dict[str, Any] = {} if plan.sample is None else dataclasses.asdict(plan.sample)
    if plan.scores is not None:
        scoring |= {"tokens": plan.scores.tokens, "loss": plan.scores.loss}
    if plan.seconds is not None:
        scoring["scoring"] = f"{plan.seconds:.1f} s"
    parts = (("How it was scored", {**plan.options, **scoring}), ("Versions", plan.created_by))
    return "".join(f"<h2>{title}</h2>{_list(values.items())}" for title, values in parts if values)


def _list(pairs: Iterable[tuple[str, Any]]) -> str:
    told = ((name, ", ".join(map(str, value)) if isinstance(value, list) else value) for name, value in pairs)
    terms = "".join(
        f"<dt>{escape(printable(name).replace('_', ' '))}</dt><dd>{escape(printable(value))}</dd>"
        for name, value in told
        if value is not None
    )
    return f"<dl>{terms}</dl>"
