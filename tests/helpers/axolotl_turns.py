"""Several axolotl runs in one process, one after the other: importing axolotl takes longer than training.

`train_in_turn` starts the process; `main` is what it does. Each run is `axolotl train` from the config file on, and a
plugin that is listed after the one under test looks at what was trained, with the model still in memory.
"""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any, ClassVar

from axolotl.integrations.base import BasePlugin
from axolotl_runs import environment

WITNESS = "axolotl_turns.Witness"


def train_in_turn(folder: Path, configs: list[Path], *, timeout: float = 600, **env: str) -> dict[str, dict[str, Any]]:
    """Train the configs in this order, in one new process.

    Args:
        folder: of the log.
        configs: files as `axolotl_runs.write_config` makes them, no two with the same folder name.
        env: environment variables on top of `axolotl_runs.environment`.

    Returns:
        For each folder name: `error`, a traceback or "", `log`, and what `Witness` saw, if it was listed.
    """
    log = folder / "log.txt"
    code = "import sys, axolotl_turns; axolotl_turns.main(sys.argv[1:])"
    with log.open("wb") as file:
        subprocess.run(  # not as a script: axolotl saves data from a spawned process, which would import it again
            [sys.executable, "-c", code, *map(str, configs)],
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment(**{"AXOLOTL_DATASET_NUM_PROC": "0", **env}),  # data sets are saved in this process
            cwd=folder,
            timeout=timeout,
            check=False,
        )
    parts = re.split(r"^==== (.+) ====$", log.read_text(encoding="utf-8", errors="replace"), flags=re.MULTILINE)
    logs = dict(zip(parts[1::2], parts[2::2], strict=True))
    results = {}
    for config in configs:
        name = config.parent.name
        written = config.parent / "result.json"
        assert written.exists(), logs.get(name, parts[0])[-6000:]
        results[name] = {**json.loads(written.read_text(encoding="utf-8")), "log": logs[name]}
    return results


def main(configs: list[str]) -> None:
    """Train each; an error is a result."""
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.cli.train import do_train

    for path in map(Path, configs):
        print(f"\n==== {path.parent.name} ====", flush=True)
        gc.freeze()  # axolotl collects garbage in every step, a second each among all that is imported
        result: dict[str, Any] = {"error": ""}
        try:
            do_train(load_cfg(str(path)), TrainerCliArgs())
        except (Exception, SystemExit) as error:
            result = {"error": traceback.format_exc(), "said": str(error)}
        (path.parent / "result.json").write_text(json.dumps({**result, **Witness.seen}), encoding="utf-8")
        Witness.seen = {}
        sys.stdout.flush()


class Witness(BasePlugin):
    """An axolotl plugin for tests: which weights differ from those on the disk when training is over."""

    seen: ClassVar[dict[str, Any]] = {}
    trainer: ClassVar[Any] = None

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """The trainer, with its reference model, is complete."""
        Witness.trainer = trainer
        return []

    def post_train(self, cfg: Any, model: Any) -> None:
        """`layers` that hold an adapter or a changed weight, `changed` base weights, and so on for the reference."""
        from safetensors.torch import load_file

        base = load_file(Path(cfg.base_model) / "model.safetensors")
        parameters = list(model.named_parameters())
        adapters = [name for name, p in parameters if "lora_B" in name and p.abs().sum() > 0]
        changed = _changed(parameters, base)
        reference = getattr(Witness.trainer, "ref_model", None)
        Witness.seen = {
            "adapters": adapters,
            "changed": changed,
            "layers": sorted({int(n) for name in adapters + changed for n in re.findall(r"layers\.(\d+)\.", name)}),
            "steps": Witness.trainer.state.global_step,
            "losses": [entry["loss"] for entry in Witness.trainer.state.log_history if "loss" in entry],
            "trainer": type(Witness.trainer).__name__,
            "reference": None if reference is None else _changed(list(reference.named_parameters()), base),
        }


def _changed(parameters: list[Any], base: dict[str, Any]) -> list[str]:
    """Names of base weights that differ from those on the disk; those in 4 bits, which nothing trains, do not count."""
    saved = {}
    for name, parameter in parameters:
        name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if name in base:
            saved[name] = parameter
    assert len(saved) >= len(base) - 1, "names differ, so nothing is compared"  # a tied head has one name on the disk
    whole = {n: p for n, p in saved.items() if not hasattr(p, "quant_state")}
    return [n for n, p in whole.items() if not base[n].equal(p.detach().to(base[n].dtype))]
