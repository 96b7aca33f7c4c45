"""Run by `test_processes.py` in two real processes: FSDP2 of torch itself, on the CPU, with a given cut.

accelerate uses FSDP on accelerators alone, so axolotl cannot shard on the CPU; the sharding here is what it calls.
Every process writes what it saw to `OUT/<rank>.json`.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from tiny import PROJECTIONS, tiny_llama, token_batch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from axolotl_layersel.model.decoder_stack import find_stack
from axolotl_layersel.training.backward_cut import stop_backward
from axolotl_layersel.training.first_step_check import FirstStepCheck
from axolotl_layersel.training.trainable_parameters import expected_trainable

LAYERS, CUT = 5, 3


def prepared(*, lora: bool) -> nn.Module:
    """As the plugin leaves a model before it is sharded: the cut applied, checkpointing on, the suffix trainable."""
    model = tiny_llama(num_layers=LAYERS)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    stop_backward(model, layers=find_stack(model).layers, first_trainable=CUT)
    if lora:
        suffix = list(range(CUT, LAYERS))
        torch.manual_seed(1)
        config = LoraConfig(r=2, target_modules=PROJECTIONS, layers_to_transform=suffix, init_lora_weights=False)
        return get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        inside = name.startswith(tuple(f"model.layers.{i}." for i in range(CUT, LAYERS)))
        parameter.requires_grad_(inside or name in ("model.norm.weight", "lm_head.weight"))
    return model


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Any]) -> float:
    """One step of training; the loss of this process."""
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss)


def case(*, lora: bool) -> dict[str, Any]:
    """Three steps of the sharded model and of the whole one, on the same batch, with the first step proved."""
    torch.manual_seed(0)
    whole = prepared(lora=lora)
    sharded = copy.deepcopy(whole)
    layers = find_stack(sharded).layers
    for layer in layers:
        fully_shard(layer)
    fully_shard(sharded)
    stack = find_stack(sharded)  # again, as a callback does at the start of training
    expected = expected_trainable(
        [name for name, _ in sharded.named_parameters()],
        stack,
        first_trainable=CUT,
        adapter="lora" if lora else None,
        train_norm_and_head=not lora,
    )
    frozen = {n: p.full_tensor().clone() for n, p in sharded.named_parameters() if not p.requires_grad}
    watched = FirstStepCheck(sharded, layers=stack.layers, first_trainable=CUT, expected_trainable=expected)
    batch = token_batch()
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (sharded, whole)]
    losses, reference = [], []
    for index in range(3):
        loss = sharded(**batch, use_cache=False).loss
        loss.backward()
        if index == 0:
            watched.check()
        optimizers[0].step()
        optimizers[0].zero_grad()
        losses.append(float(loss))
        reference.append(step(whole, optimizers[1], batch))
    after = dict(sharded.named_parameters())
    trained = {n: p for n, p in after.items() if p.requires_grad}
    whole_parameters = dict(whole.named_parameters())
    return {
        "losses": losses,
        "reference": reference,
        "sharded": all(isinstance(p, DTensor) for p in after.values()),
        "frozen_unchanged": all(torch.equal(after[n].full_tensor(), value) for n, value in frozen.items()),
        "frozen": len(frozen),
        "largest_difference": max(
            float((p.full_tensor() - whole_parameters[n]).detach().abs().max()) for n, p in trained.items()
        ),
        "expected_trained": sorted(trained) == sorted(expected),
        "gradients_below_the_cut": [n for n in frozen if after[n].grad is not None],
    }


def main() -> None:
    """Both modes."""
    dist.init_process_group("gloo")
    seen = {"lora": case(lora=True), "full": case(lora=False)}
    (Path(sys.argv[1]) / f"{dist.get_rank()}.json").write_text(json.dumps(seen), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
