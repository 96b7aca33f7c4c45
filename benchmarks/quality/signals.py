"""What can be measured before training: our deviations, scalars that might set the exponent, and the rivals' signals.

Everything forward-only comes from one pass over the rows that the fine-tuning will see; sums are kept for each row, so
that any smaller sample and any bootstrap can be computed from the file. The rivals' signals need what they need:
gradient norms one backward pass, Spectrum's signal-to-noise ratio the weights alone.
"""

import argparse
import copy
import json
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from pretrain import read_documents, split_documents
from students import by_length, load_model, pad
from tasks import TASKS, build_task
from torch import Tensor, nn
from transformers import PreTrainedModel

from axolotl_layersel.method.label_semantics import semantic_bases
from axolotl_layersel.method.transition import (
    cosine_deviation,
    factual_transition,
    logit_lens_loss,
    transition_deviation,
    transition_miss,
    virtual_transition,
)
from axolotl_layersel.model.decoder_stack import find_stack
from axolotl_layersel.model.latent_states import read_states

Row = tuple[list[int], list[int]]
SMOOTHING = (100.0, 1000.0, 3000.0, 10000.0)  # pseudo-counts of the model's own marginal


class RowSums:
    """Named sums over the scored tokens of each row: name -> (R, columns) float64."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, column: int, columns: int, row_N: Tensor, value_N: Tensor) -> None:
        table = self.sums.setdefault(name, torch.zeros(self.rows, columns, dtype=torch.float64))
        table[:, column].index_add_(0, row_N, value_N.double().cpu())


@torch.no_grad()
def forward_signals(model: PreTrainedModel, rows: list[Row]) -> RowSums:
    """Deviations of every latent state, with and without the final norm, and how much each layer turns the stream."""
    stack = find_stack(model)
    layers, device = stack.num_layers, next(model.parameters()).device
    weight_VD = stack.head.weight.detach().float()
    bases = semantic_bases(weight_VD)
    norm = copy.deepcopy(stack.final_norm).float()
    sums = RowSums(len(rows))
    labels = [torch.tensor(label) for _, label in rows]
    for batch in by_length(labels, 16):
        ids = pad([torch.tensor(rows[r][0]) for r in batch], 0).to(device)
        mask = pad([torch.ones(len(rows[r][0]), dtype=torch.long) for r in batch], 0).to(device)
        targets = F.pad(pad([labels[r] for r in batch], -100), (0, 1), value=-100)[:, 1:].to(device)
        scored = targets != -100
        labels_N, row_N = targets[scored], torch.tensor(batch)[scored.nonzero()[:, 0].cpu()]
        bases_ND = bases.of(labels_N)
        seen: list[Tensor] = []

        def reader(state: int, hidden_BTD: Tensor, scored: Tensor = scored, seen: list[Tensor] = seen) -> None:
            seen.append(hidden_BTD[scored].float())

        read_states(stack, input_ids=ids, attention_mask=mask, reader=reader)
        normed = [norm(h_ND) for h_ND in seen]
        sums.add("tokens", 0, 1, row_N, torch.ones(len(row_N)))
        for state in range(layers + 1):
            r_ND, h_ND = normed[state], seen[state]
            lens = logit_lens_loss(r_ND, labels_N, weight_VD)
            for name, value in (
                ("cosine", cosine_deviation(r_ND, bases_ND)),
                ("cosine_without_norm", cosine_deviation(h_ND, bases_ND)),
                ("logit_lens", lens),
            ):
                sums.add(name, state, layers + 1, row_N, value)
            if state == layers:
                break
            for suffix, here, there in (("", r_ND, normed[state + 1]), ("_without_norm", h_ND, seen[state + 1])):
                factual, virtual = factual_transition(here, there), virtual_transition(here, bases_ND)
                sums.add("miss" + suffix, state, layers, row_N, transition_miss(factual, virtual))
                sums.add("turn" + suffix, state, layers, row_N, transition_deviation(factual, virtual))
                sums.add("length" + suffix, state, layers, row_N, factual.norm(dim=-1) / here.norm(dim=-1))
            influence = 1 - F.cosine_similarity(h_ND, seen[state + 1], dim=-1)
            sums.add("block_influence", state, layers, row_N, influence)
    return sums


@torch.no_grad()
def marginal_shift(model: PreTrainedModel, rows: list[Row]) -> dict[str, object]:
    """How much of the loss one bias on the logits would remove: fitted on even rows, measured on odd rows.

    The bias moves the mean predicted distribution p to the (smoothed) distribution of the labels: log(q / p) with
    q = (counts + m p) / (n + m). A task that is mostly a change of format or vocabulary has a large share.
    """
    device = next(model.parameters()).device
    labels = [torch.tensor(label) for _, label in rows]
    size = model.get_output_embeddings().weight.shape[0]
    mean_V, counts_V = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    log_probabilities: list[Tensor] = []
    answers: list[Tensor] = []
    for half in (0, 1):
        chosen = [r for r in range(len(rows)) if r % 2 == half]
        for batch in by_length([labels[r] for r in chosen], 16):
            batch = [chosen[r] for r in batch]
            ids = pad([torch.tensor(rows[r][0]) for r in batch], 0).to(device)
            mask = pad([torch.ones(len(rows[r][0]), dtype=torch.long) for r in batch], 0).to(device)
            targets = F.pad(pad([labels[r] for r in batch], -100), (0, 1), value=-100)[:, 1:]
            scored = targets != -100
            logits_NV = model(input_ids=ids, attention_mask=mask).logits.float().cpu()[scored].log_softmax(-1)
            if half == 0:
                mean_V += logits_NV.exp().double().sum(0)
                counts_V += torch.bincount(targets[scored], minlength=size).double()
            else:
                log_probabilities.append(logits_NV)
                answers.append(targets[scored])
    logits_NV, answer_N = torch.cat(log_probabilities), torch.cat(answers)
    total = counts_V.sum()
    own_V = mean_V / mean_V.sum()
    base = float(F.cross_entropy(logits_NV, answer_N))
    losses = {}
    for pseudo in SMOOTHING:
        wanted_V = (counts_V + pseudo * own_V) / (total + pseudo)
        bias_V = (wanted_V / own_V.clamp(min=1e-12)).log().float()
        losses[str(int(pseudo))] = float(F.cross_entropy(logits_NV + bias_V, answer_N))
    wanted_V = (counts_V + 100 * own_V) / (total + 100)
    divergence = float((wanted_V * (wanted_V / own_V.clamp(min=1e-12)).clamp(min=1e-12).log()).sum())
    entropy = float(-(logits_NV.exp() * logits_NV).sum(-1).mean())
    unigram = float(-wanted_V.log()[answer_N].mean())
    return {"loss": base, "shifted": losses, "divergence": divergence, "entropy": entropy, "unigram": unigram}


def gradient_signals(model: PreTrainedModel, rows: list[Row]) -> dict[str, list[float]]:
    """Gradient norm of every layer's matrices from one backward pass, absolute and relative to the weight norm."""
    device = next(model.parameters()).device
    labels = [torch.tensor(label) for _, label in rows]
    total = sum(int((label[1:] != -100).sum()) for label in labels)
    model.zero_grad()
    for batch in by_length(labels, 8):
        ids = pad([torch.tensor(rows[r][0]) for r in batch], 0).to(device)
        mask = pad([torch.ones(len(rows[r][0]), dtype=torch.long) for r in batch], 0).to(device)
        targets = F.pad(pad([labels[r] for r in batch], -100), (0, 1), value=-100)[:, 1:].to(device)
        logits = model(input_ids=ids, attention_mask=mask).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum") / total
        loss.backward()
    found: dict[str, list[float]] = {"gradient": [], "relative_gradient": []}
    for layer in find_stack(model).layers:
        matrices = [m.weight for m in layer.modules() if isinstance(m, nn.Linear)]
        gradient = sum(float(w.grad.double().pow(2).sum()) for w in matrices) ** 0.5
        size = sum(float(w.detach().double().pow(2).sum()) for w in matrices) ** 0.5
        found["gradient"].append(gradient)
        found["relative_gradient"].append(gradient / size)
    model.zero_grad()
    return found


