"""The charts of the page: inline SVG without styles or scripts of its own, so that the page's strict policy holds.

Colours, also those of a dark screen, come from the page's style sheet by class name. Every chart carries the cut as an
element of class `cut` that tells where layer 0 lies and how wide a layer is; `page.js` moves it with the slider, and
turns the elements that name a layer (`data-layer`) from trained to frozen. Texts are escaped here.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from axolotl_layersel.plan import Plan
from axolotl_layersel.report.wording import BAND_95, TALLEST, UNITS, per_cut, shares

WIDTH, HEIGHT = 360, 216  # user units, about a pixel on a phone
LEFT, RIGHT, TOP, BOTTOM = 46, 354, 8, 168


@dataclass(frozen=True)
class Frame:
    """The data ranges of one chart."""

    first: float
    last: float
    low: float
    high: float

    def x(self, value: float) -> float:
        """Horizontal place of a value."""
        return round(LEFT + (value - self.first) / (self.last - self.first) * (RIGHT - LEFT), 2)

    def y(self, value: float) -> float:
        """Vertical place of a value; one outside of the range lies on the edge."""
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return round(BOTTOM - share * (BOTTOM - TOP), 2)


def figure(title: str, *, legend: Sequence[tuple[str, str]], chart: str) -> str:
    """A chart with its title and the meaning of its colours: pairs of class name and text."""
    keys = "".join(f'<li class="{name}">{html.escape(text)}</li>' for name, text in legend)
    return (
        f'<figure><figcaption><h3>{html.escape(title)}</h3><ul class="legend">{keys}</ul></figcaption>{chart}</figure>'
    )


def charts(plan: Plan) -> list[str]:
    """The figures that the plan has numbers for; one layer leaves no cut to choose."""
    several = plan.num_layers > 1
    made = [
        deviation_chart(plan),
        gain_chart(plan),
        chosen_chart(plan) if several else "",
        trade_chart(plan) if several else "",
    ]
    return [chart for chart in made if chart]


def deviation_chart(plan: Plan) -> str:
    """Deviation over latent states, with its 95 % band."""
    if plan.scores is None:
        return ""
    mean, stderr = plan.scores.deviation, plan.scores.deviation_stderr
    low = [m - BAND_95 * s for m, s in zip(mean, stderr, strict=True)]
    high = [m + BAND_95 * s for m, s in zip(mean, stderr, strict=True)]
    frame = _frame(0, plan.num_layers, [*low, *high], margin=0.02 * plan.num_layers)
    states = range(plan.num_layers + 1)
    band = [*zip(states, high, strict=True), *zip(reversed(states), reversed(low), strict=True)]
    marks = [f'<path class="band" d="{_path(frame, band)}Z"/>', _line(frame, mean, "kept")]
    if plan.num_layers <= 40:
        marks += [f'<circle class="kept" cx="{frame.x(s)}" cy="{frame.y(m)}" r="2.6"/>' for s, m in enumerate(mean)]
    chart = _svg(
        plan,
        frame,
        marks,
        cut_offset=0.0,
        x_label="latent state (0: embeddings)",
        about=f"Deviation falls from {mean[0]:.2f} at state 0 to {mean[-1]:.2f} at state {plan.num_layers}."
        if mean[-1] < mean[0]
        else f"Deviation is {mean[0]:.2f} at state 0 and {mean[-1]:.2f} at state {plan.num_layers}.",
    )
    unit = UNITS.get(str(plan.options.get("deviation")), "deviation")
    return figure("Deviation from the label", legend=[("kept", unit), ("band", "95 % band")], chart=chart)


def gain_chart(plan: Plan) -> str:
    """Gain of every layer; a bar that hides all others is cut off and labelled."""
    if plan.scores is None:
        return ""
    gain_L = plan.scores.gain
    ordered = sorted(gain_L)
    clipped = plan.num_layers > 2 and ordered[-1] > TALLEST * ordered[-2] > 0
    top = 1.6 * ordered[-2] if clipped else ordered[-1]
    frame = _frame(0, plan.num_layers - 1, [0.0, top], margin=0.6 if plan.num_layers > 1 else 2.0, exact=True)
    marks = [
        _bar(frame, i, gain, f"layer {_state(plan, i)}", width=0.8, more=f' data-layer="{i}"')
        for i, gain in enumerate(gain_L)
    ]
    tallest = gain_L.index(ordered[-1])
    if clipped:
        right = tallest > plan.num_layers / 2
        at = round(frame.x(tallest - 0.4) - 6 if right else frame.x(tallest + 0.4) + 6, 2)
        marks.append(
            f'<text class="value" x="{at}" y="{TOP + 13}" text-anchor="{"end" if right else "start"}">'
            f"layer {tallest}: {ordered[-1]:.2f}</text>"
            f'<path class="break" d="M{frame.x(tallest - 0.5)} {TOP + 18}L{frame.x(tallest + 0.5)} {TOP + 14}"/>'
        )
    about = f"Largest gain: {ordered[-1]:.2f}, layer {tallest}."
    chart = _svg(plan, frame, marks, cut_offset=-0.5, x_label="decoder layer", about=about)
    return figure("Gain of training a layer", legend=[("trained", "trained"), ("frozen", "frozen")], chart=chart)


def chosen_chart(plan: Plan) -> str:
    """The cuts that single rows and bootstrap resamples would choose."""
    if plan.scores is None:
        return ""
    rows, resamples = shares(plan.scores.row_cuts), shares(plan.scores.stability)
    frame = _frame(0, plan.num_layers - 1, [0.0, *rows.values(), *resamples.values()], margin=0.6)
    marks = [_bar(frame, cut, share, "rows", width=0.84) for cut, share in rows.items()]
    for cut, share in resamples.items():
        x, y = frame.x(cut), frame.y(share)
        marks.append(
            f'<path class="resamples" d="M{x} {BOTTOM}L{x} {y}"/><circle class="resamples" cx="{x}" cy="{y}" r="4"/>'
        )
    about = f"{resamples.get(plan.first_trainable, 0.0):.2f} of the resamples choose layer {plan.first_trainable}."
    chart = _svg(plan, frame, marks, cut_offset=-0.5, x_label="first trainable layer", about=about)
    legend = [("resamples", "resamples")] * bool(resamples) + [("rows", "single rows")] * bool(rows)
    return figure("Cut that the rows would choose", legend=legend, chart=chart)


def trade_chart(plan: Plan) -> str:
    """What every cut keeps and costs."""
    curves = (
        ("kept", "improvement", plan.scores.retention if plan.scores else None),
        ("step", "FLOPs", per_cut(plan, "step")),
        ("memory", "activation memory", per_cut(plan, "saved_activation_bytes")),
    )
    known = [(name, label, values) for name, label, values in curves if values is not None]
    if not known:
        return ""
    top = max(max(values) for _, _, values in known)
    frame = _frame(0, plan.num_layers - 1, [0.0, top], margin=0.6)
    marks = [_line(frame, values, name) for name, _, values in known]
    for name, _, values in known:
        heights = [frame.y(value) for value in values]
        marks.append(
            f'<circle class="point {name}" data-y="{" ".join(map(str, heights))}" cx="{frame.x(plan.first_trainable)}" '
            f'cy="{heights[plan.first_trainable]}" r="4.5"/>'
        )
    about = f"At layer {plan.first_trainable}: " + ", ".join(
        f"{label} {values[plan.first_trainable]:.2f}" for _, label, values in known
    )
    chart = _svg(plan, frame, marks, cut_offset=0.0, x_label="first trainable layer", about=f"{about}.")
    title = "What every cut keeps and costs" if plan.scores else "What every cut costs"
    return figure(title, legend=[(name, label) for name, label, _ in known], chart=chart)


def strip(plan: Plan) -> str:
    """All decoder layers in a row, the input side on the left: the scale of the slider."""
    width = 100 / plan.num_layers
    gap = min(0.6, width * 0.15)
    cells = "".join(
        f'<rect class="layer {_state(plan, i)}" data-layer="{i}" x="{i * width + gap / 2:.3f}" y="0" '
        f'width="{width - gap:.3f}" height="10"/>'
        for i in range(plan.num_layers)
    )
    return f'<svg class="strip" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">{cells}</svg>'


def bar(value: float, *, of: float, name: str) -> str:
    """A small horizontal bar for a table's cell, from zero."""
    width = 100 * min(max(value / of, 0.0), 1.0) if of > 0 else 0.0
    return (
        '<svg class="cell" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="{name}" x="0" y="0" width="{width:.2f}" height="10"/></svg>'
    )


