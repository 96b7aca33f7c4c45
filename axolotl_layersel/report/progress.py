"""How far scoring is: a tqdm bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from axolotl_layersel.log import LOG

SECONDS_BETWEEN_LINES = 15.0
LINE = "{desc}: {n_fmt}/{total_fmt} rows, {elapsed} passed, {remaining} left{postfix}"


class _LogLines(io.StringIO):
    """Takes the bar where there is no terminal: every update becomes a line of the log."""

    last = ""

    def write(self, text: str) -> int:
        """Log what would have been drawn; tqdm also writes bare line ends, and its last state twice."""
        line = text.strip()
        if line and line != self.last:
            LOG.info("layersel: %s", line)
            self.last = line
        return len(text)


@contextmanager
def progress(rows: int, *, enabled: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Show how far scoring is. The block gets a function to call with the rows and tokens done so far.

    Args:
        rows: rows that this process scores.
        enabled: False on every process but the first, which then shows nothing.
    """
    terminal = sys.stderr.isatty()
    with tqdm(
        total=rows,
        desc="scoring layers",
        disable=not enabled,
        file=None if terminal else _LogLines(),
        mininterval=0.1 if terminal else SECONDS_BETWEEN_LINES,
        miniters=1,  # else tqdm's own monitor repeats lines
        dynamic_ncols=terminal,
        bar_format=None if terminal else LINE,
    ) as bar:

        def advance(rows: int, tokens: int) -> None:
            seconds = bar.format_dict["elapsed"]
            bar.set_postfix_str(f"{tokens / max(seconds, 1e-9):,.0f} tokens/s", refresh=False)
            bar.update(rows - bar.n)

        yield advance
