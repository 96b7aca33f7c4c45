"""What a whole run costs with and without the prefix cache: runs through axolotl's command line, filling included.

For LoRA with and without gradient checkpointing, on the shapes of `step.py`, each arm is a run of its own of some
epochs over the same pre-tokenised rows:

- `all`: every layer is trained, by stock axolotl; all ratios are to this arm.
- `cut`: layers k..L-1, the backward pass stops at the cut, no cache.
- `filling`: the same with an empty cache on the disk, `filled`: once more, on the cache that the run before left.

Time is the process's CPU time from the callback that opens training, before anything is filled, to the one that closes
it; starting Python and loading the model are left out, as they are the same for all. Runs go round `--rounds` times,
and a ratio is the median over rounds of (arm / `all` of the same round). `later` is the median epoch after the first,
to that of `all`; `suffix` is `later` to the work of the layers above the cut alone, taken from a run of a model that
has no other layers.

    python benchmarks/whole_run.py
    python benchmarks/whole_run.py --cuts 0.5 --epochs 3 --rounds 3 --json whole_run.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from axolotl.integrations.base import BasePlugin
from step_arm import PRESETS, read_config
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback

HERE = Path(__file__).parent
CLOCK_FILE = "clock.json"


class Clock(BasePlugin):
    """An axolotl plugin, listed first: the process's CPU time when training opens, after each epoch, at the end."""

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """Its own callbacks come before those of plugins that are listed later."""
        return [_Clock(Path(cfg.output_dir) / CLOCK_FILE)]


class _Clock(TrainerCallback):
    def __init__(self, path: Path) -> None:
        self.path = path
        self.times: dict[str, Any] = {"epochs": []}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.times["open"], self.times["wall"] = time.process_time(), time.time()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.times["epochs"].append(time.process_time())

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        end = time.process_time()
        marks = [*self.times["epochs"], end]
        self.times = {
            "training": end - self.times["open"],
            "before_first_epoch": marks[0] - self.times["open"],
            "epochs": [b - a for a, b in itertools.pairwise(marks)],
            "seconds": time.time() - self.times["wall"],
        }
        self.path.write_text(json.dumps(self.times), encoding="utf-8")


