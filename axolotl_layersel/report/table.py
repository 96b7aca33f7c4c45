"""What a person reads about a plan in a log: the progress bar, the table, the sentences under it.

The sentences and numbers come from `wording.py`. The bars of the table turn to `#` on a terminal that has only ASCII.
"""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

from axolotl_layersel.plan import Plan
from axolotl_layersel.report.wording import dataset_name, mode_name, model_name, notes, summary

LOG = logging.getLogger("axolotl.integrations.layersel")

EIGHTHS = " ▏▎▍▌▋▊▉█"


def table(plan: Plan) -> RenderableType:
    """The plan as a rich renderable: a row for each decoder layer, four lines, notes. Readable at 80 columns."""
    lines = Table.grid(padding=(0, 2))
    lines.add_column(style="bold", no_wrap=True)
    lines.add_column()
    for name, text in summary(plan).items():
        lines.add_row(name, Text(text))
    for note in notes(plan):
        lines.add_row("note", Text(note, style="yellow"))
    subject = ", ".join(part for part in (model_name(plan), mode_name(plan), dataset_name(plan)) if part)
    return Group(Text(subject, style="bold", overflow="ellipsis", no_wrap=True), "", _layers(plan), "", lines)


def _layers(plan: Plan) -> Table:
    layers = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    layers.add_column("layer", justify="right", no_wrap=True)
    if plan.scores is None:  # nothing differs from layer to layer
        layers.add_column("")
        if plan.first_trainable:
            layers.add_row(_range(0, plan.first_trainable - 1), "frozen", style="dim")
        layers.add_row(_range(plan.first_trainable, plan.num_layers - 1), "trained", style="bold")
        return layers
    layers.add_column("deviation", no_wrap=True)
    layers.add_column("gain", no_wrap=True)
    layers.add_column("kept from here", justify="right", no_wrap=True)
    layers.add_column("", no_wrap=True)
    deviation, gain = plan.scores.deviation[1:], plan.scores.gain
    for i in range(plan.num_layers):
        trained = i >= plan.first_trainable
        if i == plan.first_trainable and i:
            layers.add_section()
        layers.add_row(
            str(i),
            Bar(deviation[i], of=max(deviation)),
            Bar(gain[i], of=max(gain)),
            f"{plan.scores.retention[i]:.3f}",
            "trained" if trained else "frozen",
            style="" if trained else "dim",
        )
    return layers


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


def plan_text(plan: Plan, *, width: int = 80, ascii_only: bool = False) -> str:
    """The table as plain text, without escape sequences and without blanks at line ends.

    Args:
        width: columns.
        ascii_only: for a stream that cannot encode anything else.
    """
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii" if ascii_only else "utf-8", errors="replace", newline="\n")
    Console(file=stream, width=width, no_color=True, force_terminal=False, legacy_windows=False).print(table(plan))
    stream.seek(0)
    return "".join(f"{line.rstrip()}\n" for line in stream.read().splitlines())


class Progress:
    """Show how far scoring is: a bar on a terminal, a line now and then in a log file.

    Use as `with Progress(rows) as advance:` and pass `advance` to `pipeline.score_layers`, which calls it with the
    rows and tokens done so far.

    Args:
        rows: rows that this process scores.
        enabled: False on every process but the first, which then shows nothing.
        console: where the bar is drawn; by default the terminal's standard error.
        interval: seconds between two lines of a log file.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        rows: int,
        *,
        enabled: bool = True,
        console: Console | None = None,
        interval: float = 15.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.rows = rows
        self.enabled = enabled
        self.console = console or Console(stderr=True)
        self.interval = interval
        self.clock = clock
        self._open = ExitStack()

    def __enter__(self) -> Callable[[int, int], None]:
        self._started = self._told = self.clock()
        self._done = (0, 0)
        if not self.enabled:
            return lambda rows, tokens: None
        if not self.console.is_terminal:
            LOG.info("layersel: scoring %d rows", self.rows)
            return self._log
        bar = RichProgress(
            SpinnerColumn(),
            TextColumn("scoring layers"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:.0f}/{task.total:.0f} rows  {task.fields[rate]} tokens/s"),
            TimeRemainingColumn(),
            console=self.console,
            expand=True,
        )
        self._open.enter_context(bar)
        task = bar.add_task("", total=self.rows, rate="-")

        def advance(rows: int, tokens: int) -> None:
            self._done = (rows, tokens)
            bar.update(task, completed=rows, rate=f"{self._rate():,.0f}")

        return advance

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()
        if self.enabled and kind is None:
            rows, tokens = self._done
            seconds = self.clock() - self._started
            LOG.info("layersel: scored %d rows, %s tokens, in %.1f s", rows, f"{tokens:,}", seconds)

    def _log(self, rows: int, tokens: int) -> None:
        self._done = (rows, tokens)
        now = self.clock()
        if now - self._told < self.interval or rows >= self.rows:
            return
        self._told = now
        left = (now - self._started) * (self.rows - rows) / max(rows, 1)
        LOG.info("layersel: %d/%d rows, %s tokens/s, %.0f s left", rows, self.rows, f"{self._rate():,.0f}", left)

    def _rate(self) -> float:
        return self._done[1] / max(self.clock() - self._started, 1e-9)
