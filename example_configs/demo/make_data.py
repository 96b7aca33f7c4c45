"""The demo's data: a short Python function -> its one-line docstring, from the standard library of this very Python.

The answers were written by the library's authors (Python Software Foundation License), and everybody who programs can
judge one. About every tenth top-level module is held out: none of its functions is trained on, and the losses and the
answers that the demo shows are of those modules. Nothing is downloaded, and equal installations give equal data.

    python example_configs/demo/make_data.py
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import random
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

WORK = Path(__file__).parent / "work"
QUESTION = "Write the one-line docstring of this Python function.\n\n"
TRAIN_ROWS, EVAL_ROWS = 160, 48  # so that training takes a few minutes on two cores and measuring takes seconds
LONGEST_CODE, LONGEST_ANSWER = 200, 80  # characters
HELD_OUT_SHARE = 10  # one top-level module in ten
# Tests and bundled copies are no part of the library's own text; site-packages differ by machine.
SKIPPED = {"test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "_bundled", "__pycache__"}
SKIPPED |= {"site-packages", "dist-packages"}


@dataclass(frozen=True)
class Row:
    """One function and the docstring that it has in the library."""

    module: str  # dotted, "json.decoder"
    code: str  # without the docstring
    answer: str

    @property
    def held_out(self) -> bool:
        """Decided by the top-level name, so that a package is on one side as a whole."""
        digest = hashlib.sha256(self.module.partition(".")[0].encode()).digest()
        return digest[0] % HELD_OUT_SHARE == 0

    def to_json(self) -> str:
        """A question and its answer, as axolotl's `type: chat_template` reads them, and as `type: alpaca` does."""
        turns = [{"role": "user", "content": QUESTION + self.code}, {"role": "assistant", "content": self.answer}]
        columns = {"instruction": QUESTION.strip(), "input": self.code, "output": self.answer}
        return json.dumps({"messages": turns, **columns, "module": self.module}) + "\n"


def library_rows(root: Path | None = None) -> list[Row]:
    """The rows of every module of the standard library (or of the folder `root`), in the order of their names."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    rows = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED.isdisjoint(parts) and not parts[0].startswith(("config-", "_sysconfigdata")):
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            rows += module_rows(name, path.read_text(encoding="utf-8", errors="replace"))
    return rows


def module_rows(name: str, source: str) -> Iterator[Row]:
    """Functions and methods that are short, do something, and have a one-line docstring that is a sentence."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old library code
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        answer = (ast.get_docstring(node) or "").split("\n\n")[0]
        node.body = node.body[1:]  # of a function without a docstring nothing is left: its answer is no sentence
        if node.name.startswith("__") or not node.body or isinstance(node.body[0], ast.Pass | ast.Raise):
            continue
        code = ast.unparse(node)
        sentence = answer[:1].isupper() and answer.endswith(".") and "\n" not in answer
        if sentence and 15 <= len(answer) <= LONGEST_ANSWER and len(code) <= LONGEST_CODE:
            yield Row(name, code, answer)


def split(rows: list[Row], *, seed: int = 7) -> tuple[list[Row], list[Row]]:
    """Shuffled rows for training and for holding out.

    No code and no answer occurs twice, neither in one of them nor across both.
    """
    train: list[Row] = []
    held_out: list[Row] = []
    seen: set[str] = set()
    for row in sorted(rows, key=lambda r: r.held_out):  # what occurs on both sides stays on the training side
        if seen.isdisjoint({row.code, row.answer}):
            seen |= {row.code, row.answer}
            (held_out if row.held_out else train).append(row)
    random.Random(seed).shuffle(train)
    random.Random(seed).shuffle(held_out)
    return train, held_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=WORK, help="folder to write to")
    work = parser.parse_args().work
    work.mkdir(parents=True, exist_ok=True)
    train, held_out = split(library_rows())
    for name, rows in {"train": train[:TRAIN_ROWS], "eval": held_out[:EVAL_ROWS]}.items():
        (work / f"{name}.jsonl").write_text("".join(row.to_json() for row in rows), encoding="utf-8")
    print(
        f"data: {len(train[:TRAIN_ROWS])} of {len(train)} short functions of the standard library with their one-line "
        f"docstrings, and {len(held_out[:EVAL_ROWS])} of {len(held_out)} of modules that are held out"
    )


if __name__ == "__main__":
    main()
