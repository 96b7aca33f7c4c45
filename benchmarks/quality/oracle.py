"""Fine-tunes a model with every cut on a grid: what each choice of layers would really have given.

One run = one line of JSON: model, task, kind (`cut`: LoRA on layers index..L-1, `single`: LoRA on layer index alone,
`full`: every weight of layers index..L-1; `tune-cut`, `tune-full`: to find the rate), learning rate, seed, steps,
held-out loss. A line that is there is not run again, so a killed sweep continues.

The learning rate is tuned on three cuts (five to seven points each) and interpolated in log rate for the others, where
half a step below is tried as well.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from pretrain import read_documents, split_documents
from students import Cached, cache_states, check_upper_part, finetune, heldout_loss, load_model
from tasks import TASKS, Rows, build_task
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from axolotl_layersel.model.decoder_stack import find_stack

RATES = {"cut": (3e-3, 1e-2, 3e-2), "full": (3e-4, 1e-3, 3e-3)}

DIVERGED = 1e6  # the loss of a run that ended in NaN


class Runs:
    """The lines on disk, and the run that adds one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.done = {self.key(line): line for line in map(json.loads, lines)}

    @staticmethod
    def key(run: dict[str, object]) -> tuple[object, ...]:
        return tuple(run[name] for name in ("model", "task", "kind", "index", "learning_rate", "seed", "steps"))

    def add(self, run: dict[str, object]) -> None:
        self.done[self.key(run)] = run
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")