@torch.no_grad()
def weight_signals(model: PreTrainedModel) -> dict[str, list[float]]:
    """Spectrum's signal-to-noise ratio: singular values above the Marchenko-Pastur edge against the rest."""
    ratios = []
    for layer in find_stack(model).layers:
        values = []
        for matrix in (m.weight.double() for m in layer.modules() if isinstance(m, nn.Linear)):
            singular = torch.linalg.svdvals(matrix)
            quartiles = torch.quantile(singular, torch.tensor([0.25, 0.75], dtype=torch.float64))
            sigma = (quartiles[1] - quartiles[0]) / 1.349
            rows, columns = matrix.shape
            edge = sigma * (1 + (min(rows, columns) / max(rows, columns)) ** 0.5) * 1.0
            signal, noise = singular[singular > edge].sum(), singular[singular <= edge].sum()
            values.append(float(signal / noise.clamp(min=1e-9) / singular.max()))
        ratios.append(float(np.mean(values)))
    return {"spectrum": ratios}


@torch.no_grad()
def similarity_signals(model: PreTrainedModel, rows: list[Row]) -> dict[str, list[float]]:
    """1 - linear CKA between what enters and what leaves each layer, over the scored positions."""
    stack = find_stack(model)
    device = next(model.parameters()).device
    kept: dict[int, list[Tensor]] = {}
    for ids, label in rows:
        scored = torch.tensor(label)[1:] != -100

        def reader(state: int, hidden_BTD: Tensor, scored: Tensor = scored) -> None:
            kept.setdefault(state, []).append(hidden_BTD[0, :-1][scored].double().cpu())

        read_states(
            stack,
            input_ids=torch.tensor([ids]).to(device),
            attention_mask=torch.ones(1, len(ids)).long().to(device),
            reader=reader,
        )
    states = [torch.cat(kept[s]) for s in range(stack.num_layers + 1)]
    states = [s - s.mean(0) for s in states]
    found = []
    for x, y in pairwise(states):
        found.append(1 - float((x.T @ y).pow(2).sum() / ((x.T @ x).norm() * (y.T @ y).norm())))
    return {"cka": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--text", type=Path)
    parser.add_argument("--gsm8k", type=Path)
    parser.add_argument("--roleplay", type=Path)
    parser.add_argument("--output", type=Path, default=Path("work/signals"))
    parser.add_argument("--train-rows", type=int, default=240)
    parser.add_argument("--heldout-rows", type=int, default=80)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--sample", type=int, default=128, help="rows of the scalars and of the similarity signal")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    for name in args.model:
        for task in args.tasks:
            file = args.output / f"{Path(name).name}-{task}.json"
            if file.exists():
                continue
            model, tokenizer = load_model(name)
            model.eval()
            data = build_task(
                task,
                tokenizer=tokenizer,
                paths={"gsm8k": args.gsm8k, "roleplay": args.roleplay},
                heldout_documents=lambda: split_documents(read_documents(args.text))[1],
                train_rows=args.train_rows,
                heldout_rows=args.heldout_rows,
                max_length=args.max_length,
            )
            seconds = {}
            started = time.monotonic()
            sums = forward_signals(model, data.train)
            seconds["forward"] = time.monotonic() - started
            sample = data.train[: args.sample]
            found: dict[str, object] = {"model": Path(name).name, "task": task}
            found["marginal"] = marginal_shift(model, sample)
            started = time.monotonic()
            layers = gradient_signals(model, sample[:16])
            layers |= {f"{key}_{args.sample}": value for key, value in gradient_signals(model, sample).items()}
            seconds["gradient"] = time.monotonic() - started
            layers |= weight_signals(model) | similarity_signals(model, sample)
            found |= {"layers": layers, "seconds": seconds}
            found["rows"] = {
                key: [[float(f"{x:.6g}") for x in row] for row in value.tolist()] for key, value in sums.sums.items()
            }
            file.write_text(json.dumps(found) + "\n", encoding="utf-8")
            print(file, flush=True)


if __name__ == "__main__":
    main()
