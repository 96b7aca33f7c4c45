"""What a whole run costs with and without the prefix cache: runs through axolotl's command line, filling included.

For LoRA with and without gradient checkpointing, on the shapes of `step.py`, each arm is a run of its own of some
epochs over the same pre-tokenised rows:

- `all`: every layer is trained, by stock axolotl; all ratios are to this arm.
- `suffix`: a random model that has layers k..L-1 alone, by stock axolotl; `stock`: adapters on layers k..L-1 of all.
- `cut`: layers k..L-1, the backward pass stops at the cut, no cache.
- `filling`: the same with an empty cache on the disk, `filled`: once more, on the cache that the run before left.

Time is the process's CPU time, or on a GPU the time on the clock with the device waited for, from the callback that
opens training, before anything is filled, to the one that closes it; starting Python and loading the model are left
out, as they are the same for all. Runs go round `--rounds` times, and a ratio is the median over rounds of (arm / `all`
of the same round). `later epochs` are the median epoch after the first, to that of `all`; `of suffix` compares them
with those of `suffix`. `reading` and `keys` are the shares of them that assembling states and finding samples take (on
a GPU: that the host takes). `peak GB` are torch's largest allocation on the GPU in the whole run and in later epochs.
Each run is a process of its own: forked from one that has imported axolotl, or, as a process that has seen a GPU cannot
be forked, started while the run before it trains.

    python benchmarks/whole_run.py
    python benchmarks/whole_run.py --cuts 0.5 --epochs 3 --rounds 3 --json whole_run.json
    python benchmarks/whole_run.py --model /path/to/a/model --cuts 0.5,0.8333 --arms stock,cut,filling,filled
    python benchmarks/whole_run.py --model llama-3.1-8b --device cuda --sequence 2048 --batch 1 --examples 12 \
        --checkpointing on --arms stock,cut,filling
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import pydoc_data.topics
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.config import load_cfg
from axolotl.cli.train import do_train
from axolotl.integrations.base import BasePlugin
from step_arm import PRESETS, random_model, read_config
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast, TrainerCallback

HERE = Path(__file__).parent
CLOCK_FILE = "clock.json"
ENVIRONMENT = {
    **{"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"},
    **{"HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "AXOLOTL_DATASET_NUM_PROC": "0"},
    "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])),
}
ARMS = ("suffix", "stock", "cut", "filling", "filled")
OURS = ("cut", "filling", "filled")


def now() -> float:
    """The process's CPU seconds, or seconds on the clock once the GPU has done its work."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def peak_bytes() -> int:
    """The largest allocation on the GPU since the last reset, 0 without one."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


class Clock(BasePlugin):
    """An axolotl plugin, listed first: the time when training opens, after each epoch, at the end."""

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """Its own callbacks come before those of plugins that are listed later."""
        return [_Clock(Path(cfg.output_dir) / CLOCK_FILE)]


class _Clock(TrainerCallback):
    def __init__(self, path: Path) -> None:
        self.path = path
        self.epochs: list[float] = []
        self.spent = {"reading": 0.0, "keys": 0.0}
        self.at_epochs: list[dict[str, float]] = []
        self.open = self.wall = 0.0
        self.peak = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        from axolotl_layersel.prefix_cache import cached_prefix

        cached_prefix.assemble = self._timed("reading", cached_prefix.assemble)
        cached_prefix.find_segments = self._timed("keys", cached_prefix.find_segments)
        self.open, self.wall = now(), time.time()

    def _timed(self, name: str, work: Callable[..., Any]) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.process_time()  # of the host: the device is not waited for
            try:
                return work(*args, **kwargs)
            finally:
                self.spent[name] += time.process_time() - started

        return timed

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.epochs.append(now())
        self.at_epochs.append(dict(self.spent))
        if len(self.epochs) == 2 and torch.cuda.is_available():
            self.peak = peak_bytes()
            torch.cuda.reset_peak_memory_stats()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        end = now()
        times = {
            "training": end - self.open,
            "before_first_epoch": self.epochs[0] - self.open,
            "epochs": [b - a for a, b in itertools.pairwise([*self.epochs, end])],
            "seconds": time.time() - self.wall,
            "peak": max(self.peak, peak_bytes()),
            "later_peak": peak_bytes(),
            **{name: self.spent[name] - self.at_epochs[1][name] for name in self.spent},  # in later epochs
        }
        self.path.write_text(json.dumps(times), encoding="utf-8")


@dataclass(frozen=True)
class Row:
    """One line of the table; ratios to `all`, medians over rounds."""

    checkpointing: bool
    arm: str
    trained: str  # decoder layers
    seconds: float  # median; CPU time, or on the clock of a GPU
    whole_run: float
    spread: float  # largest minus smallest ratio
    later_epochs: float
    of_suffix: float | None  # later epochs, to the same layers as a model of their own
    filling_seconds: float
    reading: float | None  # share of later epochs
    keys: float | None
    peak_gb: float
    later_peak_gb: float


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write it where asked to."""
    options = parse(argv)
    wanted = ENVIRONMENT if options.device == "cuda" else {**ENVIRONMENT, "CUDA_VISIBLE_DEVICES": ""}
    if any(os.environ.get(name) != value for name, value in wanted.items() if name != "PYTHONPATH"):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})  # threads count at start
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
    parser.add_argument("--model", default="small", help=f"{', '.join(PRESETS)}, a config.json, or a model's folder")
    parser.add_argument("--arms", default="suffix,cut,filling,filled", help=f"any of {', '.join(ARMS)}; all stays")
    parser.add_argument("--cuts", default="0.5,0.75", help="frozen shares of the decoder layers")
    parser.add_argument("--checkpointing", default="off,on", help="off,on")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="cuda: weights and autocast in bf16")
    parser.add_argument("--mode", default="lora", choices=("lora", "qlora"))
    parser.add_argument("--batch", type=int, default=2, help="rows of a micro batch")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--examples", type=int, default=32, help="rows of the training set")
    parser.add_argument("--sequence", type=int, default=256, help="tokens of a row")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", default="", help="also write every number to this file")
    options = parser.parse_args(argv)
    if options.epochs < 2:
        parser.error(f"--epochs is {options.epochs}; allowed is 2 or more, because a first epoch cannot save anything")
    if unknown := set(options.arms.split(",")) - set(ARMS):
        parser.error(f"--arms has {', '.join(sorted(unknown))}; allowed are {', '.join(ARMS)}")
    if is_real(options.model) and "suffix" in options.arms.split(","):
        parser.error("the arm suffix needs a random model; with a real one give --arms stock,cut,filling,filled")
    return options


