"""Fine-tunes a model with every cut on a grid: what each choice of layers would really have given.

One run = one line of JSON: model, task, kind (`cut`: LoRA on layers index..L-1, `single`: LoRA on layer index alone, `full`: every
weight of layers index..L-1), learning rate, seed, steps, held-out loss. A line that is there is not run again, so a killed sweep continues.

The learning rate is tuned on three cuts (three points each, and the vertex of the parabola through them in log rate) and interpolated in
the trained depth between them. Layers below the cut are frozen, so their output is the same in every step and run: it is computed once
for a model and task, and the run starts from there with the upper layers alone. That this is exact is checked on a batch of every model.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from pretrain import read_documents, split_documents
from tasks import TASKS, Rows, build_task
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from axolotl_layersel.stack import find_stack
from axolotl_layersel.trace import read_states

IGNORED = -100
RATES = {"cut": (3e-3, 1e-2, 3e-2), "full": (3e-4, 1e-3, 3e-3)}


@dataclass(frozen=True)
class Cached:
    """Rows of one task with the latent states at every cut; row r of state s is `states[s][r]`, (T, D) float32."""

    labels: list[Tensor]
    states: dict[int, list[Tensor]]


def pad(rows: list[Tensor], value: float) -> Tensor:
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def by_length(labels: list[Tensor], size: int) -> Iterator[list[int]]:
    order = sorted(range(len(labels)), key=lambda row: len(labels[row]))
    for at in range(0, len(order), size):
        yield order[at : at + size]


@torch.no_grad()
def cache_states(model: PreTrainedModel, rows: list[tuple[list[int], list[int]]], cuts: list[int]) -> Cached:
    """One forward pass over the rows; keeps the states that enter the layers in `cuts`."""
    stack = find_stack(model)
    device = next(model.parameters()).device
    model.eval()
    labels = [torch.tensor(label) for _, label in rows]
    states: dict[int, list[Tensor]] = {cut: [torch.empty(0)] * len(rows) for cut in cuts}
    for batch in by_length(labels, 16):
        ids = pad([torch.tensor(rows[r][0]) for r in batch], 0).to(device)
        mask = pad([torch.ones(len(rows[r][0]), dtype=torch.long) for r in batch], 0).to(device)

        def reader(state: int, hidden_BTD: Tensor, batch: list[int] = batch) -> None:
            for place, row in enumerate(batch):
                if state in states:
                    states[state][row] = hidden_BTD[place, : len(labels[row])].clone()

        read_states(stack, input_ids=ids, attention_mask=mask, reader=reader)
    return Cached(labels=labels, states=states)


def upper_part(model: PreTrainedModel, cut: int) -> PreTrainedModel:
    """A copy of the model without the layers below `cut`; fed with `inputs_embeds`, the state that enters layer `cut`."""
    upper = copy.deepcopy(model)
    stack = find_stack(upper)
    parent_name, _, list_name = stack.layers_name.rpartition(".")
    setattr(upper.get_submodule(parent_name), list_name, nn.ModuleList(stack.layers[cut:]))
    upper.config.num_hidden_layers = len(stack.layers) - cut
    return upper


def run_batch(model: nn.Module, cached: Cached, cut: int, batch: list[int]) -> Tensor:
    """Summed cross-entropy over the labels of the batch; the unembedding is applied to the scored positions only."""
    stack = find_stack(model)
    device = next(model.parameters()).device
    states = pad([cached.states[cut][r] for r in batch], 0.0).to(device)
    mask = pad([torch.ones(len(cached.labels[r]), dtype=torch.long) for r in batch], 0).to(device)
    targets = pad([cached.labels[r] for r in batch], IGNORED).to(device)[:, 1:]
    hidden = stack.backbone(inputs_embeds=states, attention_mask=mask).last_hidden_state[:, :-1]
    logits = stack.head(hidden[targets != IGNORED]).float()
    return nn.functional.cross_entropy(logits, targets[targets != IGNORED], reduction="sum")


def scored(cached: Cached, batch: list[int]) -> int:
    return sum(int((cached.labels[r][1:] != IGNORED).sum()) for r in batch)


@torch.no_grad()
def heldout_loss(model: nn.Module, cached: Cached, cut: int) -> float:
    """Nats for each scored token, in bfloat16 autocast as in training, summed in float32."""
    model.eval()
    with torch.autocast(next(model.parameters()).device.type, torch.bfloat16):
        total = sum(float(run_batch(model, cached, cut, batch)) for batch in by_length(cached.labels, 16))
    return total / scored(cached, list(range(len(cached.labels))))


@torch.no_grad()
def check_upper_part(model: PreTrainedModel, rows: list[tuple[list[int], list[int]]], cached: Cached, cut: int) -> None:
    """The upper layers on cached states must give the logits' loss of the whole model on token ids, in float32."""
    batch = list(range(min(4, len(rows))))
    device = next(model.parameters()).device
    ids = pad([torch.tensor(rows[r][0]) for r in batch], 0).to(device)
    mask = pad([torch.ones(len(rows[r][0]), dtype=torch.long) for r in batch], 0).to(device)
    labels = pad([cached.labels[r] for r in batch], IGNORED).to(device)
    whole = float(model(input_ids=ids, attention_mask=mask, labels=labels).loss)
    upper = float(run_batch(upper_part(model, cut), cached, cut, batch)) / scored(cached, batch)
    if not math.isclose(whole, upper, rel_tol=1e-4):
        raise ValueError(f"layers {cut}.. on cached states give loss {upper:.5f}, the whole model {whole:.5f}: not equivalent")


