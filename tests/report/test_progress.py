"""How far scoring is: a bar on a terminal, lines in a log."""

from __future__ import annotations

import io
import logging
import re
import sys
import time

import pytest

from axolotl_layersel.report import progress as module
from axolotl_layersel.report.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_one_line_with_rows_speed_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress(8) as advance:
        advance(2, 1000)
        time.sleep(0.2)
        advance(8, 4000)
    shown = stream.getvalue()
    assert re.search(r"scoring layers: 100%.*8/8 \[00:0\d<00:00, .*tokens/s", shown)
    assert shown.count("\n") == 1 and shown.count("\r") >= 2


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.3)
    caplog.set_level(logging.INFO)
    with progress(100) as advance:
        for done in range(1, 101):
            time.sleep(0.01)
            advance(done, done * 200)
    lines = [record.message for record in caplog.records]
    assert 3 <= len(lines) <= 12, lines
    assert lines[0].startswith("layersel: scoring layers: 0/100 rows")
    middle = r"layersel: scoring layers: (\d+)/100 rows, \d\d:\d\d passed, \d\d:\d\d left, [\d,]+ tokens/s"
    done = [int(match[1]) for line in lines[1:] if (match := re.fullmatch(middle, line))]
    assert len(done) == len(lines) - 1 and done == sorted(set(done)) and done[-1] == 100


def test_other_processes_are_silent(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress(4, enabled=False) as advance:
        advance(4, 10)
    assert not caplog.records and not stream.getvalue()


def test_a_failed_scoring_is_not_called_done(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with pytest.raises(ZeroDivisionError), progress(4) as advance:
        advance(1, 10)
        raise ZeroDivisionError
    assert "4/4" not in caplog.text
