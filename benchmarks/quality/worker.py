r"""Does the runs of a grid file that nobody has done yet, one after the other.

    python worker.py --model FOLDER --grid grids/smollm2.json --work work/smollm2 \
        --gsm8k FILE --roleplay FILE --text FILE

Start as many workers as there are cores; each reads the grid file again before each run, so that it can grow.
`--plan` prints what is left and the hours that it takes, by the runs that are done.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from jobs import Folder, Job, expand
from measure import choose, measure_signals
from pretrain import read_documents, split_documents
from states import read_cached, read_rows, write_rows, write_states
from students import check_upper_part, finetune, load_model, row_losses, scored, trainable, upper_part
from tasks import Rows, build_task
from transformers.utils import logging as transformers_logging


class Worker:
    """One model in memory, and its runs on disk."""

    def __init__(self, model: str, grid: Path, folder: Folder, data: dict[str, Path | None]) -> None:
        self.name, self.grid_file, self.folder, self.data = Path(model).name, grid, folder, data
        self.model, self.tokenizer = load_model(model, getattr(torch, self.grid["dtype"]))
        self.name = self.grid.get("name", self.name)

    @property
    def grid(self) -> dict[str, Any]:
        return dict(json.loads(self.grid_file.read_text(encoding="utf-8")))

    def next_job(self) -> Job | None:
        """Does the first run that is neither done nor claimed; None when there is none."""
        for job in expand(self.grid, self.name):
            if self.folder.result(job).exists() or not self.ready(job.task):
                continue
            with self.folder.claimed(job.name) as mine:
                if mine and not self.folder.result(job).exists():
                    self.do(job)
                    return job
        return None

    def ready(self, task: str) -> bool:
        """Whether the states of a task are there; prepares them unless another worker does so just now."""
        with self.folder.claimed(f"states-{task}") as mine:
            if mine and not (self.states(task) / "base.json").exists():
                self.prepare(task)
        return (self.states(task) / "base.json").exists()

    def states(self, task: str) -> Path:
        return self.folder.path / "states" / task

    def prepare(self, task: str) -> None:
        """Rows, states and the loss before training."""
        folder, grid = self.states(task), self.grid
        started = time.monotonic()
        data = build_task(
            task,
            tokenizer=self.tokenizer,
            paths={"gsm8k": self.data["gsm8k"], "roleplay": self.data["roleplay"]},
            heldout_documents=lambda: split_documents(read_documents(self.data["text"]))[1],
            **{name: grid[name] for name in ("train_rows", "heldout_rows", "max_length")},
        )
        write_rows(folder, data)
        for part, rows in (("heldout", data.heldout), ("train", data.train)):
            write_states(self.model, folder, part, rows, grid["depths"])
        losses = row_losses(self.model, read_cached(folder, "heldout", data.heldout, 0), 0)
        middle = grid["depths"][len(grid["depths"]) // 2]
        check_upper_part(self.model, data.heldout, read_cached(folder, "heldout", data.heldout, middle), middle)
        base = {"row_loss": [round(x, 3) for x in losses], "row_tokens": row_tokens(data)}
        base |= {"loss": sum(losses) / sum(base["row_tokens"]), "seconds": round(time.monotonic() - started, 1)}
        (folder / "base.json").write_text(json.dumps(base), encoding="utf-8")
        print(f"{task}: base loss {base['loss']:.4f}, states in {base['seconds']} s", flush=True)

    def do(self, job: Job) -> None:
        started = time.monotonic()
        folder, data = self.states(job.task), read_rows(self.states(job.task))
        base = json.loads((folder / "base.json").read_text(encoding="utf-8"))
        if job.kind == "signals":
            rows = data.train[: self.grid["signal_rows"]]
            found: dict[str, Any] = {"base": base, **measure_signals(self.model, rows)}
        elif job.kind == "choice":
            size = {"rows": self.grid["calibration_rows"], "rows_per_step": self.grid["rows"]}
            found = choose(self.model, data.train, steps=job.steps, seed=job.seed, **size)
        else:
            student = trainable(
                self.model, kind=job.kind, cut=job.index, last=job.last, seed=job.seed, rank=self.grid["rank"]
            )
            steps = finetune(
                student, read_cached(folder, "train", data.train, job.index), cut=job.index,
                learning_rate=job.learning_rate, seed=job.seed, steps=job.steps, rows=self.grid["rows"],
            )  # fmt: skip
            trained = time.monotonic() - started
            heldout = read_cached(folder, "heldout", data.heldout, job.index)
            losses, tokens = row_losses(student, heldout, job.index), scored(heldout, list(range(len(data.heldout))))
            found = {"loss": round(sum(losses) / tokens, 6), "train_seconds": round(trained, 1)}
            found |= {"row_loss": [round(x, 3) for x in losses], "train_loss": [round(x, 4) for x in steps]}
            if job.switched_off:
                off = {}
                for cut in self.grid["switched_off"]:
                    rows = read_cached(folder, "heldout", data.heldout, cut)
                    off[cut] = round(sum(row_losses(upper_part(student, cut), rows, cut)) / tokens, 6)
                found["switched_off"] = off
        found["seconds"] = round(time.monotonic() - started, 1)
        self.folder.write(job, found)
        share = f" {found['loss']:.4f} of {base['loss']:.4f}" if "loss" in found else ""
        print(f"{time.strftime('%H:%M:%S')} {job.name}{share} {found['seconds']} s", flush=True)


def row_tokens(data: Rows) -> list[int]:
    return [sum(label != -100 for label in labels[1:]) for _, labels in data.heldout]


def show_plan(grid: dict[str, Any], folder: Folder) -> None:
    """Runs that are left, and their hours in one worker, by the seconds of those that are done."""
    jobs = [job for job in expand(grid, "") if job.kind not in ("signals", "choice")]
    layers = grid["depths"][-1] + 1
    done = [job for job in jobs if folder.result(job).exists()]
    size = {job: job.steps * (layers - job.index + 2) for job in jobs}  # the unembedding costs about two layers
    seconds = sum(json.loads(folder.result(job).read_text(encoding="utf-8"))["seconds"] for job in done)
    print(f"{len(done)} of {len(jobs)} runs are done, in {seconds / 3600:.2f} hours of one worker")
    if done:
        left = sum(size[job] for job in jobs if job not in done) * seconds / sum(size[job] for job in done)
        print(f"{len(jobs) - len(done)} are left: about {left / 3600:.2f} hours of one worker")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub name")
    parser.add_argument("--grid", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    for name in ("gsm8k", "roleplay", "text"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plan", action="store_true", help="print what is left, and its hours; run nothing")
    args = parser.parse_args()
    if args.plan:
        show_plan(json.loads(args.grid.read_text(encoding="utf-8")), Folder(args.work))
        return
    torch.set_num_threads(args.threads)
    transformers_logging.set_verbosity_error()
    data = {"gsm8k": args.gsm8k, "roleplay": args.roleplay, "text": args.text}
    worker = Worker(args.model, args.grid, Folder(args.work), data)
    while worker.next_job() is not None:
        pass


if __name__ == "__main__":
    main()
