"""Fine-tunes the upper layers of a model on the cached output of the layers below the cut.

Layers below the cut are frozen, so their output is the same in every step and run: it is computed once for a model and
task, and every run starts from there. `check_upper_part` proves on a batch that this is the whole model's loss.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from axolotl_layersel.model.decoder_stack import find_stack
from axolotl_layersel.model.latent_states import read_states

IGNORED = -100
Row = tuple[list[int], list[int]]  # token ids, labels


def load_model(name: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, object]:
    """A folder that pretrain.py wrote, or any causal language model of the Hugging Face hub.

    Plain attention: for rows this short it is more than twice as fast on a CPU as the fused kernels.
    """
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, attn_implementation="eager")
    model.config.use_cache = False
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), AutoTokenizer.from_pretrained(name)


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
def cache_states(model: PreTrainedModel, rows: list[Row], cuts: list[int]) -> Cached:
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
    """A copy of the model without the layers below `cut`; `inputs_embeds` is the state that enters layer `cut`."""
    upper = copy.deepcopy(model)
    stack = find_stack(upper)
    parent_name, _, list_name = stack.layers_name.rpartition(".")
    setattr(upper.get_submodule(parent_name), list_name, nn.ModuleList(stack.layers[cut:]))
    upper.config.use_cache = False
    upper.config.num_hidden_layers = len(stack.layers) - cut
    if getattr(upper.config, "layer_types", None):  # sliding or full attention, which the backbone looks up by index
        upper.config.layer_types = upper.config.layer_types[cut:]
    return upper


def token_losses(model: nn.Module, cached: Cached, cut: int, batch: list[int]) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each scored position (N,) and its place in the batch (N,); only these are unembedded.

    Rows are padded on the right, so that a causal model needs no mask.
    """
    stack = find_stack(model)
    device = next(model.parameters()).device
    states = pad([cached.states[cut][r] for r in batch], 0.0).to(device)
    targets = pad([cached.labels[r] for r in batch], IGNORED).to(device)[:, 1:]
    hidden = stack.backbone(inputs_embeds=states).last_hidden_state[:, :-1]
    logits = stack.head(hidden[targets != IGNORED]).float()
    losses = nn.functional.cross_entropy(logits, targets[targets != IGNORED], reduction="none")
    return losses, (targets != IGNORED).nonzero()[:, 0]


def run_batch(model: nn.Module, cached: Cached, cut: int, batch: list[int]) -> Tensor:
    """Summed cross-entropy over the labels of the batch."""
    return token_losses(model, cached, cut, batch)[0].sum()


def precision(model: nn.Module) -> torch.dtype | None:
    """What training and losses are cast to: bfloat16 for weights in it, nothing for float32."""
    return torch.bfloat16 if find_stack(model).head.weight.dtype is torch.bfloat16 else None


def autocast(model: nn.Module) -> torch.autocast:
    """The precision of training and of losses."""
    dtype = precision(model)
    return torch.autocast(next(model.parameters()).device.type, dtype=dtype, enabled=dtype is not None)


def scored(cached: Cached, batch: list[int]) -> int:
    return sum(int((cached.labels[r][1:] != IGNORED).sum()) for r in batch)


@torch.no_grad()
def row_losses(model: nn.Module, cached: Cached, cut: int) -> list[float]:
    """Summed cross-entropy of each row in nats, in the precision of training."""
    model.eval()
    found = [0.0] * len(cached.labels)
    with autocast(model):
        for batch in by_length(cached.labels, 16):
            losses, row_N = token_losses(model, cached, cut, batch)
            sums = torch.zeros(len(batch), dtype=torch.float64).index_add_(0, row_N.cpu(), losses.double().cpu())
            for place, row in enumerate(batch):
                found[row] = float(sums[place])
    return found


def heldout_loss(model: nn.Module, cached: Cached, cut: int) -> float:
    """Nats for each scored token, in the precision of training, summed in float64."""
    return sum(row_losses(model, cached, cut)) / scored(cached, list(range(len(cached.labels))))


@torch.no_grad()
def check_upper_part(model: PreTrainedModel, rows: list[Row], cached: Cached, cut: int) -> None:
    """The upper layers on cached states must give the logits' loss of the whole model on token ids.

    The states come from batches of another width, which bfloat16 rounds otherwise; a wrong layer differs by far more.
    """
    batch = list(range(min(4, len(rows))))
    device = next(model.parameters()).device
    ids = pad([torch.tensor(rows[r][0]) for r in batch], 0).to(device)
    mask = pad([torch.ones(len(rows[r][0]), dtype=torch.long) for r in batch], 0).to(device)
    labels = pad([cached.labels[r] for r in batch], IGNORED).to(device)
    whole = float(model(input_ids=ids, attention_mask=mask, labels=labels).loss)
    upper = float(run_batch(upper_part(model, cut), cached, cut, batch)) / scored(cached, batch)
    if not math.isclose(whole, upper, rel_tol=1e-4 if next(model.parameters()).dtype == torch.float32 else 1e-2):
        raise ValueError(
            f"layers {cut}.. on cached states give loss {upper:.5f}, the whole model {whole:.5f}: not equivalent"
        )


def trainable(
    model: PreTrainedModel, *, kind: str, cut: int, seed: int, rank: int = 8, last: int | None = None
) -> nn.Module:
    """The upper part with LoRA in all linear layers of layers cut..last, or (`full`) with those layers unfrozen.

    Args:
        kind: `cut`, `single` (layer `cut` alone), `block` (layers cut..last) or `full`.
        last: the last layer that is trained, of the whole model; the model's last where not given.
    """
    torch.manual_seed(seed)
    upper = upper_part(model, cut)
    if kind == "full":
        for parameter in upper.parameters():
            parameter.requires_grad_(False)
        for layer in find_stack(upper).layers:
            layer.float()  # master weights; autocast rounds them to bfloat16 in every step
            for parameter in layer.parameters():
                parameter.requires_grad_(True)
        return upper
    last = cut if kind == "single" else last
    only = None if last is None else list(range(last - cut + 1))
    first = find_stack(upper).layers[0]
    linear = {name.rpartition(".")[2] for name, module in first.named_modules() if isinstance(module, nn.Linear)}
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=linear, layers_to_transform=only, task_type="CAUSAL_LM"
    )
    return get_peft_model(upper, config)


def finetune(
    student: nn.Module, train: Cached, *, cut: int, learning_rate: float, seed: int, steps: int, rows: int
) -> list[float]:
    """AdamW, 5 % warm-up, cosine to zero, gradient norm 1; rows in an order that the seed draws.

    Returns:
        The loss of every step's batch, before that step.
    """
    optimizer = torch.optim.AdamW(
        [p for p in student.parameters() if p.requires_grad], lr=learning_rate, weight_decay=0.0, fused=True
    )
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < steps * rows:
        order += torch.randperm(len(train.labels), generator=generator).tolist()
    student.train()
    losses = []
    for step in range(steps):
        share = step / steps
        rate = learning_rate * min(1.0, (step + 1) / max(1, steps // 20)) * 0.5 * (1 + math.cos(math.pi * share))
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = order[step * rows : (step + 1) * rows]
        with autocast(student):
            loss = run_batch(student, train, cut, batch) / scored(train, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in student.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses
