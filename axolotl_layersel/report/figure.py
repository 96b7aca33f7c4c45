"""Pictures of a plan: why these layers, and what they save. `deviation.png` for people, `deviation.svg` for print.

Four panels, as far as the plan has their numbers: the deviation of every latent state with its 95 % band, the gain of
every layer, the cuts that single rows and resamples would choose, and what every cut keeps and costs. Frozen layers
lie on grey ground. Colours are those of Okabe and Ito, told apart by all common kinds of colour vision; every pair
also differs in lightness or line style. Equal plans give equal bytes. Drawn without pyplot, so that nothing of the
user's own matplotlib (backend, settings, open figures) changes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from axolotl_layersel.plan import Plan
from axolotl_layersel.report.wording import (
    BAND_95,
    TALLEST,
    UNITS,
    dataset_name,
    layer_range,
    mode_name,
    model_name,
    per_cut,
    shares,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRAINED, CUT, STEP, MEMORY = "#0072B2", "#D55E00", "#E69F00", "#009E73"  # of Okabe and Ito
ROWS, RESAMPLES = "#9CCBEC", "#003B66"  # the same blue, lighter and darker
FROZEN, GROUND, INK, SOFT_INK = "#A6A6A6", "#F0F0F0", "#262626", "#5C5C5C"
HEAD = 1.15  # inches above the panels
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 11.5,
    "axes.titlesize": 13.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#808080",
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.8,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "legend.frameon": False,
    "legend.fontsize": 10.3,
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
    panels = _panels(plan)
    if not panels:
        return []
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    rows, columns = (len(panels) + 1) // 2, min(len(panels), 2)
    height = HEAD + 3.1 * rows
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.style.context(["default", STYLE]):
        layout = ConstrainedLayoutEngine(rect=(0.005, 0.005, 0.99, 0.99 - HEAD / height), wspace=0.06, hspace=0.08)
        figure = Figure(figsize=(5.0 * columns, height), layout=layout)
        FigureCanvasAgg(figure)
        for text, down, size, weight, colour in _head(plan, wide=columns == 2):
            at = 1 - down / height
            figure.text(0.012, at, text, size=size, weight=weight, color=colour, va="top", parse_math=False)
        for place, panel in enumerate(panels):
            panel(figure.add_subplot(rows, columns, place + 1), plan)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".figures.") as half:
            png, svg = Path(half) / "deviation.png", Path(half) / "deviation.svg"
            figure.savefig(png, dpi=160, metadata={"Software": None})
            figure.savefig(svg, metadata={"Date": None, "Creator": None})
            return [made.replace(folder / made.name) for made in (png, svg)]


def _panels(plan: Plan) -> list[Callable[[Axes, Plan], None]]:
    """The panels that the plan has numbers for; one layer leaves no cut to choose."""
    several = plan.num_layers > 1
    known = {
        _deviation: plan.scores is not None,
        _gain: plan.scores is not None,
        _chosen: several and plan.scores is not None,
        _trade: several and (plan.scores is not None or plan.prediction is not None),
    }
    return [panel for panel, drawn in known.items() if drawn]


def _head(plan: Plan, *, wide: bool) -> list[tuple[str, float, float, str, str]]:
    """The lines above the panels: text, inches from the top, size, weight, colour."""
    k, count = plan.first_trainable, plan.num_layers
    chosen = f"Train {layer_range(k, count - 1)} ({count - k} of {count})"
    subject = ", ".join(part for part in (model_name(plan), mode_name(plan), dataset_name(plan)) if part)
    known = (
        f"{plan.scores.retention[k]:.2f} of the improvement" if plan.scores else "",
        f"{plan.prediction.step:.2f} of the FLOPs of a step" if plan.prediction else "",
    )
    predicted = ", at ".join(part for part in known if part)
    if predicted:
        predicted = f"Predicted{', of training all layers' if wide else ''}: {predicted}"
    return [
        (chosen, 0.13, 21 if wide else 16, "bold", INK),
        (_shortened(subject, 95 if wide else 52), 0.53 if wide else 0.48, 12.5 if wide else 11, "normal", INK),
        (predicted, 0.79 if wide else 0.72, 12.5 if wide else 11, "normal", SOFT_INK),
    ]


def _shortened(text: str, length: int) -> str:
    """The text with its middle left out where it is longer."""
    half = (length - 3) // 2
    return text if len(text) <= length else f"{text[:half]}...{text[-half:]}"


def _ground(axes: Axes, plan: Plan, *, first: float, cut: float, last: float) -> None:
    """Bounds, whole numbers below, the frozen side on grey ground, the cut."""
    from matplotlib.ticker import FixedLocator, MaxNLocator

    axes.set_xlim(first, last)
    few = last < 10
    axes.xaxis.set_major_locator(FixedLocator(range(int(last) + 1)) if few else MaxNLocator(nbins=8, integer=True))
    if plan.first_trainable:
        axes.axvspan(first, cut, color=GROUND, zorder=0, linewidth=0)
        axes.axvline(cut, color=CUT, linewidth=2.2, zorder=1.5)


def _deviation(axes: Axes, plan: Plan) -> None:
    assert plan.scores is not None
    mean, stderr = plan.scores.deviation, plan.scores.deviation_stderr
    states = range(plan.num_layers + 1)
    k, last = plan.first_trainable, plan.num_layers
    _ground(axes, plan, first=-0.02 * last, cut=k, last=1.02 * last)
    low = [m - BAND_95 * s for m, s in zip(mean, stderr, strict=True)]
    high = [m + BAND_95 * s for m, s in zip(mean, stderr, strict=True)]
    axes.fill_between(states, low, high, color=TRAINED, alpha=0.22, linewidth=0)
    marker = "o" if plan.num_layers <= 40 else ""
    axes.plot(states, mean, color=TRAINED, linewidth=2.4, marker=marker, markersize=4.5)
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom - 0.12 * (top - bottom), top)  # room for the words
    axes.set_title("Deviation from the label")
    axes.set_xlabel("latent state (0: embeddings; band: 95 %)")
    axes.set_ylabel(UNITS.get(str(plan.options.get("deviation")), ""))
    _name_sides(axes, plan)


def _name_sides(axes: Axes, plan: Plan) -> None:
    """Say which side of the cut is which, where there is room for the word."""
    across = axes.get_xaxis_transform()
    share = plan.first_trainable / plan.num_layers
    words = ((share > 0.17, 0.0, "frozen", "#6B6B6B"), (share < 0.83, plan.first_trainable, "trained", TRAINED))
    for room, at, word, colour in words:
        if room:
            shift = 0.02 * plan.num_layers
            axes.text(at + shift, 0.03, word, transform=across, color=colour, va="bottom", weight="bold")


def _gain(axes: Axes, plan: Plan) -> None:
    assert plan.scores is not None
    k, count, gain = plan.first_trainable, plan.num_layers, plan.scores.gain
    colours = [FROZEN if i < k else TRAINED for i in range(count)]
    axes.bar(range(count), gain, color=colours, width=0.8 if count > 1 else 0.2, zorder=2)
    _ground(axes, plan, first=-0.6, cut=k - 0.5, last=count - 0.4)
    ordered = sorted(gain)
    if count > 2 and ordered[-1] > TALLEST * ordered[-2] > 0:  # the last layer often hides all others
        tallest, top = gain.index(ordered[-1]), 1.7 * ordered[-2]
        axes.set_ylim(0, top)
        right = tallest > count / 2
        edge = tallest - 0.4 if right else tallest + 0.4
        axes.annotate(
            f"layer {tallest}: {ordered[-1]:.2f}",
            xy=(edge, top),
            xytext=(-6 if right else 6, -5),
            textcoords="offset points",
            ha="right" if right else "left",
            va="top",
            weight="bold",
            color=colours[tallest],
            bbox={"boxstyle": "square,pad=0.15", "facecolor": "white", "edgecolor": "none"},
            zorder=6,
        )
        for at in (0.86, 0.90):
            axes.plot(
                [tallest - 0.6, tallest + 0.6], [at * top, (at + 0.03) * top], color="white", linewidth=2, zorder=5
            )
    axes.set_title("Gain of training a layer")
    axes.set_xlabel("decoder layer")


def _chosen(axes: Axes, plan: Plan) -> None:
    k, count = plan.first_trainable, plan.num_layers
    assert plan.scores is not None
    rows, resamples = shares(plan.scores.row_cuts), shares(plan.scores.stability)
    _ground(axes, plan, first=-0.6, cut=k - 0.5, last=count - 0.4)
    if rows:
        axes.bar(list(rows), list(rows.values()), width=0.84, color=ROWS, label="single rows", zorder=2)
    if resamples:
        axes.vlines(list(resamples), 0, list(resamples.values()), color=RESAMPLES, linewidth=2.2, zorder=3)
        axes.plot(list(resamples), list(resamples.values()), "o", color=RESAMPLES, label="resamples", zorder=3)
    axes.set_title("Cut that the rows would choose", pad=26)
    axes.set_xlabel("first trainable layer")
    axes.set_ylabel("share")
    _legend(axes)


def _trade(axes: Axes, plan: Plan) -> None:
    k, cuts = plan.first_trainable, range(plan.num_layers)
    _ground(axes, plan, first=-0.6, cut=k, last=plan.num_layers - 0.4)
    curves = (
        (plan.scores.retention if plan.scores else None, "improvement", TRAINED, "-"),
        (per_cut(plan, "step"), "FLOPs", STEP, (0, (4, 1.5))),
        (per_cut(plan, "saved_activation_bytes"), "activation memory", MEMORY, (0, (1, 1))),
    )
    for values, label, colour, dashes in curves:
        if values is not None:
            axes.plot(cuts, values, color=colour, linestyle=dashes, linewidth=2.6, label=label, zorder=3)
            axes.plot([k], [values[k]], "o", color=colour, markersize=9, markeredgecolor="white", zorder=5)
    axes.set_ylim(0, 1.05)
    axes.set_title("What every cut keeps and costs" if plan.scores else "What every cut costs", pad=26)
    axes.set_xlabel("first trainable layer")
    axes.set_ylabel("of training all layers")
    _legend(axes)


def _legend(axes: Axes) -> None:
    """Between title and axes, where no curve can run under it."""
    legend = axes.legend(
        loc="lower left", bbox_to_anchor=(-0.01, 0.97), ncols=3, borderpad=0.2, handlelength=1.4, columnspacing=0.9
    )
    legend.set_in_layout(False)  # else the longest legend sets the width of the axes
