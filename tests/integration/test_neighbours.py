"""What the plugin leaves alone: axolotl without it, and axolotl's other commands with it."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from axolotl_runs import UNINTERRUPTED, Finished, start, write_config

pytestmark = pytest.mark.slow

RUN_MODULE = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_module('axolotl.cli.train', run_name='__main__')"
WITH_ALIAS = f"import axolotl_layersel._startup; {RUN_MODULE}"
# Without `site`, no .pth file is executed: neither the alias nor an editable install of this package exists.
WITHOUT_ALIAS = f"import sys; assert not any('Alias' in type(f).__name__ for f in sys.meta_path); {RUN_MODULE}"


def _trained(folder: Path, python: list[str], config: Path, env: dict[str, str]) -> tuple[Finished, Path]:
    """A run into `folder/out`, which is then moved away, so that the next one has the same paths."""
    env = {**env, "PYTHONHASHSEED": "0"}  # the order of a set of target modules, in adapter_config.json
    run = start([*python, "axolotl", str(config)], folder / "log", env=env).finish().check()
    kept = folder / f"out of {len(list(folder.iterdir()))}"
    (folder / "out").rename(kept)
    return run, kept


def _left_behind(output: Path) -> dict[str, Any]:
    """Everything that a run wrote, by name, without what a clock or a counter put there."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in output.rglob("*") if p.is_file()):
        name = str(path.relative_to(output))
        if path.name == "debug.log":
            dump = re.search(r"config:\n(\{.*?\n\})", path.read_text(encoding="utf-8"), re.DOTALL)
            assert dump is not None, "axolotl no longer logs its config"
            found[name] = dump.group(1)
        elif path.name == "trainer_state.json":
            entries = json.loads(path.read_text(encoding="utf-8"))["log_history"]
            timed = re.compile(r"runtime|per_sec|memory")
            found[name] = [{k: v for k, v in entry.items() if not timed.search(k)} for entry in entries]
        elif path.suffix in (".safetensors", ".json") or path.name == "README.md":
            found[name] = path.read_bytes()
    return found


def test_stock_axolotl_does_not_notice_that_the_package_is_installed(
    tmp_path: Path, run_inputs: dict[str, Path]
) -> None:
    """Two runs without the plugin, with the start-up alias and without: equal to the last bit, config dump included."""
    options = {**UNINTERRUPTED, "plugins": ["axolotl_test_plugins.FixedSeed"], "layersel": None, "max_steps": 2}
    config = write_config(tmp_path, **run_inputs, **options)
    site_packages = sysconfig.get_paths()["purelib"]
    tests = str(Path(__file__).parents[1] / "helpers")
    repository = str(Path(__file__).parents[2])
    _, one = _trained(
        tmp_path, [sys.executable, "-c", WITH_ALIAS], config, {"PYTHONPATH": f"{tests}{os.pathsep}{repository}"}
    )
    _, other = _trained(
        tmp_path,
        [sys.executable, "-S", "-c", WITHOUT_ALIAS],
        config,
        {"PYTHONPATH": f"{tests}{os.pathsep}{site_packages}"},
    )
    with_alias, without_alias = _left_behind(one), _left_behind(other)
    assert with_alias == without_alias
    assert '"base_model"' in with_alias["debug.log"]
    assert len([e for e in with_alias["checkpoint-2/trainer_state.json"] if "loss" in e]) == 2
    assert "adapter_model.safetensors" in with_alias


OTHER_COMMANDS = """
if __name__ == "__main__":  # workers that tokenise import this file
    import io, os, sys
    from axolotl.cli import evaluate, inference, merge_lora, preprocess
    config, commands = sys.argv[1], sys.argv[2:]
    sys.argv = sys.argv[:1]
    for command in commands:
        print("BEGIN", command, flush=True)
        sys.stdin = io.StringIO("Add 1 and 2.")
        modules = {"preprocess": preprocess, "evaluate": evaluate, "merge_lora": merge_lora, "inference": inference}
        modules[command].do_cli(config)
        os.environ.pop("AXOLOTL_IS_PREPROCESS", None)
    print("END", flush=True)
"""


def test_other_commands_work_and_do_not_score(tmp_path: Path, run_inputs: dict[str, Path], uninterrupted: Path) -> None:
    """Preprocessing, evaluation, inference and merging with the config of a trained run; its plan stays as it is."""
    shutil.copytree(uninterrupted, tmp_path / "out")
    plan = (tmp_path / "out" / "layersel" / "plan.json").read_bytes()
    config = write_config(
        tmp_path, **run_inputs, **{**UNINTERRUPTED, "val_set_size": 8, "lora_model_dir": str(tmp_path / "out")}
    )
    commands = ["preprocess", "evaluate", "inference", "merge_lora"]
    script = tmp_path / "commands.py"
    script.write_text(OTHER_COMMANDS)
    run = start([sys.executable, str(script), str(config), *commands], tmp_path / "log").finish(timeout=400).check()
    assert "layersel: scoring" not in run.log
    assert re.findall(r"^BEGIN (\w+)", run.log, re.MULTILINE) == commands
    assert "Eval set evaluation completed!" in run.log
    assert (tmp_path / "out" / "merged" / "model.safetensors").exists()
    assert (tmp_path / "out" / "layersel" / "plan.json").read_bytes() == plan
