"""The four charts of a plan, each drawn by one function on matplotlib axes; the figure and the page share them.

They show the deviation of every latent state with its 95 % band, each layer's share of its fall, the cuts that single
rows and resamples would choose, and what every cut keeps and costs. Frozen layers lie on grey ground. Colours are
those of Okabe and Ito, told apart by all common kinds of colour vision; pairs also differ in lightness or line style.
What the page moves or recolours with its slider carries an id (`gid`): `edge-N` and `ground-N` are the cut of panel N,
`layer-i` is the bar of layer i, `point-NAME` lies on the curve of that name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from axolotl_layersel.plan import Plan
from axolotl_layersel.report.wording import BAND_95, TALLEST, UNITS, per_cut, shares

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {  # name, also in `page.css` -> colour on white paper
    "trained": "#0072b2",
    "cut": "#d55e00",
    "step": "#e69f00",
    "memory": "#009e73",
    "rows": "#9ccbec",
    "resamples": "#003b66",
    "frozen": "#a6a6a6",
    "ground": "#f0f0f0",
    "ink": "#262626",
    "soft": "#5c5c5c",
    "axis": "#808080",
    "rule": "#dddddd",
    "page": "#ffffff",
}
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 11.5,
    "axes.titlesize": 13.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": COLOURS["axis"],
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.facecolor": "none",
    "grid.color": COLOURS["rule"],
    "grid.linewidth": 0.8,
    "text.color": COLOURS["ink"],
    "axes.labelcolor": COLOURS["ink"],
    "xtick.color": COLOURS["ink"],
    "ytick.color": COLOURS["ink"],
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "legend.frameon": False,
    "legend.fontsize": 10.3,
}
CURVES = {  # what every cut keeps and costs -> label, colour, line style
    "retention": ("improvement", "trained", "-"),
    "step": ("FLOPs", "step", (0, (4, 1.5))),
    "saved_activation_bytes": ("activation memory", "memory", (0, (1, 1))),
}
Panel = Callable[["Axes", Plan], str]  # draws, and says in a sentence what is to be seen


def panels(plan: Plan) -> list[Panel]:
    """The panels that the plan has numbers for; one layer leaves no cut to choose."""
    several = plan.num_layers > 1
    known: dict[Panel, bool] = {
        _deviation: plan.scores is not None,
        _descent: plan.scores is not None,
        _chosen: several and plan.scores is not None,
        _trade: several and (plan.scores is not None or plan.prediction is not None),
    }
    return [panel for panel, drawn in known.items() if drawn]


def _ground(axes: Axes, plan: Plan, *, first: float, cut: float, last: float) -> None:
    """Bounds, whole numbers below, the frozen side on grey ground, the cut."""
    from matplotlib.ticker import FixedLocator, MaxNLocator

    axes.set_xlim(first, last)
    few = last < 10
    axes.xaxis.set_major_locator(FixedLocator(range(int(last) + 1)) if few else MaxNLocator(nbins=8, integer=True))
    number = axes.get_subplotspec().num1  # type: ignore[union-attr]  # every panel is a subplot
    alpha = None if plan.first_trainable else 0.0  # drawn all the same: the page's slider can show it
    ground = axes.axvspan(first, cut, color=COLOURS["ground"], zorder=0, linewidth=0, alpha=alpha)
    ground.set_gid(f"ground-{number}")
    axes.axvline(cut, color=COLOURS["cut"], linewidth=2.2, zorder=1.5, alpha=alpha, gid=f"edge-{number}")


def _deviation(axes: Axes, plan: Plan) -> str:
    assert plan.scores is not None
    mean, stderr = plan.scores.deviation, plan.scores.deviation_stderr
    states = range(plan.num_layers + 1)
    k, last = plan.first_trainable, plan.num_layers
    _ground(axes, plan, first=-0.02 * last, cut=k, last=1.02 * last)
    low = [m - BAND_95 * s for m, s in zip(mean, stderr, strict=True)]
    high = [m + BAND_95 * s for m, s in zip(mean, stderr, strict=True)]
    axes.fill_between(states, low, high, color=COLOURS["trained"], alpha=0.22, linewidth=0)
    marker = "o" if plan.num_layers <= 40 else ""
    axes.plot(states, mean, color=COLOURS["trained"], linewidth=2.4, marker=marker, markersize=4.5)
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom - 0.12 * (top - bottom), top)  # room for the words
    axes.set_title("Deviation from the label")
    axes.set_xlabel("latent state (0: embeddings; band: 95 %)")
    axes.set_ylabel(UNITS.get(str(plan.options.get("deviation")), ""))
    _name_sides(axes, plan)
    return f"Deviation is {mean[0]:.2f} at state 0 and {mean[-1]:.2f} at state {last}."


def _name_sides(axes: Axes, plan: Plan) -> None:
    """Say which side of the cut is which, where there is room for the word."""
    across = axes.get_xaxis_transform()
    share = plan.first_trainable / plan.num_layers
    words = ((share > 0.17, 0.0, "frozen", "soft"), (share < 0.83, plan.first_trainable, "trained", "trained"))
    for room, at, word, colour in words:
        if room:
            x = at + 0.02 * plan.num_layers
            axes.text(
                x, 0.03, word, transform=across, color=COLOURS[colour], va="bottom", weight="bold", gid=f"side-{word}"
            )


def _descent(axes: Axes, plan: Plan) -> str:
    assert plan.scores is not None
    k, count, descent = plan.first_trainable, plan.num_layers, plan.scores.descent
    colours = [COLOURS["frozen" if i < k else "trained"] for i in range(count)]
    bars = axes.bar(range(count), descent, color=colours, width=0.8 if count > 1 else 0.2, zorder=2)
    for i, bar in enumerate(bars):
        bar.set_gid(f"layer-{i}")
    _ground(axes, plan, first=-0.6, cut=k - 0.5, last=count - 0.4)
    ordered = sorted(descent)
    tallest = descent.index(ordered[-1])
    if count > 2 and ordered[-1] > TALLEST * ordered[-2] > 0:  # the last layer often hides all others
        _break_bar(axes, tallest, ordered[-1], top=1.7 * ordered[-2], right=tallest > count / 2)
    axes.set_title("Share of the descent")
    axes.set_xlabel("decoder layer")
    return f"Largest share: {ordered[-1]:.2f}, layer {tallest}."


def _break_bar(axes: Axes, layer: int, share: float, *, top: float, right: bool) -> None:
    """Cut a bar off at `top`, mark it as broken, and write its number on the side where there is room."""
    axes.set_ylim(0, top)
    axes.annotate(
        f"layer {layer}: {share:.2f}",
        xy=(layer - 0.4 if right else layer + 0.4, top),
        xytext=(-6 if right else 6, -5),
        textcoords="offset points",
        ha="right" if right else "left",
        va="top",
        weight="bold",
        bbox={"boxstyle": "square,pad=0.15", "facecolor": COLOURS["page"], "edgecolor": "none"},
        zorder=6,
    )
    for at in (0.86, 0.90):
        line = [at * top, (at + 0.03) * top]
        axes.plot([layer - 0.6, layer + 0.6], line, color=COLOURS["page"], linewidth=2, zorder=5)


def _chosen(axes: Axes, plan: Plan) -> str:
    k, count = plan.first_trainable, plan.num_layers
    assert plan.scores is not None
    rows, resamples = shares(plan.scores.row_cuts), shares(plan.scores.stability)
    _ground(axes, plan, first=-0.6, cut=k - 0.5, last=count - 0.4)
    if rows:
        axes.bar(list(rows), list(rows.values()), width=0.84, color=COLOURS["rows"], label="single rows", zorder=2)
    if resamples:
        cuts, heights, colour = list(resamples), list(resamples.values()), COLOURS["resamples"]
        axes.vlines(cuts, 0, heights, color=colour, linewidth=2.2, zorder=3)
        axes.plot(cuts, heights, "o", color=colour, label="resamples", zorder=3)
    axes.set_title("Cut that the rows would choose", pad=26)
    axes.set_xlabel("first trainable layer")
    axes.set_ylabel("share")
    _legend(axes)
    return f"{resamples.get(k, 0.0):.2f} of the resamples and {rows.get(k, 0.0):.2f} of the rows choose layer {k}."


def _trade(axes: Axes, plan: Plan) -> str:
    k, cuts = plan.first_trainable, range(plan.num_layers)
    _ground(axes, plan, first=-0.6, cut=k, last=plan.num_layers - 0.4)
    for name, (label, colour, dashes) in CURVES.items():
        if (values := per_cut(plan, name)) is not None:
            style = {"color": COLOURS[colour], "linewidth": 2.6, "zorder": 3}
            axes.plot(cuts, values, label=label, linestyle=dashes, **style)  # type: ignore[arg-type]
            axes.plot(
                [k], [values[k]], "o", color=COLOURS[colour], markersize=9, markeredgecolor=COLOURS["page"], zorder=5,
                gid=f"point-{name}",
            )  # fmt: skip
    meant = []
    if plan.scores and plan.scores.retention_low and plan.scores.retention_high:
        meant.append("band: 90 %")
        low, high = plan.scores.retention_low, plan.scores.retention_high
        axes.fill_between(cuts, low, high, color=COLOURS["trained"], alpha=0.22, linewidth=0, zorder=1)
    if plan.scores and plan.scores.pilot:
        meant.append("pilot: 95 %")
        points = plan.scores.pilot.cuts[1:]
        axes.errorbar(
            [point.first_trainable for point in points], [point.retention for point in points],
            yerr=[BAND_95 * point.retention_stderr for point in points], fmt="D", capsize=4,
            color=COLOURS["trained"], markerfacecolor=COLOURS["page"], zorder=4, gid="pilot",
        )  # fmt: skip
    axes.set_ylim(0, 1.05)
    title = "What every cut keeps and costs" if plan.scores else "What every cut costs"
    axes.set_title(title, pad=26)
    axes.set_xlabel("first trainable layer" + (f" ({', '.join(meant)})" if meant else ""))
    axes.set_ylabel("of training all layers")
    _legend(axes)
    return f"{title}, as ratios to training all layers."


def _legend(axes: Axes) -> None:
    """Between title and axes, where no curve can run under it."""
    legend = axes.legend(
        loc="lower left", bbox_to_anchor=(-0.01, 0.97), ncols=3, borderpad=0.2, handlelength=1.4, columnspacing=0.9
    )
    legend.set_in_layout(False)  # else the longest legend sets the width of the axes
