"""What the start-up alias costs every other Python program of an environment.

An installed `axolotl_layersel.pth` runs at the start of each interpreter. This script makes two environments that
differ in that file alone, starts `python -c pass` in both in turn, and prints the medians of the paired differences in
processor time and in elapsed time, next to the modules that are imported more. Judged is processor time: other work on
the machine hardly changes it. The claim: under 2 ms, and nothing heavy.

    python benchmarks/startup.py --pairs 200
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "axolotl_layersel"
LIMIT_MS = 2.0


def make_environment(folder: Path, *, alias: bool) -> Path:
    """An environment that holds this package alone, with or without its alias; returns the interpreter."""
    venv.create(folder, with_pip=False, symlinks=True)
    site = folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    shutil.copytree(PACKAGE, site / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__", "*.pth"))
    if alias:
        shutil.copy(PACKAGE / "axolotl_layersel.pth", site)
    return folder / "bin" / "python"


def environment() -> dict[str, str]:
    """Without what changes how Python starts, such as a ban on writing bytecode."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def start_and_end(python: Path) -> tuple[float, float]:
    """Milliseconds of processor time and of elapsed time of an interpreter that does nothing."""
    start = time.perf_counter()
    _, status, usage = os.wait4(os.posix_spawn(python, [python, "-c", "pass"], environment()), 0)
    elapsed = time.perf_counter() - start
    if status != 0:
        raise SystemExit(f"{python} -c pass ended with status {status}")
    return 1000 * (usage.ru_utime + usage.ru_stime), 1000 * elapsed


def modules(python: Path) -> set[str]:
    """What is imported when a program starts; this also writes the bytecode that later starts use."""
    command = [str(python), "-c", "import sys; print(*sys.modules)"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment())
    return set(done.stdout.split())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=200, help="starts of each interpreter")
    pairs = parser.parse_args().pairs
    with tempfile.TemporaryDirectory() as folder:
        without = make_environment(Path(folder, "without"), alias=False)
        with_alias = make_environment(Path(folder, "with"), alias=True)
        more = sorted(modules(with_alias) - modules(without))
        starts = []
        for i in range(pairs):
            order = (without, with_alias) if i % 2 else (with_alias, without)
            taken = {python: start_and_end(python) for python in order}
            starts.append((taken[without], taken[with_alias]))
    print(f"Python {sys.version.split()[0]}, {pairs} pairs; milliseconds, medians (quartiles)")
    differences = {}
    for kind, name in enumerate(("processor", "elapsed")):
        low, middle, high = statistics.quantiles([after[kind] - before[kind] for before, after in starts], n=4)
        differences[name] = middle
        base = statistics.median(before[kind] for before, _ in starts)
        print(f"{name:10} {base:6.2f} without the alias, {middle:+.2f} ({low:+.2f} to {high:+.2f}) with it")
    print(f"imported more: {', '.join(more)}")
    print(f"under {LIMIT_MS:g} ms of processor time: {'yes' if differences['processor'] < LIMIT_MS else 'no'}")


if __name__ == "__main__":
    main()
