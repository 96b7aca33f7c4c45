"""Runs the whole benchmark from one grid file; started again, it goes on where it stopped.

    python benchmark.py --quick                                                         # minutes, needs no data
    python benchmark.py --grid grids/cpu.json --text TEXT --gsm8k FILE --roleplay FILE  # hours on two cores
    python benchmark.py --grid grids/gpu.json --text TEXT --gsm8k FILE --roleplay FILE  # one GPU
    python benchmark.py --grid grids/gpu.json --model Qwen/Qwen3-0.6B-Base --text TEXT  # a model of the hub

`--text` is a text file, a folder of text files, or a .jsonl[.xz] with a `text` field. Without it the source files of
the interpreter's standard library are the text, which is enough for `--quick`. A task whose data is not given is left
out, and said so.
"""

import argparse
import json
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent


def call(script: str, *arguments: object) -> None:
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    print("$", " ".join(command[1:]), flush=True)
    subprocess.run(command, check=True)


def options(values: dict[str, object], names: tuple[str, ...]) -> list[object]:
    return [part for name in names if name in values for part in (f"--{name.replace('_', '-')}", values[name])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=Path, default=HERE / "grids" / "cpu.json")
    parser.add_argument("--quick", action="store_true", help="the same as --grid grids/quick.json")
    parser.add_argument("--text", type=Path, default=Path(sysconfig.get_paths()["stdlib"]))
    parser.add_argument("--gsm8k", type=Path)
    parser.add_argument("--roleplay", type=Path)
    parser.add_argument("--model", action="append", help="folder or hub name, instead of pretraining the grid's models")
    parser.add_argument("--work", type=Path, default=HERE / "work")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    grid = json.loads((HERE / "grids" / "quick.json" if args.quick else args.grid).read_text(encoding="utf-8"))
    work = args.work / ("quick" if args.quick else args.grid.stem)

    models = list(args.model or [])
    for entry in [] if args.model else grid["models"]:
        folder = work / "models" / entry["name"]
        models.append(str(folder))
        if not (folder / "pretraining.json").exists():
            given = options(
                entry, ("arch", "size", "minutes", "rows", "length", "vocab_size", "learning_rate", "max_characters")
            )
            if entry.get("keep_untrained"):
                given.append("--keep-untrained")
            call("pretrain.py", "--text", args.text, "--output", folder, "--threads", args.threads, *given)

    data = {"gsm8k": args.gsm8k, "roleplay": args.roleplay}
    tasks = [task for task in grid["tasks"] if task not in data or data[task] is not None]
    for task in sorted(set(grid["tasks"]) - set(tasks)):
        print(f"task {task!r} is left out: give its file with --{task}", flush=True)
    oracle = grid["oracle"]
    if oracle.get("tune_on") not in tasks:
        oracle.pop("tune_on", None)
    common: list[object] = ["--text", args.text, "--threads", args.threads, "--tasks", *tasks]
    common += [part for name, file in data.items() if file for part in (f"--{name}", file)]
    common += [part for model in models for part in ("--model", model)]
    sizes = options(oracle, ("train_rows", "heldout_rows", "max_length"))
    call("signals.py", *common, *sizes, "--output", work / "signals")
    for phases in grid["phases"]:
        phases = [f"full:{Path(models[0]).name}/{tasks[0]}" if phase == "full" else phase for phase in phases]
        given = options(oracle, ("cuts", "steps", "rows", "tune_on"))
        call("oracle.py", *common, *sizes, *given, "--runs", work / "runs.jsonl", "--phases", *phases)
    call("analyse.py", work, "--figures", work / "figures")


if __name__ == "__main__":
    main()
