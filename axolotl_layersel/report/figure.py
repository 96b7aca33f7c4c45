"""Pictures of a plan: why these layers, and what they save. `deviation.png` for people, `deviation.svg` for print.

Equal plans give equal bytes. Drawn without pyplot, so that nothing of the user's own matplotlib (backend, settings,
open figures) changes. The panels are in `panels.py`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from axolotl_layersel.plan import Plan
from axolotl_layersel.report.panels import COLOURS, STYLE, panels
from axolotl_layersel.report.wording import layer_range, subject

HEAD = 1.15  # inches above the panels
FILES = {  # neither names nor times in them, and text as curves: no font is needed to print them
    "savefig.facecolor": "white",
    "svg.fonttype": "path",
    "svg.hashsalt": "axolotl-layersel",  # else the names of clip paths are random
}


def draw(plan: Plan, folder: Path) -> list[Path]:
    """Write `deviation.png` and `deviation.svg`, each whole or not at all.

    Returns:
        The files written; none for a plan with neither scores nor a prediction, which has nothing to show.

    Raises:
        OSError: the folder cannot be written.
    """
    drawn = panels(plan)
    if not drawn:
        return []
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    rows, columns = (len(drawn) + 1) // 2, min(len(drawn), 2)
    height = HEAD + 3.1 * rows
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.style.context(["default", STYLE, FILES]):
        layout = ConstrainedLayoutEngine(rect=(0.005, 0.005, 0.99, 0.99 - HEAD / height), wspace=0.06, hspace=0.08)
        figure = Figure(figsize=(5.0 * columns, height), layout=layout)
        FigureCanvasAgg(figure)
        for text, down, size, weight, colour in _head(plan, wide=columns == 2):
            at = 1 - down / height
            figure.text(0.012, at, text, size=size, weight=weight, color=COLOURS[colour], va="top", parse_math=False)
        for place, panel in enumerate(drawn):
            panel(figure.add_subplot(rows, columns, place + 1), plan)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".figures.") as half:
            png, svg = Path(half) / "deviation.png", Path(half) / "deviation.svg"
            figure.savefig(png, dpi=160, metadata={"Software": None})
            figure.savefig(svg, metadata={"Date": None, "Creator": None})
            return [made.replace(folder / made.name) for made in (png, svg)]


def _head(plan: Plan, *, wide: bool) -> list[tuple[str, float, float, str, str]]:
    """The lines above the panels: text, inches from the top, size, weight, colour."""
    k, count = plan.first_trainable, plan.num_layers
    chosen = f"Train {layer_range(k, count - 1)} ({count - k} of {count})"
    known = (
        f"{plan.scores.retention[k]:.2f} of the improvement" if plan.scores else "",
        f"{plan.prediction.step:.2f} of the FLOPs of a step" if plan.prediction else "",
    )
    predicted = ", at ".join(part for part in known if part)
    if predicted:
        predicted = f"Predicted{', of training all layers' if wide else ''}: {predicted}"
    return [
        (chosen, 0.13, 21 if wide else 16, "bold", "ink"),
        (_shortened(subject(plan), 95 if wide else 52), 0.53 if wide else 0.48, 12.5 if wide else 11, "normal", "ink"),
        (predicted, 0.79 if wide else 0.72, 12.5 if wide else 11, "normal", "soft"),
    ]


def _shortened(text: str, length: int) -> str:
    """The text with its middle left out where it is longer."""
    half = (length - 3) // 2
    return text if len(text) <= length else f"{text[:half]}...{text[-half:]}"
