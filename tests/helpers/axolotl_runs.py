"""Real axolotl runs for tests: a tiny model, a small data set, a config, and the commands that a user would type.

Nothing is downloaded. Each run is its own process with its own time limit; it costs about half a minute, nearly all of
it imports, so a test asks one run many questions.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

VOCABULARY = 320  # the 256 bytes, three special tokens, and a few merges
SEQUENCE_LEN = 160
LIMIT = 600  # seconds until a run counts as hanging: half a minute is usual, ten times that on a machine with much else
# Options of the run that the fixture `uninterrupted` keeps: 13 calibration rows, a checkpoint every two of eight steps.
UNINTERRUPTED = {
    "plugins": ["axolotl_test_plugins.FixedSeed", "layersel"],
    "layersel": {"num_samples": 13},
    "max_steps": 8,
    "save_strategy": "steps",
    "save_steps": 2,
}
FULL_FINE_TUNING = dict.fromkeys(["adapter", "lora_r", "lora_alpha", "lora_target_linear"])  # overrides
HELPERS = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent  # axolotl of this very environment
# As modules, because an environment that is laid over another has no scripts of its own for these two.
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
ACCELERATE = (sys.executable, "-m", "accelerate.commands.accelerate_cli")

Launcher = Literal["accelerate", "python", "axolotl", "torchrun"]


# ---- what a run needs ----------------------------------------------------------------------------------------------


def instruction_rows(rows: int, *, first: int = 0) -> list[dict[str, str]]:
    """Sums in words, alpaca columns; row i is the same in every data set, and lengths differ from row to row."""
    made = []
    for i in range(first, first + rows):
        a, b = i * 7 % 23, i * 5 % 19
        steps = "".join(f"{a} and {j} is {a + j}. " for j in range(1, i % 4 + 1))
        made.append({"instruction": f"Add {a} and {b}.", "input": "", "output": f"{steps}The sum is {a + b}."})
    return made


def make_dataset(folder: Path, rows: int = 64, *, first: int = 0, name: str = "data.jsonl") -> Path:
    """An alpaca data set of rows first..first + rows - 1, every answer supervised."""
    path = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in instruction_rows(rows, first=first)), encoding="utf-8")
    return path


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on the rows above."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [row["instruction"] + row["output"] for row in instruction_rows(64)]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<s>", "</s>", "<pad>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=SEQUENCE_LEN
    )


def make_model(
    folder: Path,
    *,
    layers: int = 6,
    tied: bool = False,
    arch: Literal["llama", "qwen3"] = "llama",
    seed: int = 0,
    hidden_size: int = 32,
    change: Callable[[Any], None] | None = None,
) -> Path:
    """A random model with its tokenizer, saved to `folder`.

    Args:
        layers: number of decoder layers.
        tied: unembedding and input embeddings share their weight.
        change: called with the model before it is saved, to break it.
    """
    tokenizer = make_tokenizer()
    config = {"llama": LlamaConfig, "qwen3": Qwen3Config}[arch](
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden_size // 4,
        max_position_embeddings=SEQUENCE_LEN,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if change is not None:
        with torch.no_grad():
            change(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_config(folder: Path, *, model: Path, data: Path, name: str = "config.yml", **overrides: Any) -> Path:
    """A LoRA config that runs on the CPU in seconds; `output_dir` and the prepared data lie in `folder`.

    Args:
        overrides: config keys; a value of None takes a key out.
    """
    config: dict[str, Any] = {
        "base_model": str(model),
        "plugins": ["layersel"],
        "layersel": {"num_samples": 16},
        "datasets": [{"path": str(data), "ds_type": "json", "type": "alpaca"}],
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / "out"),
        "dataset_num_proc": 1,
        "adapter": "lora",
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_target_linear": True,
        "lora_mlp_kernel": False,
        "lora_qkv_kernel": False,
        "lora_o_kernel": False,
        "sequence_len": SEQUENCE_LEN,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": 4,
        "num_epochs": 1,
        "save_strategy": "no",
        "learning_rate": 0.01,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "logging_steps": 1,
        "gradient_checkpointing": True,
        "use_cpu": True,
        "bf16": False,
        "seed": 42,
    }
    config.update(overrides)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(
        yaml.safe_dump({key: value for key, value in config.items() if value is not None}, allow_unicode=True),
        encoding="utf-8",
    )
    return path


# ---- the commands --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finished:
    """What a run left: its exit status and its log, standard output and errors in one text."""

    returncode: int
    log: str
    seconds: float

    def check(self) -> Finished:
        """This run, if it succeeded.

        Raises:
            AssertionError: with the end of the log.
        """
        assert self.returncode == 0, f"exit status {self.returncode}; the log ends with\n{self.log[-6000:]}"
        return self

    @property
    def losses(self) -> list[float]:
        """The training loss of every logged step, as precise as axolotl prints it."""
        return [float(x) for x in re.findall(r"\{'loss': '?([0-9.e+-]+)'?", self.log)]


def environment(**changes: str) -> dict[str, str]:
    """One thread, no network, no telemetry, the plugins of the tests at hand; `changes` on top."""
    quiet = {
        "OMP_NUM_THREADS": "1",
        "AXOLOTL_DO_NOT_TRACK": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": f"{HELPERS}{os.pathsep}{HELPERS.parents[1]}",  # axolotl_test_plugins, and the tree under test
        "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    return {**os.environ, **quiet, **changes}


def train_command(config: Path, *args: str, launcher: Launcher = "accelerate", processes: int = 1) -> list[str]:
    """The command line of a training run."""
    module = ["axolotl.cli.train", str(config), *args]
    # `--cpu --num_processes 2` starts one process, unless it is given hosts for mpirun; `--multi_gpu` needs no GPU.
    several = ["--multi_gpu", f"--num_processes={processes}", f"--main_process_port={free_port()}"]
    return {
        "accelerate": [*ACCELERATE, "launch", *(several if processes > 1 else ["--cpu"]), "-m", *module],
        "torchrun": [
            *TORCHRUN,
            f"--nproc-per-node={processes}",
            f"--master-port={free_port()}",
            "-m",
            *module,
        ],
        "python": [sys.executable, "-m", *module],
        "axolotl": [str(BIN / "axolotl"), "train", str(config), "--launcher", "accelerate", *args, "--", "--cpu"],
    }[launcher]


def start(command: list[str], log: Path, *, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Running:
    """Start a command in a process group of its own, its output in `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment(**(env or {})),
            cwd=cwd or log.parent,
            start_new_session=True,
            # A shell that starts the tests in the background lets them ignore Ctrl-C, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    return Running(process, log, time.monotonic())


@dataclass
class Running:
    """A run that may be waited for, or hit by a signal, with all of its processes."""

    process: subprocess.Popen[bytes]
    log_file: Path
    started: float

    @property
    def log(self) -> str:
        """The log so far."""
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, text: str, *, timeout: float = LIMIT) -> None:
        """Return as soon as the log holds `text`.

        Raises:
            AssertionError: the run ended or the time is up, and it did not appear.
        """
        deadline = time.monotonic() + timeout
        while text not in self.log:
            over = self.process.poll() is not None or time.monotonic() > deadline
            if over and text not in self.log:
                self.signal(signal.SIGKILL)
                raise AssertionError(f"{text!r} did not appear in the log:\n{self.log[-6000:]}")
            time.sleep(0.01)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to every process of the run."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def finish(self, *, timeout: float = LIMIT) -> Finished:
        """Wait for the end.

        Raises:
            AssertionError: the time is up; the run is killed.
        """
        try:
            self.process.wait(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGKILL)
            self.process.wait()
            raise AssertionError(f"still running after {timeout} s; the log ends with\n{self.log[-6000:]}") from None
        finally:
            self.signal(signal.SIGKILL)  # data set workers that outlived it
        return Finished(self.process.returncode, self.log, time.monotonic() - self.started)


def train(
    config: Path,
    *args: str,
    launcher: Launcher = "accelerate",
    processes: int = 1,
    timeout: float = LIMIT,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Finished:
    """Train to the end, or to the error."""
    command = train_command(config, *args, launcher=launcher, processes=processes)
    env = {**({"ACCELERATE_USE_CPU": "true"} if processes > 1 else {}), **(env or {})}
    return start(command, config.parent / f"{config.stem}.log", env=env, cwd=cwd).finish(timeout=timeout)


def axolotl(*args: str, log: Path, timeout: float = LIMIT, env: Mapping[str, str] | None = None) -> Finished:
    """`python -m axolotl.cli.<args>`, for the other commands: `axolotl("preprocess", "config.yml", log=...)`."""
    command = [sys.executable, "-m", f"axolotl.cli.{args[0]}", *args[1:]]
    return start(command, log, env=env).finish(timeout=timeout)


def on_several(config: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides for `write_config` that let several processes train on the CPU; see `axolotl_test_plugins.py`."""
    return {**config, "plugins": ["axolotl_test_plugins.CpuProcesses", *config.get("plugins", ["layersel"])]}


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


# ---- what a run leaves ---------------------------------------------------------------------------------------------


def plan_of(output_dir: Path) -> dict[str, Any]:
    """The run's plan, as JSON."""
    values: dict[str, Any] = json.loads((output_dir / "layersel" / "plan.json").read_text(encoding="utf-8"))
    return values


def logged_losses(output_dir: Path) -> list[float]:
    """The training losses in the newest checkpoint's `trainer_state.json`, in full precision."""
    states = sorted(output_dir.glob("checkpoint-*/trainer_state.json"), key=lambda p: int(p.parent.name.split("-")[1]))
    history = json.loads(states[-1].read_text(encoding="utf-8"))["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]
