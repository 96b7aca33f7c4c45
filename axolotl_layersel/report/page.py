"""`report.html`: the plan as one page that needs nothing else, for a desk, a phone, a dark screen and a keyboard.

The page is whole without its script; the script adds a slider that shows what every other cut would keep and cost. A
plan is data from elsewhere: every text in it is escaped, its numbers travel as escaped JSON, and the page's policy
allows no connection and no script or style but the two that it carries, known by their hashes.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from collections.abc import Iterable
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from axolotl_layersel.plan import Plan, write_text
from axolotl_layersel.report.explorer import bar, explorer, script_data
from axolotl_layersel.report.figure import draw
from axolotl_layersel.report.inline_svg import inline_charts, style_sheet
from axolotl_layersel.report.wording import SALF, layer_range, model_name, notes, printable, recipe, subject, summary

REPORT_FILE = "report.html"


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
    style, script = style_sheet() + _asset("page.css"), _asset("page.js")
    k, count = plan.first_trainable, plan.num_layers
    title = f"Train {layer_range(k, count - 1)} ({count - k} of {count})"
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    body = [
        f"<header><h1>{escape(title)}</h1><p>{escape(subject(plan))}</p></header>",
        *(f'<p class="note">{escape(note)}</p>' for note in notes(plan)),
        explorer(plan),
        _why(plan),
        _table(plan),
        f"<h2>Train the same layers again</h2><p>These lines in a config give this cut without scoring:</p>"
        f"<pre>plugins:\n  - layersel\n{escape(recipe(plan))}</pre>",
        f'<p>The config of this run:</p><pre tabindex="0">{escape(config_text)}</pre>' if config_text else "",
        _origin(plan),
        f"<footer><p>The deviation follows {escape(SALF)}. Descent, predicted retention and costs are this tool's "
        "own.</p></footer>",
    ]
    head = [
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="referrer" content="no-referrer">',
        f"<title>{escape(title)}, {escape(model_name(plan))}</title>",
        f"<style>{style}</style>",
    ]
    data = f'<script type="application/json" id="plan">{_json(script_data(plan))}</script><script>{script}</script>'
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


def _why(plan: Plan) -> str:
    """The sentence about the cut, and the charts."""
    cut = summary(plan)["cut"]
    charts = "".join(f"<figure>{chart}</figure>" for chart in inline_charts(plan))
    key = '<p class="soft">Orange line: the cut. Grey ground: frozen layers.</p>' if charts else ""
    return f'<h2>Why this cut</h2><p>{escape(cut[:1].upper() + cut[1:])}</p>{key}<div class="figures">{charts}</div>'


def _table(plan: Plan) -> str:
    """Layer by layer; nothing where the layers do not differ."""
    if plan.scores is None:
        return ""
    deviation, descent = plan.scores.deviation[1:], plan.scores.descent
    low = plan.scores.retention_low or plan.scores.retention
    rows = []
    for i, (after, fell, retained) in enumerate(zip(deviation, descent, plan.scores.retention, strict=True)):
        state = "trained" if i >= plan.first_trainable else "frozen"
        row = f"{state} cut" if i == plan.first_trainable and i else state
        rows.append(
            f'<tr class="{row}"><th scope="row">{i}</th>'
            f'<td>{after:.3f}</td><td class="bar">{bar(after, of=max(deviation), name=state)}</td>'
            f'<td>{fell:.3f}</td><td class="bar">{bar(fell, of=max(descent), name=state)}</td>'
            f"<td>{retained:.3f}</td><td>{low[i]:.3f}</td><td>{state}</td></tr>"
        )
    return (
        '<h2>Layer by layer</h2><p class="soft">Deviation: of the state after the layer from the semantics of the '
        "labels; descent: the layer's share of its fall. Kept: the predicted share of the improvement of training all "
        "layers that training from this layer on keeps, and the low end of its 90 % band.</p>"
        '<div class="scroll"><table><thead><tr>'
        '<th scope="col">layer</th><th scope="col">deviation</th><td class="bar"></td><th scope="col">descent</th>'
        '<td class="bar"></td><th scope="col">kept</th><th scope="col">at least</th>'
        '<th scope="col">state</th></tr></thead>'
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
    shown = ((name, ", ".join(map(str, value)) if isinstance(value, list) else value) for name, value in pairs)
    terms = "".join(
        f"<dt>{escape(printable(name).replace('_', ' '))}</dt><dd>{escape(printable(value))}</dd>"
        for name, value in shown
        if value is not None
    )
    return f"<dl>{terms}</dl>"
