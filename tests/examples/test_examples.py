"""Every example config: found, valid in axolotl's schema as on a GPU, and trained for two steps on a tiny stand-in."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from axolotl_runs import environment, plan_of, train
from example_stand_ins import NUM_LAYERS, RERUN, STAND_INS, examples, sharded_example, trained_layers

pytestmark = pytest.mark.slow

HEADER = ("Prerequisite:", "Command:", "Time:", "Output:")


def test_there_are_twelve_examples_and_each_has_a_stand_in() -> None:
    assert sorted(path.stem for path in examples()) == sorted(STAND_INS)
    assert len(STAND_INS) == 12


@pytest.mark.parametrize("path", examples(), ids=lambda p: p.stem)
def test_an_example_opens_with_what_a_reader_needs(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    header = text.split("\n\n", 1)[0]
    assert all(line.startswith("#") and len(line) <= 120 for line in header.splitlines())
    assert all(f"# {label}" in header for label in HEADER), header
    assert f"example_configs/{path.name}" in header
    named = re.findall(r"example_configs/\S+\.yml", header)
    assert set(named) == {f"example_configs/{path.name}"}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """How each example ended: `valid` and `trained` are "" or a traceback; `layers` are those that were trained."""
    folder = tmp_path_factory.mktemp("examples")
    log = folder / "log.txt"
    with log.open("wb") as file:
        subprocess.run(
            # not as a script: axolotl saves data from a spawned process, which imports its parent's script again
            [sys.executable, "-c", "import sys, example_stand_ins; example_stand_ins.main(sys.argv[1])", str(folder)],
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment(),
            cwd=folder,
            timeout=900,
            check=False,
        )
    written = folder / "results.json"
    assert written.exists(), log.read_text(encoding="utf-8", errors="replace")[-6000:]
    values: dict[str, Any] = json.loads(written.read_text(encoding="utf-8"))
    return values


@pytest.mark.parametrize("name", sorted(STAND_INS))
def test_an_example_is_valid_in_axolotl_s_schema(name: str, results: dict[str, Any]) -> None:
    assert results[name]["valid"] == ""


@pytest.mark.parametrize("name", sorted(STAND_INS))
def test_a_stand_in_trains_two_steps_of_exactly_the_plan_s_layers(name: str, results: dict[str, Any]) -> None:
    assert results[name]["trained"] == ""
    plan = results[name]["plan"]
    assert plan["num_layers"] == NUM_LAYERS
    beside = [-1] if name == "llama-3.1-8b-full-zero3" else []  # full fine-tuning trains norm and an untied head too
    assert results[name]["layers"] == beside + plan["trainable_layers"]
    assert results[name]["steps"] == 2
    scored = plan["scores"] is not None
    assert scored == (name != "mistral-7b-dpo-lora")


@pytest.mark.parametrize("name", RERUN)
@pytest.mark.parametrize("kind", ["recipe", "plain"])
def test_a_run_from_the_recipe_trains_the_same_layers(name: str, kind: str, results: dict[str, Any]) -> None:
    """`recipe` is the file that the first run wrote; `plain` is run by stock axolotl."""
    assert results[name][kind] == results[name]["plan"]["trainable_layers"]


def test_the_budget_of_a_quarter_trains_one_layer_of_four(results: dict[str, Any]) -> None:
    assert results["llama-3.2-3b-qlora-budget"]["layers"] == [3]


@pytest.mark.parametrize("name", ["llama-3.1-8b-lora-fsdp2", "llama-3.1-70b-qlora-fsdp2"])
def test_an_fsdp2_example_scores_and_trains_on_two_processes(name: str, tmp_path: Path) -> None:
    """The ZeRO-3 example is trained in `test_deepspeed.py`."""
    run = train(sharded_example(name, tmp_path), launcher="torchrun", processes=2).check()
    plan = plan_of(tmp_path / "out")
    assert plan["scores"] is not None
    assert trained_layers(tmp_path, tmp_path / "model", "lora") == plan["trainable_layers"]
    assert run.log.count(f"proved in the first step: the backward pass stops at layer {plan['first_trainable']}") == 2
    assert "test: trained False: " in run.log  # it was sharded
    assert len(run.losses) == 2
