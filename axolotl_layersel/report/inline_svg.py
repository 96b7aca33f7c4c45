"""matplotlib's panels as inline SVG for the page, under the page's strict policy.

The policy allows no style in an attribute and nothing from outside, so styles become attributes of their own (`fill`,
`stroke`, ...), which the page's style sheet may override for a dark screen. Text stays text, in the page's own font.
Ids that only matplotlib reads go; those of `panels.py` become classes, and `data-frame` says where a cut and a value
lie, so that `page.js` can move them.
"""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import numpy as np

from axolotl_layersel.plan import Plan
from axolotl_layersel.report.panels import COLOURS, STYLE, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = (5.0, 3.1)  # inches; 72 units each
DROPPED = ("font-family", "clip-rule", "fill-rule")  # the page's own, and what no panel needs
HREF = "{http://www.w3.org/1999/xlink}href"


def inline_charts(plan: Plan) -> list[str]:
    """The panels that the plan has numbers for, an `<svg>` each; equal plans give equal text."""
    if not (drawn := panels(plan)):
        return []
    import matplotlib.style
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    charts = []
    for place, panel in enumerate(drawn):
        salt = {"svg.fonttype": "none", "svg.hashsalt": f"panel {place}"}  # no id occurs in two panels
        with matplotlib.style.context(["default", STYLE, salt]):
            figure = Figure(figsize=SIZE, dpi=72, layout="constrained", facecolor="none")
            FigureCanvasSVG(figure)
            axes = figure.add_subplot()
            about = panel(axes, plan)
            file = io.StringIO()
            figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
            charts.append(_inline(file.getvalue(), plan, about=about, frame=_frame(axes, plan)))
    return charts


def style_sheet() -> str:
    """The colours of light paper as variables, and rules that make the charts follow them on a dark screen."""
    colours = "".join(f" --{name}: {colour};" for name, colour in COLOURS.items())
    return f":root {{{colours} }}\n" + "".join(
        f'.chart [{kind}="{colour}"] {{ {kind}: var(--{name}); }}\n'
        for name, colour in COLOURS.items()
        for kind in ("fill", "stroke")
    )


def _frame(axes: Axes, plan: Plan) -> dict[str, float]:
    """Where things lie, in the units of the SVG: the sides of the axes, cut 0, a layer's width, value 0, value 1."""
    height = SIZE[1] * 72
    box = axes.get_window_extent()
    edge = next(line for line in axes.lines if str(line.get_gid()).startswith("edge"))
    offset = float(np.asarray(edge.get_xdata())[0]) - plan.first_trainable
    (x0, y0), (x1, y1) = axes.transData.transform([(offset, 0.0), (offset + 1, 1.0)]).tolist()
    places = {"left": box.x0, "top": height - box.y1, "bottom": height - box.y0}
    places |= {"zero": x0, "step": x1 - x0, "base": height - y0, "unit": y1 - y0}
    return {name: round(float(value), 6) for name, value in places.items()}


def _inline(text: str, plan: Plan, *, about: str, frame: dict[str, float]) -> str:
    root = ElementTree.fromstring(text)
    for parent in root.iter():
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")) or child.get("id", "").startswith("side-"):
                parent.remove(child)  # the words beside the cut do not move with it
    for element in root.iter():
        element.tag = element.tag.split("}")[-1]
        _plain(element, plan)
    for marker in root.iterfind(".//defs/path"):  # takes the colours of each `use`: no rule reaches into one
        marker.attrib = {name: value for name, value in marker.attrib.items() if name not in ("fill", "stroke")}
    root.attrib = {
        "class": "chart",
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-label": about,
        "data-frame": json.dumps(frame),
    }
    return ElementTree.tostring(root, encoding="unicode")


def _plain(element: ElementTree.Element, plan: Plan) -> None:
    """Styles as attributes, local references without namespace, classes for the ids that the page moves."""
    for style in filter(None, element.attrib.pop("style", "").split(";")):
        name, value = (part.strip() for part in style.split(":"))
        if name not in DROPPED:
            element.set(name, value)
    if HREF in element.attrib:
        element.set("href", element.attrib.pop(HREF))
    if element.get("transform", "").startswith("rotate(-0 "):
        del element.attrib["transform"]
    if element.tag != "g" or "id" not in element.attrib:
        return
    kind, _, of = element.attrib.pop("id").partition("-")
    if kind in ("edge", "ground"):
        element.set("class", kind if plan.first_trainable else f"{kind} hidden")
    elif kind == "layer":
        element.attrib |= {"class": "trained" if int(of) >= plan.first_trainable else "frozen", "data-layer": of}
    elif kind == "point":
        element.attrib |= {"class": kind, "data-curve": of}