class Sweep:
    """All runs of one model on one task."""

    def __init__(
        self,
        name: str,
        task: str,
        *,
        model: PreTrainedModel,
        data: Rows,
        cuts: list[int],
        runs: Runs,
        steps: int,
        rows: int,
    ):
        self.name, self.task, self.model, self.runs, self.steps, self.rows = name, task, model, runs, steps, rows
        self.layers = find_stack(model).num_layers
        self.data, self.cuts = data, cuts
        self.tuned_on: Sweep | None = None  # take the rates of this sweep instead of tuning
        self._cached: tuple[Cached, Cached] | None = None

    def cached(self) -> tuple[Cached, Cached]:
        if self._cached is None:
            every = list(range(self.layers))
            self._cached = (
                cache_states(self.model, self.data.train, every),
                cache_states(self.model, self.data.heldout, every),
            )
            for cut in (0, self.layers // 2):
                check_upper_part(self.model, self.data.heldout, self._cached[1], cut)
            base = heldout_loss(self.model, self._cached[1], 0)
            run = {"kind": "base", "index": -1, "learning_rate": 0.0, "seed": 0, "steps": 0}
            run |= {"model": self.name, "task": self.task, "loss": round(base, 6), "seconds": 0.0}
            if self.runs.key(run) not in self.runs.done:
                self.runs.add(run)
        return self._cached

    def base_loss(self) -> float:
        """Held-out loss before fine-tuning."""
        key = self.runs.key(
            {
                "model": self.name,
                "task": self.task,
                "kind": "base",
                "index": -1,
                "learning_rate": 0.0,
                "seed": 0,
                "steps": 0,
            }
        )
        if key not in self.runs.done:
            self.cached()
        return float(self.runs.done[key]["loss"])  # type: ignore[arg-type]

    def loss(self, kind: str, index: int, learning_rate: float, seed: int, steps: int | None = None) -> float:
        steps = steps or self.steps
        rate = float(f"{learning_rate:.3g}")
        run: dict[str, object] = {"model": self.name, "task": self.task, "kind": kind, "index": index}
        run |= {"learning_rate": rate, "seed": seed, "steps": steps}
        if (known := self.runs.done.get(self.runs.key(run))) is not None:
            return float(known["loss"])  # type: ignore[arg-type]
        tuning = self.runs.done.get(self.runs.key(run | {"kind": f"tune-{kind}"}))
        if tuning is not None:  # the same run
            self.runs.add(tuning | {"kind": kind})
            return float(tuning["loss"])  # type: ignore[arg-type]
        kind = kind.removeprefix("tune-")
        train, heldout = self.cached()
        started = time.monotonic()
        student = finetune(
            self.model, train, kind=kind, cut=index, learning_rate=rate, seed=seed, steps=steps, rows=self.rows
        )
        seconds = time.monotonic() - started
        loss = heldout_loss(student, heldout, index)
        run |= {"loss": round(loss, 6) if math.isfinite(loss) else DIVERGED, "seconds": round(seconds, 2)}
        self.runs.add(run)
        print(json.dumps(run), flush=True)
        return float(run["loss"])  # type: ignore[arg-type]

    def rates(self, kind: str = "cut") -> dict[int, float]:
        """Learning rate of every cut: tuned on the first, the middle and the last of the grid, interpolated for others.

        Deep cuts stand higher rates than shallow ones and diverge all of a sudden, so that an interpolated rate may be
        past that point: each cut of the grid is also tried half a step below it.
        """
        if self.tuned_on is not None:
            return self.tuned_on.rates(kind)
        tuned = [self.cuts[0], min(self.cuts, key=lambda cut: abs(cut - self.layers // 2)), self.cuts[-1]]
        best = {cut: self.tuned_rate(kind, cut) for cut in tuned}
        logs = np.log(list(best.values()))
        for cut in set(self.cuts) - set(tuned):
            rate = float(np.exp(np.interp(cut, tuned, logs)))
            tried = {r: self.loss(f"tune-{kind}", cut, r, 0) for r in (rate / math.sqrt(self.step(kind)), rate)}
            best[cut] = self.lowest_good(tried)
        known = sorted(best)
        every = np.interp(range(self.layers), known, [math.log(best[cut]) for cut in known])
        return dict(enumerate(np.exp(every).tolist()))

    def tuned_rate(self, kind: str, cut: int) -> float:
        """A good measured rate: of three, of those beyond while the best is at an end, and half a step beside it."""
        losses = {rate: self.loss(f"tune-{kind}", cut, rate, 0) for rate in RATES[kind]}
        step = self.step(kind)
        while len(losses) < 5 and (best := min(losses, key=losses.__getitem__)) in (min(losses), max(losses)):
            beyond = best / step if best == min(losses) else best * step
            losses[beyond] = self.loss(f"tune-{kind}", cut, beyond, 0)
        best = min(losses, key=losses.__getitem__)
        for rate in (best / math.sqrt(step), best * math.sqrt(step)):
            losses[rate] = self.loss(f"tune-{kind}", cut, rate, 0)
        return self.lowest_good(losses)

    def lowest_good(self, losses: dict[float, float]) -> float:
        """The lowest rate that reaches 0.99 of the best improvement: a higher one is nearer to diverging."""
        enough = 0.99 * (self.base_loss() - min(losses.values()))
        return min(rate for rate, loss in losses.items() if self.base_loss() - loss >= enough)

    @staticmethod
    def step(kind: str) -> float:
        """Factor between two rates of the first three."""
        return RATES[kind][1] / RATES[kind][0]

    def run_cuts(self, seed: int, kind: str = "cut", factor: float = 1.0) -> None:
        """Every cut of the grid at its rate times `factor`."""
        rates = self.rates(kind)
        for cut in self.cuts:
            self.loss(kind, cut, rates[cut] * factor, seed)

    def run_single(self, layers: list[int], seed: int = 0) -> None:
        """One layer at a time, at the rate of the last cut (also one layer)."""
        rate = self.rates()[self.cuts[-1]]
        for layer in layers:
            self.loss("single", layer, rate, seed)


def grid(num_layers: int, points: int) -> list[int]:
    """Cuts of the grid: even steps from 0, closer together near the output, always with the last layer."""
    if points >= num_layers:
        return list(range(num_layers))
    depths = {1, 2, 3, num_layers} | {round(num_layers * share) for share in np.linspace(1, 0, points - 2)[:-1]}
    depths = sorted(depth for depth in depths if depth >= 1)
    return sorted(num_layers - depth for depth in depths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True, help="folder or hub name; can be repeated")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument(
        "--text", type=Path, help="the text that the models were pretrained on: its last documents are the near task"
    )
    parser.add_argument("--gsm8k", type=Path)
    parser.add_argument("--roleplay", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("work/runs.jsonl"))
    parser.add_argument(
        "--phases",
        nargs="+",
        default=["cuts:0"],
        help="cuts:SEED[:FACTOR], single, full:MODEL/TASK, steps:CUT:STEPS:SEED",
    )
    parser.add_argument("--tune-on", choices=TASKS, help="tune the rates on this task only (default: on every task)")
    parser.add_argument("--cuts", type=int, default=8, help="number of cuts on the grid")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--train-rows", type=int, default=240)
    parser.add_argument("--heldout-rows", type=int, default=80)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers_logging.set_verbosity_error()

    runs = Runs(args.runs)
    sweeps: dict[tuple[str, str], Sweep] = {}
    tasks = sorted(args.tasks, key=lambda task: task != args.tune_on)
    for phase in args.phases:
        for name in args.model:
            for task in tasks:
                if phase.startswith("full:") and phase != f"full:{Path(name).name}/{task}":
                    continue
                if (name, task) not in sweeps:
                    model, tokenizer = load_model(name)
                    data = build_task(
                        task,
                        tokenizer=tokenizer,
                        paths={"gsm8k": args.gsm8k, "roleplay": args.roleplay},
                        heldout_documents=lambda: split_documents(read_documents(args.text))[1],
                        train_rows=args.train_rows,
                        heldout_rows=args.heldout_rows,
                        max_length=args.max_length,
                    )
                    layers = find_stack(model).num_layers
                    sweeps[name, task] = Sweep(
                        Path(name).name, task, model=model, data=data, cuts=grid(layers, args.cuts), runs=runs,
                        steps=args.steps, rows=args.rows,
                    )  # fmt: skip
                    if args.tune_on and task != args.tune_on:
                        sweeps[name, task].tuned_on = sweeps[name, args.tune_on]
                sweep = sweeps[name, task]
                kind, _, rest = phase.partition(":")
                if kind == "cuts":
                    seed, _, factor = rest.partition(":")
                    sweep.run_cuts(int(seed), factor=float(factor or 1))
                elif kind == "single":
                    sweep.run_single(list(range(sweep.layers)))
                elif kind == "full":
                    sweep.run_cuts(0, kind="full")
                elif kind == "steps":
                    cut, steps, seed = map(int, rest.split(":"))
                    sweep.loss("cut", cut, sweep.rates()[cut], seed, steps)
                else:
                    raise ValueError(
                        f"got phase {phase!r}; allowed: cuts:SEED[:FACTOR], single, full:MODEL/TASK, "
                        "steps:CUT:STEPS:SEED"
                    )


if __name__ == "__main__":
    main()