def _state(plan: Plan, layer: int) -> str:
    return "trained" if layer >= plan.first_trainable else "frozen"


def _frame(first: float, last: float, values: Iterable[float], *, margin: float, exact: bool = False) -> Frame:
    """Ranges that hold all values; with room above unless `exact`, never empty."""
    values = list(values)
    low, high = min(values), max(values)
    room = (high - low or 1.0) * 0.06
    low, high = (low if low == 0.0 else low - room), (high if exact and high > low else high + room)
    return Frame(first=first - margin, last=last + margin, low=low, high=high)


def _ticks(low: float, high: float, *, most: int, whole: bool = False) -> list[float]:
    """At most `most` + 1 round numbers in a range."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * (1 - 1e-9))
    step = max(1.0, step) if whole else step
    return [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _path(frame: Frame, points: Iterable[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{frame.x(x)} {frame.y(y)}" for x, y in points)


def _line(frame: Frame, values: Sequence[float], name: str) -> str:
    return f'<path class="line {name}" d="{_path(frame, enumerate(values))}"/>'


def _bar(frame: Frame, place: int, value: float, name: str, *, width: float, more: str = "") -> str:
    left, right, top = frame.x(place - width / 2), frame.x(place + width / 2), frame.y(value)
    box = f'x="{left}" y="{top}" width="{right - left:.2f}" height="{BOTTOM - top:.2f}"'
    return f'<rect class="{name}"{more} {box}/>'


def _svg(plan: Plan, frame: Frame, marks: Iterable[str], *, cut_offset: float, x_label: str, about: str) -> str:
    """Axes, the movable cut, and the marks."""
    grid = []
    heights = _ticks(frame.low, frame.high, most=6)
    decimals = max(0, -math.floor(math.log10(heights[1] - heights[0]) + 1e-9))
    for value in heights:
        y = frame.y(value)
        grid.append(f'<path class="grid" d="M{LEFT} {y}L{RIGHT} {y}"/>')
        grid.append(f'<text x="{LEFT - 6}" y="{y + 4:.2f}" text-anchor="end">{value:.{decimals}f}</text>')
    for value in _ticks(max(frame.first, 0), frame.last, most=8, whole=True):
        grid.append(f'<text x="{frame.x(value)}" y="{BOTTOM + 17}" text-anchor="middle">{value:.0f}</text>')
    zero, step = frame.x(cut_offset), frame.x(1) - frame.x(0)
    at = frame.x(plan.first_trainable + cut_offset)
    hidden = "" if plan.first_trainable else " hidden"
    cut = (
        f'<g class="cut{hidden}" data-zero="{zero}" data-step="{step:.4f}">'
        f'<rect class="ground" x="{LEFT}" y="{TOP}" width="{max(at - LEFT, 0):.2f}" height="{BOTTOM - TOP}"/>'
        f'<line class="edge" x1="{at}" x2="{at}" y1="{TOP}" y2="{BOTTOM}"/></g>'
    )
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(about)}">'
        f'{"".join(grid)}{cut}{"".join(marks)}<path class="axis" d="M{LEFT} {BOTTOM}L{RIGHT} {BOTTOM}"/>'
        f'<text class="name" x="{(LEFT + RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">'
        f"{html.escape(x_label)}</text></svg>"
    )