def measure(folder: Path, options: argparse.Namespace) -> list[Row]:
    """All arms, round by round."""
    layers = read_config(options.model).num_hidden_layers
    cuts = [round(float(share) * layers) for share in options.cuts.split(",")]
    write_inputs(folder, options, layers=[layers, *(layers - cut for cut in cuts)])
    trainees = Trainees(options.device)
    rows: list[Row] = []
    for checkpointing in (word == "on" for word in options.checkpointing.split(",")):
        arms = [("all", 0), *((arm, cut) for cut in cuts for arm in options.arms.split(","))]
        clocks: dict[tuple[str, int], list[dict[str, Any]]] = {arm: [] for arm in arms}
        for _ in range(options.rounds):
            shutil.rmtree(folder / "cache", ignore_errors=True)
            for name, cut in arms:
                found = run(trainees, folder, options, name, cut, layers=layers, checkpointing=checkpointing)
                clocks[name, cut].append(found)
                print(f"# checkpointing {checkpointing}, {name}, cut {cut}: {found}", flush=True)
        rows += [_row(clocks, name, cut, layers, checkpointing) for name, cut in arms if name != "suffix"]
    trainees.close()
    return rows


def _row(clocks: Any, name: str, cut: int, layers: int, checkpointing: bool) -> Row:
    base, own = clocks["all", 0], clocks[name, cut]

    def later(taken: dict[str, Any]) -> float:
        return statistics.median(taken["epochs"][1:])

    ratios = [one["training"] / other["training"] for one, other in zip(own, base, strict=True)]
    alone = clocks.get(("suffix", cut))

    def share(part: str) -> float | None:
        return statistics.median(o[part] / sum(o["epochs"][1:]) for o in own) if name in OURS[1:] else None

    return Row(
        checkpointing=checkpointing,
        arm=name,
        trained=f"{cut}-{layers - 1}",
        seconds=statistics.median(taken["training"] for taken in own),
        whole_run=statistics.median(ratios),
        spread=max(ratios) - min(ratios),
        later_epochs=statistics.median(later(a) / later(b) for a, b in zip(own, base, strict=True)),
        of_suffix=statistics.median(later(a) / later(b) for a, b in zip(own, alone, strict=True)) if alone else None,
        filling_seconds=statistics.median(taken["before_first_epoch"] for taken in own),
        reading=share("reading"),
        keys=share("keys"),
        peak_gb=max(taken["peak"] for taken in own) / 1e9,
        later_peak_gb=max(taken["later_peak"] for taken in own) / 1e9,
    )


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    head = "checkpointing | arm | trained | seconds | whole run | spread | later epochs | of suffix | filling, s"
    lines = [f"| {head} | reading | keys | peak GB | later |", "|---" * 13 + "|"]
    for row in rows:
        suffix, reading, keys = (
            "" if value is None else f"{value:.{digits}f}"
            for value, digits in ((row.of_suffix, 3), (row.reading, 4), (row.keys, 4))
        )
        lines.append(
            f"| {'on' if row.checkpointing else 'off'} | {row.arm} | {row.trained} | {row.seconds:.1f} | "
            f"{row.whole_run:.3f} | {row.spread:.3f} | {row.later_epochs:.3f} | {suffix} | {row.filling_seconds:.2f} | "
            f"{reading} | {keys} | {row.peak_gb:.1f} | {row.later_peak_gb:.1f} |"
        )
    return "\n".join(lines)


def is_real(model: str) -> bool:
    """Whether it is the folder of a model with weights."""
    return any(Path(model).glob("*.safetensors"))


