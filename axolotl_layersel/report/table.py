"""What a person reads about a plan in a log: the table, and the sentences under it.

The sentences and numbers come from `wording.py`. The bars of the table turn to `#` on a terminal that has only ASCII.
"""

from __future__ import annotations

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

from axolotl_layersel.plan import Plan
from axolotl_layersel.report.wording import notes, per_cut, subject, summary

EIGHTHS = " ▏▎▍▌▋▊▉█"


def table(plan: Plan) -> RenderableType:
    """The plan as a rich renderable: a row for each decoder layer, some lines, notes. Readable at 80 columns."""
    lines = Table.grid(padding=(0, 2))
    lines.add_column(style="bold", no_wrap=True)
    lines.add_column()
    for name, text in summary(plan).items():
        lines.add_row(name, Text(text))
    for note in notes(plan):
        lines.add_row("note", Text(note, style="yellow"))
    return Group(Text(subject(plan), style="bold", overflow="ellipsis", no_wrap=True), "", _layers(plan), "", lines)


def _layers(plan: Plan) -> Table:
    layers = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    layers.add_column("layer", justify="right", no_wrap=True)
    columns = _columns(plan)
    if not columns:  # nothing differs from layer to layer
        layers.add_column("")
        if plan.first_trainable:
            layers.add_row(_range(0, plan.first_trainable - 1), "frozen", style="dim")
        layers.add_row(_range(plan.first_trainable, plan.num_layers - 1), "trained", style="bold")
        return layers
    for name, cells in columns.items():
        layers.add_column(name, justify="left" if isinstance(cells[0], Bar) else "right", no_wrap=True)
    layers.add_column("", no_wrap=True)
    for i in range(plan.num_layers):
        trained = i >= plan.first_trainable
        if i == plan.first_trainable and i:
            layers.add_section()
        row = [cells[i] for cells in columns.values()]
        layers.add_row(str(i), *row, "trained" if trained else "frozen", style="" if trained else "dim")
    return layers


def _columns(plan: Plan) -> dict[str, list[Bar | str]]:
    """What is known of each layer, or of training from it on: head of the column -> a cell for each layer."""
    columns: dict[str, list[Bar | str]] = {}
    whole_run = per_cut(plan, "whole_run")
    if plan.scores:
        width = 14 if whole_run is None else 6
        deviation, descent, low = plan.scores.deviation[1:], plan.scores.descent, plan.scores.retention_low
        columns["deviation"] = [Bar(value, of=max(deviation), width=width) for value in deviation]
        columns["descent"] = [Bar(value, of=max(descent), width=width) for value in descent]
        columns["kept" if low else "kept from here"] = [f"{value:.3f}" for value in plan.scores.retention]
        if low:
            columns["at least"] = [f"{value:.3f}" for value in low]
    if whole_run:  # with the prefix cache, when training begins at this layer
        columns["whole run"] = [f"{value:.2f}" for value in whole_run]
    return columns


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first} - {last}"


class Bar:
    """A number and its bar, in eighths of a cell, or of `#` where the terminal has only ASCII.

    Args:
        value: the number.
        of: the value of a full bar; the bar starts at zero.
        width: cells of a full bar.
    """

    def __init__(self, value: float, *, of: float, width: int = 14) -> None:
        self.text = f"{value:.3f}".rjust(len(f"{of:.3f}")) + " "
        self.share = min(max(value / of, 0.0), 1.0) if of > 0 else 0.0
        self.width = width

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if options.ascii_only:
            bar = "#" * round(self.share * self.width)
        else:
            whole, eighths = divmod(round(self.share * self.width * 8), 8)
            bar = "█" * whole + EIGHTHS[eighths].strip()
        yield Segment(self.text)
        yield Segment(bar.ljust(self.width), Style(color="cyan"))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(len(self.text) + self.width, len(self.text) + self.width)


def print_plan(plan: Plan, *, console: Console | None = None) -> None:
    """Print the table; without colour where the console is not a terminal."""
    (console or Console()).print(table(plan))
