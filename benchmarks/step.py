"""What a step costs when only the last layers are trained: stock axolotl, Spectrum's pattern, and this plugin.

For LoRA, QLoRA and full fine-tuning, with and without gradient checkpointing, and for cuts that freeze 0, 25, 50, 75 %
of the decoder layers and all but the last one, the script takes the same training step in several arms:

- `all`: every layer is trained, as the stock trainer does it; all ratios are to this arm. `again` is the same once
  more and shows the noise.
- `stock`: only layers k..L-1 are trained, gradients flow as the stock trainer lets them: adapters by
  `peft_layers_to_transform`, full fine-tuning by `unfrozen_parameters`.
- `ours`: the same layers, and the backward pass stops at the cut.
- `spectrum`: full fine-tuning with the pattern of axolotl's Spectrum plugin: embeddings, head, and for each kind of
  matrix half of the layers. Random weights have no signal-to-noise ratio, so a seeded draw stands in for its ranking.

Each arm is a process of its own with the same weights and batches (`step_arm.py`). The parent lets one compute at a
time and goes round: a ratio is the median over rounds of (arm / `all` of the same round). Time is the process's CPU
time on a CPU, one thread, and device events on a GPU. The columns:

- `step`: forward, backward and optimizer; `±` half of the interquartile range of its ratios; `of stock`: our step to
  the stock trainer's for the same layers; `backward`: of it alone.
- `saved MB`: what autograd holds at the end of the forward pass, parameters excluded, and its ratio; `saved/predicted`:
  to the bytes that `cut_cost.py` predicts. On a GPU also the peak of a step.
- `passes`: forward and backward. `theory`: the same in FLOPs, predicted by `cut_cost.py` before training;
  `passes/theory` compares them.

    python benchmarks/step.py
    python benchmarks/step.py --model llama-3.1-8b --device cuda --dtype bf16 --sequence 2048 --batch 1 --modes lora
    python benchmarks/step.py --model path/to/config.json --modes full --json step.json
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import platform
import statistics
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from step_arm import ADAPTERS, DTYPES, PRESETS, Arm, Prediction, Setting, Step, read_config, serve

WARM_UP = 2  # rounds that are not counted


@dataclass(frozen=True)
class Row:
    """One line of the table; ratios are medians of the paired ratios to `all`."""

    mode: str
    checkpointing: bool
    arm: str
    first_trainable: int
    trained: str  # decoder layers
    seconds: float  # of the median step
    step: float
    spread: float  # half of the interquartile range of `step`
    passes: float  # forward and backward
    backward: float
    saved_bytes: float
    saved: float
    peak_bytes: float | None
    peak: float | None
    theory: float  # of FLOPs
    predicted_saved_bytes: float | None
    of_stock: float | None = None  # step, to `stock` of the same cut


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the tables, and write them where asked to."""
    options = parse(argv)
    print(heading(options), flush=True)
    rows: list[Row] = []
    for mode, checkpointing in itertools.product(options.modes, options.checkpointing):
        setting = Setting(
            model=options.model,
            device=options.device,
            dtype=options.dtype,
            batch=options.batch,
            sequence=options.sequence,
            rank=options.rank,
            mode=mode,
            checkpointing=checkpointing == "on",
        )
        started = time.perf_counter()
        found = compare(setting, cuts=options.cuts, rounds=options.rounds, resident=options.resident)
        rows += found
        print(f"\n### {setting}\n\n{table(found)}\n", flush=True)
        seconds = time.perf_counter() - started
        print(f"({seconds:.0f} s)", flush=True)
    if options.json:
        results = [asdict(row) for row in rows]
        text = json.dumps(
            {"options": vars(options), "environment": environment(options.device), "rows": results}, indent=2
        )
        Path(options.json).write_text(text + "\n", encoding="utf-8")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked."""

    def words(*allowed: str) -> Any:
        def split(text: str) -> list[str]:
            given = text.split(",")
            if unknown := [word for word in given if allowed and word not in allowed]:
                raise argparse.ArgumentTypeError(f"{unknown} not among {', '.join(allowed)}")
            return given

        return split

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", default="small", help=f"{', '.join(PRESETS)}, or the path of a config.json")
    parser.add_argument("--device", default="cpu", help="cpu, or a CUDA device such as cuda or cuda:1")
    parser.add_argument("--dtype", default="fp32", choices=DTYPES, help="bf16: weights in bf16, and autocast")
    parser.add_argument("--sequence", type=int, default=256, help="positions of a row")
    parser.add_argument("--batch", type=int, default=2, help="rows of a micro batch")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters")
    parser.add_argument("--modes", type=words(*ADAPTERS), default=list(ADAPTERS), help="lora,qlora,full")
    parser.add_argument("--checkpointing", type=words("off", "on"), default=["off", "on"], help="off,on")
    parser.add_argument(
        "--cuts", type=words(), default=["0", "0.25", "0.5", "0.75", "last"], help="frozen shares, last"
    )
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after two to warm up")
    parser.add_argument("--resident", type=int, default=0, help="most processes at a time; 0: all, 3 on a GPU")
    parser.add_argument("--json", default="", help="also write every number to this file")
    options = parser.parse_args(argv)
    for cut in options.cuts:
        if cut != "last" and not 0 <= float(cut) < 1:
            parser.error(f"a cut is {cut}; allowed are shares from 0 to below 1, and last")
    if options.rounds < 2:
        parser.error(f"--rounds is {options.rounds}; allowed is 2 or more, because the spread over rounds is shown")
    if options.resident == 1:
        parser.error("resident is 1; allowed are 0 for all processes, or 2 and more, as ratios need two")
    return options


def heading(options: argparse.Namespace) -> str:
    """What was measured, on what."""
    config = read_config(options.model)
    shape = (
        f"{config.num_hidden_layers} layers, hidden {config.hidden_size}, vocabulary {config.vocab_size}, "
        f"sequence {options.sequence}, batch {options.batch}, {options.dtype}, rank {options.rank}, "
        f"{options.rounds} rounds"
    )
    known = ", ".join(f"{name} {value}" for name, value in environment(options.device).items())
    return f"{options.model}: {shape}\n{known}"


def environment(device: str) -> dict[str, str]:
    """Hardware and versions."""
    if device == "cpu":
        info = Path("/proc/cpuinfo")
        lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        hardware = f"{names[0] if names else platform.processor()}, 1 thread"
    else:
        properties = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
            check=True,
            capture_output=True,
            text=True,
        )  # the parent must not touch the GPU
        hardware = properties.stdout.splitlines()[0]
    packages = ("torch", "transformers", "peft", "bitsandbytes")
    return {device: hardware, "python": platform.python_version(), **{name: version(name) for name in packages}}


def table(rows: Sequence[Row]) -> str:
    """Markdown, columns aligned."""
    head = ["arm", "trained", "s/step", "step", "±", "backward", "of stock", "saved MB", "saved", "saved/predicted"]
    head += ["peak GB", "peak"] if rows[0].peak is not None else []
    head += ["passes", "theory", "passes/theory"]
    lines = [head, ["-" * len(word) for word in head]]
    for row in rows:
        line = [
            row.arm,
            row.trained,
            f"{row.seconds:.3f}",
            f"{row.step:.2f}",
            f"{row.spread:.2f}",
            f"{row.backward:.2f}",
        ]
        line += [
            "" if row.of_stock is None else f"{row.of_stock:.2f}",
            f"{row.saved_bytes / 1e6:.1f}",
            f"{row.saved:.2f}",
        ]
        line += ["" if row.predicted_saved_bytes is None else f"{row.saved_bytes / row.predicted_saved_bytes:.3f}"]
        if row.peak is not None and row.peak_bytes is not None:
            line += [f"{row.peak_bytes / 1e9:.2f}", f"{row.peak:.2f}"]
        lines.append([*line, f"{row.passes:.2f}", f"{row.theory:.2f}", f"{row.passes / row.theory:.2f}"])
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "| " + " | ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def compare(setting: Setting, *, cuts: Sequence[str], rounds: int, resident: int) -> list[Row]:
    """All arms of one setting, round by round; at most `resident` processes at a time, `all` always among them."""
    num_layers = read_config(setting.model).num_hidden_layers
    base, *others = arms_of(setting, [cut_of(cut, num_layers) for cut in cuts])
    size = (resident or (len(others) + 1 if setting.device == "cpu" else 3)) - 1
    rows: list[Row] = []
    for some in (others[i : i + size] for i in range(0, len(others), size)):
        arms = [base, *some]
        with contextlib.ExitStack() as running:
            ask = {arm: running.enter_context(worker(setting, arm)) for arm in arms}
            predictions = ask[base](("predict", arms))
            for arm in arms:
                ask[arm](("prepare",))
            steps: dict[Arm, list[Step]] = {arm: [] for arm in arms}
            for count in range(WARM_UP + rounds):
                for arm in arms if count % 2 else reversed(arms):
                    steps[arm].append(ask[arm](("step",)))
                if count == 0:
                    _check_losses({arm: steps[arm][0].loss for arm in arms})
            memory = {arm: ask[arm](("memory",)) for arm in arms}
        measured = {arm: taken[WARM_UP:] for arm, taken in steps.items()}
        new = [_row(setting, arm, base, measured, memory, predictions) for arm in arms]
        rows += new if not rows else new[1:]
    stock = {row.first_trainable: row.step for row in rows if row.arm == "stock"}
    return [
        replace(row, of_stock=row.step / stock[row.first_trainable])
        if row.arm == "ours" and row.first_trainable in stock
        else row
        for row in rows
    ]


def _row(
    setting: Setting,
    arm: Arm,
    base: Arm,
    steps: Mapping[Arm, Sequence[Step]],
    memory: Mapping[Arm, tuple[int, int | None]],
    predictions: Mapping[Arm, Prediction],
) -> Row:
    pairs = list(zip(steps[arm], steps[base], strict=True))
    ratios = [one.total / other.total for one, other in pairs]
    low, _, high = statistics.quantiles(ratios, n=4)
    num_layers = read_config(setting.model).num_hidden_layers
    (saved, peak), (base_saved, base_peak) = memory[arm], memory[base]
    return Row(
        mode=setting.mode,
        checkpointing=setting.checkpointing,
        arm=arm.name,
        first_trainable=arm.first_trainable,
        trained="half of each" if arm.name == "spectrum" else f"{arm.first_trainable}-{num_layers - 1}",
        seconds=statistics.median(step.total for step in steps[arm]),
        step=statistics.median(ratios),
        spread=(high - low) / 2,
        passes=statistics.median(one.passes / other.passes for one, other in pairs),
        backward=statistics.median(one.backward / other.backward for one, other in pairs),
        saved_bytes=saved,
        saved=saved / base_saved,
        peak_bytes=peak,
        peak=peak / base_peak if peak and base_peak else None,
        theory=predictions[arm].flops / predictions[base].flops,
        predicted_saved_bytes=predictions[arm].saved,
    )


def _check_losses(losses: Mapping[Arm, float]) -> None:
    """Before anything is learnt all arms compute the same loss, or they do not train the same model."""
    first, *rest = losses.values()
    if any(abs(loss - first) > 1e-3 * abs(first) for loss in rest):
        raise SystemExit(f"the arms' first losses differ, so they are not comparable: {losses}")


def arms_of(setting: Setting, cuts: Sequence[int]) -> list[Arm]:
    """`all` first, then itself again for the noise, then both ways to train each suffix."""
    arms = [Arm("all")]
    for k in cuts:
        arms += [Arm("stock", k), Arm("ours", k)] if k else [Arm("again")]
    return arms + ([Arm("spectrum")] if setting.mode == "full" else [])


def cut_of(text: str, num_layers: int) -> int:
    """First trainable layer for a frozen share, or for "last"."""
    return num_layers - 1 if text == "last" else round(float(text) * num_layers)


@contextlib.contextmanager
def worker(setting: Setting, arm: Arm) -> Iterator[Any]:
    """A process for an arm, and the function that asks it."""
    # A forked process shares what is imported; one that uses a GPU must not be forked.
    context: Any = multiprocessing.get_context("spawn" if setting.device != "cpu" else "fork")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, setting, arm), daemon=True)
    process.start()
    there.close()

    def ask(message: tuple[Any, ...]) -> Any:
        here.send(message)
        kind, content = here.recv()
        if kind == "error":
            raise SystemExit(f"{setting}, arm {arm}:\n{content}")
        return content

    try:
        yield ask
    finally:
        with contextlib.suppress(BrokenPipeError):
            here.send(("stop",))
        process.join(30)
        if process.is_alive():
            process.terminate()


if __name__ == "__main__":
    main()