def write_inputs(folder: Path, options: argparse.Namespace, *, layers: Sequence[int]) -> None:
    """Random models of so many layers, a tokenizer that axolotl can load, and rows of random tokens.

    A real model is taken as it is, and its rows are of the help texts that come with Python.
    """
    if is_real(options.model):
        (folder / f"model{layers[0]}").symlink_to(Path(options.model).resolve())
        text = "\n\n".join(pydoc_data.topics.topics.values())[: options.examples * options.sequence * 10]
        tokens = AutoTokenizer.from_pretrained(options.model)(text)["input_ids"]
        rows = [tokens[i * options.sequence : (i + 1) * options.sequence] for i in range(options.examples)]
        if len(rows[-1]) < options.sequence:
            raise SystemExit(f"{len(tokens)} tokens are too few for --examples {options.examples}")
    else:
        config = read_config(options.model)
        vocabulary = {f"<{i}>": i for i in range(config.vocab_size)}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<0>")),
            **{"bos_token": "<1>", "eos_token": "<2>", "pad_token": "<0>", "unk_token": "<0>"},
        )
        for count in set(layers) if "suffix" in options.arms.split(",") else {layers[0]}:
            config.num_hidden_layers, config.pad_token_id = count, 0
            _save_random(config, options.device, folder / f"model{count}")
            tokenizer.save_pretrained(folder / f"model{count}")
        draw = np.random.default_rng(0)
        rows = [draw.integers(3, config.vocab_size, options.sequence).tolist() for _ in range(options.examples)]
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for ids in rows:
            file.write(json.dumps({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids}) + "\n")


def _save_random(config: Any, device: str, folder: Path) -> None:
    """Random weights; in bf16 for a GPU."""
    model = random_model(config, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    model.to("cpu").save_pretrained(folder)
    if device == "cuda":
        torch.cuda.empty_cache()


class Trainees:
    """Processes that train once each; the next one is started, and imports axolotl, while one trains."""

    def __init__(self, device: str) -> None:
        self.context: Any = multiprocessing.get_context("spawn" if device == "cuda" else "fork")
        self.next = self._start()

    def _start(self) -> tuple[Any, Any]:
        here, there = self.context.Pipe()
        process = self.context.Process(target=_train, args=(there,))
        process.start()
        there.close()
        return process, here

    def train(self, config: Path, log: Path) -> int:
        """Exit status of a run."""
        process, connection = self.next
        connection.send((config, log))
        self.next = self._start()
        process.join()
        return int(process.exitcode)

    def close(self) -> None:
        """End the one that waits."""
        self.next[0].terminate()
        self.next[0].join()


def run(
    trainees: Trainees,
    folder: Path,
    options: argparse.Namespace,
    arm: str,
    cut: int,
    *,
    layers: int,
    checkpointing: bool,
) -> dict[str, Any]:
    """Train once; what the clock saw, in seconds and bytes."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    config: dict[str, Any] = {
        "base_model": str(folder / f"model{layers - cut if arm == 'suffix' else layers}"),
        "plugins": ["whole_run.Clock", *(["layersel"] if arm in OURS else [])],
        "datasets": [{"path": str(folder / "rows.jsonl"), "ds_type": "json", "type": None}],
        **{"dataset_prepared_path": str(folder / "prepared"), "output_dir": str(out), "dataset_num_proc": 1},
        **{"adapter": options.mode, "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True},
        **{"lora_mlp_kernel": False, "lora_qkv_kernel": False, "lora_o_kernel": False},
        **{"sequence_len": options.sequence, "micro_batch_size": options.batch, "gradient_accumulation_steps": 1},
        **{"num_epochs": options.epochs, "save_strategy": "no", "learning_rate": 1e-4, "optimizer": "adamw_torch"},
        **{"lr_scheduler": "constant", "logging_steps": 1000, "seed": 42, "gradient_checkpointing": checkpointing},
        **({"bf16": True} if options.device == "cuda" else {"use_cpu": True, "bf16": False}),
        **({"load_in_4bit": True} if options.mode == "qlora" else {}),
    }
    if checkpointing:
        config["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    if arm in OURS:
        cache = "off" if arm == "cut" else "disk"
        config["layersel"] = {"first_layer": cut, "report": False, "prefix_cache": cache}
        config["layersel"]["prefix_cache_dir"] = str(folder / "cache")
    if arm == "stock":
        config["peft_layers_to_transform"] = list(range(cut, layers))
    path, log = folder / "config.yml", folder / "log.txt"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    status = trainees.train(path, log)
    if status or not (out / CLOCK_FILE).exists():
        trainees.close()
        raise SystemExit(f"{arm}, cut {cut}, exit status {status}:\n{log.read_text()[-4000:]}")
    return dict(json.loads((out / CLOCK_FILE).read_text(encoding="utf-8")))


def _train(connection: Any) -> None:
    """What `axolotl train` does, in a child, once it is told with what."""
    config, log = connection.recv()
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        do_train(load_cfg(str(config)), TrainerCliArgs())
    except BaseException:
        traceback.print_exc()
        raise


if __name__ == "__main__":
    main()