def trainable(model: PreTrainedModel, *, kind: str, cut: int, seed: int) -> nn.Module:
    """The upper part with LoRA in all linear layers (of its first layer only for `single`), or with all layers unfrozen."""
    torch.manual_seed(seed)
    upper = upper_part(model, cut)
    if kind == "full":
        for parameter in upper.parameters():
            parameter.requires_grad_(False)
        for layer in find_stack(upper).layers:
            for parameter in layer.parameters():
                parameter.requires_grad_(True)
        return upper
    only = [0] if kind == "single" else None
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", layers_to_transform=only, task_type="CAUSAL_LM")
    if only:
        names = {name.rpartition(".")[2] for name, m in find_stack(upper).layers[0].named_modules() if isinstance(m, nn.Linear)}
        config.target_modules = names
    return get_peft_model(upper, config)


def finetune(
    model: PreTrainedModel, train: Cached, *, kind: str, cut: int, learning_rate: float, seed: int, steps: int, rows: int
) -> nn.Module:
    """AdamW, 5 % warm-up, cosine to zero, gradient norm 1, bfloat16 autocast; rows in an order that the seed draws."""
    student = trainable(model, kind=kind, cut=cut, seed=seed)
    device = next(student.parameters()).device
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < steps * rows:
        order += torch.randperm(len(train.labels), generator=generator).tolist()
    student.train()
    for step in range(steps):
        share = step / steps
        rate = learning_rate * min(1.0, (step + 1) / max(1, steps // 20)) * 0.5 * (1 + math.cos(math.pi * share))
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = order[step * rows : (step + 1) * rows]
        with torch.autocast(device.type, torch.bfloat16):
            loss = run_batch(student, train, cut, batch) / scored(train, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in student.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return student


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


def best_rate(rates: tuple[float, ...], losses: list[float]) -> float:
    """Vertex of the parabola through three points in log rate, as the nearest of: the best point, half a step beside it."""
    best = int(np.argmin(losses))
    logs = np.log(rates)
    second, first, _ = np.polyfit(logs, losses, 2)
    if second <= 0 or best in (0, len(rates) - 1):
        return float(rates[best])
    half = (logs[1] - logs[0]) / 2
    at = -first / (2 * second)
    return float(np.exp(min((logs[best] - half, logs[best], logs[best] + half), key=lambda point: abs(point - at))))


class Sweep:
    """All runs of one model on one task."""

    def __init__(self, name: str, task: str, *, model: PreTrainedModel, data: Rows, cuts: list[int], runs: Runs, steps: int, rows: int):
        self.name, self.task, self.model, self.runs, self.steps, self.rows = name, task, model, runs, steps, rows
        self.layers = find_stack(model).num_layers
        self.data, self.cuts = data, cuts
        self.tuned_on: Sweep | None = None  # take the rates of this sweep instead of tuning
        self._cached: tuple[Cached, Cached] | None = None

    def cached(self) -> tuple[Cached, Cached]:
        if self._cached is None:
            every = list(range(self.layers))
            self._cached = cache_states(self.model, self.data.train, every), cache_states(self.model, self.data.heldout, every)
            for cut in (0, self.layers // 2):
                check_upper_part(self.model, self.data.heldout, self._cached[1], cut)
            base = heldout_loss(self.model, self._cached[1], 0)
            run = {"kind": "base", "index": -1, "learning_rate": 0.0, "seed": 0, "steps": 0}
            run |= {"model": self.name, "task": self.task, "loss": round(base, 6), "seconds": 0.0}
            if self.runs.key(run) not in self.runs.done:
                self.runs.add(run)
        return self._cached

    def loss(self, kind: str, index: int, learning_rate: float, seed: int, steps: int | None = None) -> float:
        steps = steps or self.steps
        rate = float(f"{learning_rate:.3g}")
        run: dict[str, object] = {"model": self.name, "task": self.task, "kind": kind, "index": index}
        run |= {"learning_rate": rate, "seed": seed, "steps": steps}
        if (known := self.runs.done.get(self.runs.key(run))) is not None:
            return float(known["loss"])  # type: ignore[arg-type]
        train, heldout = self.cached()
        started = time.monotonic()
        student = finetune(
            self.model, train, kind=kind, cut=index, learning_rate=rate, seed=seed, steps=steps, rows=self.rows
        )
        seconds = time.monotonic() - started
        run |= {"loss": round(heldout_loss(student, heldout, index), 6), "seconds": round(seconds, 2)}
        self.runs.add(run)
        print(json.dumps(run), flush=True)
        return float(run["loss"])  # type: ignore[arg-type]

    def rates(self, kind: str = "cut") -> dict[int, float]:
        """Learning rate of every cut: tuned on the first, the middle and the last of the grid, interpolated between."""
        if self.tuned_on is not None:
            return self.tuned_on.rates(kind)
        tuned = [self.cuts[0], min(self.cuts, key=lambda cut: abs(cut - self.layers // 2)), self.cuts[-1]]
        best = [best_rate(RATES[kind], [self.loss(kind, cut, rate, 0) for rate in RATES[kind]]) for cut in tuned]
        return {cut: float(np.exp(np.interp(cut, tuned, np.log(best)))) for cut in range(self.layers)}

    def run_cuts(self, seed: int, kind: str = "cut") -> None:
        rates = self.rates(kind)
        for cut in self.cuts:
            self.loss(kind, cut, rates[cut], seed)

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


def load_model(name: str) -> tuple[PreTrainedModel, object]:
    """A folder that pretrain.py wrote, or any causal language model of the Hugging Face hub."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    model.config.use_cache = False
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), AutoTokenizer.from_pretrained(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True, help="folder or hub name; can be repeated")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--text", type=Path, help="the text that the models were pretrained on: its last documents are the near task")
    parser.add_argument("--gsm8k", type=Path)
    parser.add_argument("--roleplay", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("work/runs.jsonl"))
    parser.add_argument("--phases", nargs="+", default=["cuts:0"], help="cuts:SEED, single, full:MODEL/TASK, steps:CUT:STEPS:SEED")
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
                    sweep.run_cuts(int(rest))
                elif kind == "single":
                    sweep.run_single(list(range(sweep.layers)))
                elif kind == "full":
                    sweep.run_cuts(0, kind="full")
                elif kind == "steps":
                    cut, steps, seed = map(int, rest.split(":"))
                    sweep.loss("cut", cut, sweep.rates()[cut], seed, steps)
                else:
                    raise ValueError(f"got phase {phase!r}; allowed: cuts:SEED, single, full:MODEL/TASK, steps:CUT:STEPS:SEED")


if __name__ == "__main__":
    main()
