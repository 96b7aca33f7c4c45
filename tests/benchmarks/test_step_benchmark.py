"""The step benchmark runs whole on a model of its own, and counts what was predicted. Times are not judged."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from axolotl_runs import environment
from transformers import LlamaConfig

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "step.py"


def test_arms_are_compared_and_kept_bytes_are_those_predicted(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2
    )
    config.save_pretrained(tmp_path)
    results = tmp_path / "step.json"
    finished = subprocess.run(
        [
            *(sys.executable, str(SCRIPT), "--model", str(tmp_path / "config.json"), "--json", str(results)),
            *("--modes", "lora", "--checkpointing", "off", "--cuts", "0.5", "--rounds", "2"),
            *("--sequence", "16", "--batch", "1"),
        ],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    rows: dict[str, dict[str, Any]] = {r["arm"]: r for r in json.loads(results.read_text(encoding="utf-8"))["rows"]}
    assert {"all", "stock", "ours"} <= set(rows)
    ours, stock = rows["ours"], rows["stock"]
    assert ours["first_trainable"] == 2 and ours["saved_bytes"] < stock["saved_bytes"]
    assert ours["saved_bytes"] == pytest.approx(ours["predicted_saved_bytes"], rel=0.01)
    assert ours["theory"] < stock["theory"] <= 1
    assert "ours" in finished.stdout and "passes/theory" in finished.stdout


def test_one_round_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    step = importlib.import_module("step")
    with pytest.raises(SystemExit):
        step.parse(["--rounds", "1"])
    assert "--rounds is 1; allowed is 2 or more" in capsys.readouterr().err
