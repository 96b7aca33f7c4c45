"""The selection benchmark runs whole on a small random model. Times are not judged."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from axolotl_runs import environment

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "selection.py"


def test_scoring_and_pilot_are_compared_with_the_run() -> None:
    words = "--rounds 1 --steps 1 --rows 40 --sequence 32 --share 0.1 --batch 4"
    finished = subprocess.run(
        [sys.executable, str(SCRIPT), *words.split()], env=environment(), capture_output=True, text=True, timeout=400
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    table = {
        line.split("|")[1].strip(): line.split("|")[2].strip() for line in finished.stdout.splitlines() if "|" in line
    }
    assert 0 < float(table["pilot / run, planned"]) <= 0.1
    assert float(table["selection / run"]) > float(table["forward pass alone / run"]) > 0
    assert int(table["steps of the pilot"]) >= 8
