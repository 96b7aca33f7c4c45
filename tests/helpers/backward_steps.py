"""One training step of a tiny model, watched: what it saved, what it recomputed, which gradients it made."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import prepare_model_for_kbit_training
from tiny import add_lora, tiny_llama, tiny_llama_4bit, token_batch, train_only
from torch import Tensor, nn

from axolotl_layersel.model.decoder_stack import find_stack, unwrap
from axolotl_layersel.model.parameter_names import normalise
from axolotl_layersel.training.backward_cut import stop_backward
from axolotl_layersel.training.first_step_check import FirstStepCheck

NUM_LAYERS, CUT = 6, 4
MODES = ["lora", "qlora", "full"]
CHECKPOINTING: dict[str, dict[str, Any] | None] = {
    "none": None,
    "non-reentrant": {"use_reentrant": False},
    "reentrant": {"use_reentrant": True},
}
IN_SUFFIX = tuple(f"model.layers.{index}." for index in range(CUT, NUM_LAYERS))


def in_suffix(name: str) -> bool:
    return name.startswith((*IN_SUFFIX, "model.norm.", "lm_head."))


def build(mode: str, folder: Path, *, checkpointing: str, stop: bool, reentrant: bool | None = None) -> Any:
    """One model, in the order of an axolotl run; every later call that switches input gradients on is made, too."""
    kwargs = CHECKPOINTING[checkpointing]
    model = tiny_llama_4bit(folder) if mode == "qlora" else tiny_llama()
    if mode == "qlora":
        prepare_model_for_kbit_training(model, kwargs is not None, dict(kwargs or {}))
    if kwargs is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    model.enable_input_require_grads()
    if stop:
        chosen = checkpointing == "reentrant" if reentrant is None else reentrant
        stop_backward(model, layers=find_stack(model).layers, first_trainable=CUT, reentrant=chosen)
    if mode == "full":
        train_only(model, in_suffix)
    else:
        model = add_lora(model, first_trainable=CUT)
    model.enable_input_require_grads()
    if kwargs is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    return model


@dataclass
class Step:
    """What one forward and backward pass did."""

    gradients: dict[str, Tensor] = field(default_factory=dict)
    saved_below: int = 0  # tensors saved for backward before the first trained layer started
    saved_bytes: int = 0  # of activations, each storage once
    with_history: list[str] = field(default_factory=list)  # modules before the cut whose output had a grad_fn
    recomputed: list[int] = field(default_factory=list)  # layers that ran again during backward


def take_step(model: Any, *, run: Any = None, batch: dict[str, Tensor] | None = None) -> Step:
    step, phase = Step(), "below"
    stack = find_stack(model)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: set[int] = set()

    def note_history(name: str, _module: nn.Module, _args: Any, output: Any) -> None:
        tensor = output if isinstance(output, Tensor) else output[0]
        if tensor.grad_fn is not None:
            step.with_history.append(name)

    def note_forward(index: int, _module: nn.Module, _args: Any) -> None:
        if phase == "backward":
            step.recomputed.append(index)

    def cross(_module: nn.Module, _args: Any, _output: Any) -> None:
        nonlocal phase
        if phase == "below":
            phase = "above"

    def pack(tensor: Tensor) -> Tensor:
        step.saved_below += phase == "below"
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights | seen:
            seen.add(storage.data_ptr())
            step.saved_bytes += storage.nbytes()
        return tensor

    handles = [stack.embeddings.register_forward_hook(partial(note_history, "embeddings"))]
    for index, layer in enumerate(stack.layers):
        handles.append(unwrap(layer).register_forward_pre_hook(partial(note_forward, index)))
        if index < CUT:
            handles.append(layer.register_forward_hook(partial(note_history, f"layer {index}")))
    handles.append(stack.layers[CUT - 1].register_forward_hook(cross))
    torch.manual_seed(3)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = (run or model)(**(batch or token_batch()), use_cache=False).loss
    phase = "backward"
    loss.backward()
    for handle in handles:
        handle.remove()
    step.gradients = {normalise(n): p.grad for n, p in model.named_parameters() if p.grad is not None}
    return step


def assert_stopped(step: Step) -> None:
    assert step.with_history == []
    assert step.saved_below == 0
    assert all(index >= CUT for index in step.recomputed)


def assert_same_gradients(ours: Step, stock: Step) -> None:
    assert ours.gradients.keys() == stock.gradients.keys()
    assert len(ours.gradients) >= 2
    different = [name for name, gradient in ours.gradients.items() if not torch.equal(gradient, stock.gradients[name])]
    assert different == []


def watched_step(model: Any, *, first_trainable: int = CUT) -> FirstStepCheck:
    expected = [name for name, p in model.named_parameters() if p.requires_grad]
    layers = find_stack(model).layers
    return FirstStepCheck(model, layers=layers, first_trainable=first_trainable, expected_trainable=expected)