@dataclass(frozen=True)
class Row:
    """One line of the table; ratios to `all`, medians over rounds."""

    checkpointing: bool
    arm: str
    trained: str  # decoder layers
    cpu_seconds: float  # median
    whole_run: float
    spread: float  # largest minus smallest ratio
    later_epochs: float
    of_suffix: float | None  # later epochs, to the same layers as a model of their own
    filling_seconds: float


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write it where asked to."""
    options = parse(argv)
    folder = Path(tempfile.mkdtemp(prefix="layersel-run-"))
    try:
        rows = measure(folder, options)
    finally:
        shutil.rmtree(folder)
    print(table(rows))
    if options.json:
        text = json.dumps({"options": vars(options), "rows": [asdict(row) for row in rows]}, indent=2)
        Path(options.json).write_text(text + "\n", encoding="utf-8")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", default="small", help=f"{', '.join(PRESETS)}, or the path of a config.json")
    parser.add_argument("--cuts", default="0.5,0.75", help="frozen shares of the decoder layers")
    parser.add_argument("--checkpointing", default="off,on", help="off,on")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--examples", type=int, default=32, help="rows of the training set")
    parser.add_argument("--sequence", type=int, default=256, help="tokens of a row")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", default="", help="also write every number to this file")
    options = parser.parse_args(argv)
    if options.epochs < 2:
        parser.error(f"--epochs is {options.epochs}; allowed is 2 or more, because a first epoch cannot save anything")
    return options


def measure(folder: Path, options: argparse.Namespace) -> list[Row]:
    """All arms, round by round."""
    layers = read_config(options.model).num_hidden_layers
    cuts = [round(float(share) * layers) for share in options.cuts.split(",")]
    write_inputs(folder, options, layers=[layers, *(layers - cut for cut in cuts)])
    rows: list[Row] = []
    for checkpointing in (word == "on" for word in options.checkpointing.split(",")):
        arms = [("all", 0), *((arm, cut) for cut in cuts for arm in ("suffix", "cut", "filling", "filled"))]
        clocks: dict[tuple[str, int], list[dict[str, Any]]] = {arm: [] for arm in arms}
        for _ in range(options.rounds):
            shutil.rmtree(folder / "cache", ignore_errors=True)
            for name, cut in arms:
                clocks[name, cut].append(run(folder, options, name, cut, layers=layers, checkpointing=checkpointing))
                print(f"# checkpointing {checkpointing}, {name}, cut {cut}: {clocks[name, cut][-1]}", flush=True)
        rows += [_row(clocks, name, cut, layers, checkpointing) for name, cut in arms if name != "suffix"]
    return rows


def _row(clocks: Any, name: str, cut: int, layers: int, checkpointing: bool) -> Row:
    base, own = clocks["all", 0], clocks[name, cut]

    def later(taken: dict[str, Any]) -> float:
        return statistics.median(taken["epochs"][1:])

    ratios = [one["training"] / other["training"] for one, other in zip(own, base, strict=True)]
    alone = clocks.get(("suffix", cut))
    return Row(
        checkpointing=checkpointing,
        arm=name,
        trained=f"{cut}-{layers - 1}",
        cpu_seconds=statistics.median(taken["training"] for taken in own),
        whole_run=statistics.median(ratios),
        spread=max(ratios) - min(ratios),
        later_epochs=statistics.median(later(a) / later(b) for a, b in zip(own, base, strict=True)),
        of_suffix=statistics.median(later(a) / later(b) for a, b in zip(own, alone, strict=True)) if alone else None,
        filling_seconds=statistics.median(taken["before_first_epoch"] for taken in own),
    )


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = ["| checkpointing | arm | trained | CPU s | whole run | spread | later epochs | of suffix | filling, s |"]
    lines.append("|---" * 9 + "|")
    for row in rows:
        suffix = "" if row.of_suffix is None else f"{row.of_suffix:.3f}"
        lines.append(
            f"| {'on' if row.checkpointing else 'off'} | {row.arm} | {row.trained} | {row.cpu_seconds:.1f} | "
            f"{row.whole_run:.3f} | {row.spread:.3f} | {row.later_epochs:.3f} | {suffix} | {row.filling_seconds:.2f} |"
        )
    return "\n".join(lines)


def write_inputs(folder: Path, options: argparse.Namespace, *, layers: Sequence[int]) -> None:
    """Random models of so many layers, a tokenizer that axolotl can load, and rows of random tokens."""
    from tokenizers import Tokenizer, models

    config = read_config(options.model)
    vocabulary = {f"<{i}>": i for i in range(config.vocab_size)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<0>")),
        **{"bos_token": "<1>", "eos_token": "<2>", "pad_token": "<0>", "unk_token": "<0>"},
    )
    for count in set(layers):
        config.num_hidden_layers, config.pad_token_id = count, 0
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / f"model{count}")
        tokenizer.save_pretrained(folder / f"model{count}")
    draw = np.random.default_rng(0)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(options.examples):
            ids = draw.integers(3, config.vocab_size, options.sequence).tolist()
            file.write(json.dumps({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids}) + "\n")


def run(
    folder: Path, options: argparse.Namespace, arm: str, cut: int, *, layers: int, checkpointing: bool
) -> dict[str, Any]:
    """Train once; CPU seconds."""
    ours = arm in ("cut", "filling", "filled")
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    config: dict[str, Any] = {
        "base_model": str(folder / f"model{layers - cut if arm == 'suffix' else layers}"),
        "plugins": ["whole_run.Clock", *(["layersel"] if ours else [])],
        "datasets": [{"path": str(folder / "rows.jsonl"), "ds_type": "json", "type": None}],
        **{"dataset_prepared_path": str(folder / "prepared"), "output_dir": str(out), "dataset_num_proc": 1},
        **{"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True},
        **{"lora_mlp_kernel": False, "lora_qkv_kernel": False, "lora_o_kernel": False},
        **{"sequence_len": options.sequence, "micro_batch_size": 2, "gradient_accumulation_steps": 1},
        **{"num_epochs": options.epochs, "save_strategy": "no", "learning_rate": 1e-4, "optimizer": "adamw_torch"},
        **{"lr_scheduler": "constant", "logging_steps": 1000, "use_cpu": True, "bf16": False, "seed": 42},
        "gradient_checkpointing": checkpointing,
    }
    if checkpointing:
        config["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    if ours:
        cache = "off" if arm == "cut" else "disk"
        config["layersel"] = {"first_layer": cut, "report": False, "prefix_cache": cache}
        config["layersel"]["prefix_cache_dir"] = str(folder / "cache")
    path = folder / "config.yml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    paths = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        **{"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"},
        **{"HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""},
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    log = folder / "log.txt"
    with log.open("w") as file:
        command = [sys.executable, "-m", "axolotl.cli.train", str(path)]
        finished = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False)
    if finished.returncode or not (out / CLOCK_FILE).exists():
        raise SystemExit(f"{arm}, cut {cut}, exit status {finished.returncode}:\n{log.read_text()[-4000:]}")
    return dict(json.loads((out / CLOCK_FILE).read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
