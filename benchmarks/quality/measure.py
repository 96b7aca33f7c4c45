"""What can be measured before training on a real model: deviations of every state and row, gradients of every layer,
and what the plugin itself makes of a sample of rows.

Forward-only signals come from one pass in the precision of training over the calibration rows; sums are kept for each
row. The gradients come from one backward pass through fresh adapters over the same rows: at initialisation only LoRA's
B has one, and its L1 norm is what Adam's first step gains.
"""

import copy
import random
import time
from dataclasses import asdict

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from students import Row, autocast, by_length, pad, precision
from torch import Tensor
from transformers import PreTrainedModel

from axolotl_layersel.method import calibration
from axolotl_layersel.method.label_semantics import semantic_bases
from axolotl_layersel.method.pilot import PilotSettings
from axolotl_layersel.method.score_layers import score_layers
from axolotl_layersel.method.transition import cosine_deviation
from axolotl_layersel.model.decoder_stack import find_stack
from axolotl_layersel.model.latent_states import read_states


def measure_signals(model: PreTrainedModel, rows: list[Row]) -> dict[str, object]:
    """Sums over the scored positions of each row: name -> one list of L + 1 states (or L layers) for each row."""
    started = time.monotonic()
    found = forward_signals(model, rows)
    forward = time.monotonic() - started
    started = time.monotonic()
    gradients = gradient_signals(model, rows)
    seconds = {"forward": round(forward, 1), "gradient": round(time.monotonic() - started, 1)}
    return {"rows": found, "layers": gradients, "signal_seconds": seconds}


@torch.no_grad()
def forward_signals(model: PreTrainedModel, rows: list[Row]) -> dict[str, list[list[float]]]:
    stack = find_stack(model)
    layers, device = stack.num_layers, next(model.parameters()).device
    weight_VD = stack.head.weight.detach()
    bases, norm = semantic_bases(weight_VD.float()), copy.deepcopy(stack.final_norm).float()
    model.eval()
    labels = [torch.tensor(label) for _, label in rows]
    columns = {"cosine": layers + 1, "logit_lens": layers + 1, "top1": layers + 1, "turned": layers}
    sums = {name: torch.zeros(len(rows), width, dtype=torch.float64) for name, width in columns.items()}
    sums["tokens"] = torch.zeros(len(rows), 1, dtype=torch.float64)
    for batch in by_length(labels, 16):
        ids = pad([torch.tensor(rows[r][0]) for r in batch], 0).to(device)
        mask = pad([torch.ones(len(rows[r][0]), dtype=torch.long) for r in batch], 0).to(device)
        targets = F.pad(pad([labels[r] for r in batch], -100), (0, 1), value=-100)[:, 1:].to(device)
        scored = targets != -100
        labels_N, row_N = targets[scored], torch.tensor(batch)[scored.nonzero()[:, 0].cpu()]
        bases_ND = bases.of(labels_N)
        before: list[Tensor] = []

        def add(name: str, column: int, value_N: Tensor, row_N: Tensor = row_N) -> None:
            sums[name][:, column].index_add_(0, row_N, value_N.double().cpu())

        def reader(
            state: int, hidden_BTD: Tensor, scored: Tensor = scored, labels_N: Tensor = labels_N,
            bases_ND: Tensor = bases_ND, before: list[Tensor] = before, add=add,
        ) -> None:  # fmt: skip
            h_ND = hidden_BTD[scored].float()
            r_ND = norm(h_ND)
            logits_NV = F.linear(r_ND.to(weight_VD.dtype), weight_VD).float()
            add("logit_lens", state, F.cross_entropy(logits_NV, labels_N, reduction="none"))
            add("top1", state, logits_NV.argmax(-1) == labels_N)
            add("cosine", state, cosine_deviation(r_ND, bases_ND))
            if before:
                add("turned", state - 1, 1 - F.cosine_similarity(before.pop(), h_ND, dim=-1))
            before.append(h_ND)

        add("tokens", 0, torch.ones(len(row_N)))
        with autocast(model):
            read_states(stack, input_ids=ids, attention_mask=mask, reader=reader)
    return {name: [[float(f"{x:.5g}") for x in row] for row in table.tolist()] for name, table in sums.items()}


def gradient_signals(model: PreTrainedModel, rows: list[Row]) -> dict[str, list[float]]:
    """Norms of the gradient of every layer's LoRA B at initialisation, from the mean loss over all rows."""
    torch.manual_seed(0)
    student = get_peft_model(
        copy.deepcopy(model), LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    stack, device = find_stack(student), next(model.parameters()).device
    labels = [torch.tensor(label) for _, label in rows]
    total = sum(int((label[1:] != -100).sum()) for label in labels)
    for batch in by_length(labels, 8):
        ids = pad([torch.tensor(rows[r][0]) for r in batch], 0).to(device)
        targets = pad([labels[r] for r in batch], -100).to(device)[:, 1:]
        with autocast(student):
            hidden = stack.backbone(input_ids=ids).last_hidden_state[:, :-1][targets != -100]
            logits = stack.head(hidden).float()
        (F.cross_entropy(logits, targets[targets != -100], reduction="sum") / total).backward()
    found: dict[str, list[float]] = {"gradient": [], "gradient_l1": []}
    for layer in stack.layers:
        grads = [p.grad.double() for p in layer.parameters() if p.grad is not None]
        found["gradient"].append(sum(float(g.pow(2).sum()) for g in grads) ** 0.5)
        found["gradient_l1"].append(sum(float(g.abs().sum()) for g in grads))
    return {name: [float(f"{x:.5g}") for x in values] for name, values in found.items()}


def choose(
    model: PreTrainedModel, train: list[Row], *, rows: int, steps: int, rows_per_step: int, seed: int
) -> dict[str, object]:
    """Scores as the plugin stores them, from a sample of rows, with the pilot that a run of so many steps pays for."""
    drawn = [calibration.Row(tuple(ids), tuple(labels)) for ids, labels in random.Random(seed).sample(train, rows)]
    length = sum(len(row.input_ids) for row in drawn) / len(drawn)
    pilot = PilotSettings(
        run_tokens=steps * rows_per_step * length, required=True, say=lambda text: print(text, flush=True)
    )
    found, seconds = {}, {}
    for name, settings in (("forward", None), ("pilot", pilot)):
        started = time.process_time()
        scored = score_layers(model, drawn, pilot=settings, seed=seed, autocast=precision(model))
        seconds[name] = round(time.process_time() - started, 1)
        found[name] = asdict(scored.scores)
    return {"scores": found, "cpu_seconds": seconds}
