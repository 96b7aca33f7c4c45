"""The first step proves where the backward pass stops, and notices when it does not."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from backward_steps import (
    CHECKPOINTING,
    CUT,
    MODES,
    build,
    in_suffix,
    watched_step,
)
from tiny import tiny_llama, token_batch, train_only
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers.modeling_layers import GradientCheckpointingLayer

from axolotl_layersel.model.parameter_names import normalise
from axolotl_layersel.training.backward_cut import (
    BackwardCutError,
)
from axolotl_layersel.training.first_step_check import FirstStepCheck, check_trainable


def test_names_are_the_same_under_every_wrapper(tmp_path: Path) -> None:
    assert normalise("module._orig_mod.model.layers.2._checkpoint_wrapped_module.mlp.w") == "model.layers.2.mlp.w"
    assert normalise("_fsdp_wrapped_module.module.lm_head.weight") == "lm_head.weight"
    assert normalise("module") == "module"
    model = build("full", tmp_path, checkpointing="none", stop=True)
    expected = [name for name, p in model.named_parameters() if p.requires_grad]
    apply_activation_checkpointing(model, auto_wrap_policy=ModuleWrapPolicy({GradientCheckpointingLayer}))
    check_trainable(nn.Sequential().append(torch.compile(model))[0], expected=expected)


def test_other_trainable_parameters_than_planned_are_listed() -> None:
    model = tiny_llama()
    train_only(model, lambda name: in_suffix(name) and "norm" not in name)
    expected = [name for name, _ in model.named_parameters() if in_suffix(name)]
    with pytest.raises(
        BackwardCutError, match=r"missing, 5: model\.layers\.4\.input_layernorm\.weight, .*; unexpected, 0"
    ):
        check_trainable(model, expected=expected)
    with pytest.raises(BackwardCutError, match=r"unexpected, 14: .*, and 4 more"):
        check_trainable(model, expected=["lm_head.weight"])
    with pytest.raises(BackwardCutError, match="the plan trains no parameter at all"):
        check_trainable(model, expected=[])


@pytest.fixture
def full_model(tmp_path: Path) -> Iterator[Any]:
    yield build("full", tmp_path, checkpointing="none", stop=True)


def hooks_of(model: nn.Module) -> list[Any]:
    on_modules = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    return on_modules + [p for p in model.parameters() if p._backward_hooks]


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("mode", MODES)
def test_the_proof_passes_a_stopped_run_and_leaves_no_hook(mode: str, checkpointing: str, tmp_path: Path) -> None:
    model = build(mode, tmp_path, checkpointing=checkpointing, stop=True)
    before = hooks_of(model)
    watched = watched_step(model)
    with torch.no_grad():
        model(**token_batch())  # an evaluation before the first step is no evidence and no counter-evidence
    model(**token_batch()).loss.backward()
    assert watched.check() == []
    assert hooks_of(model) == before


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("mode", MODES)
def test_the_proof_notices_input_gradients(mode: str, checkpointing: str, tmp_path: Path) -> None:
    model = build(mode, tmp_path, checkpointing=checkpointing, stop=False)
    before = hooks_of(model)
    watched = watched_step(model)
    model(**token_batch()).loss.backward()
    name = r"model\.layers\.3\) needs gradient, so the backward pass does not stop at the cut 4"
    with pytest.raises(BackwardCutError, match=rf"frozen decoder layer 3 \(.*{name}"):
        watched.check()
    assert hooks_of(model) == before


def test_the_proof_takes_only_the_leaf_of_the_boundary(tmp_path: Path) -> None:
    model = build("full", tmp_path, checkpointing="reentrant", stop=True)
    model.model.layers[CUT - 1].register_forward_hook(lambda _module, _args, output: output * 1)
    watched = watched_step(model)
    model(**token_batch()).loss.backward()
    with pytest.raises(BackwardCutError, match="needs gradient, so the backward pass does not stop at the cut 4"):
        watched.check()


def test_the_proof_names_a_module_that_ran_without_gradient(full_model: Any) -> None:
    full_model.model.layers[5].mlp.register_forward_hook(lambda _module, _args, output: output.detach())
    watched = watched_step(full_model)
    full_model(**token_batch()).loss.backward()
    expected = "ran in the first step but got no gradient: .*layers.5.mlp.down_proj, .*gate_proj, .*up_proj"
    with pytest.raises(BackwardCutError, match=expected):
        watched.check()


class OneOfFour(nn.Module):
    """A mixture of experts whose router sends every token to expert 2."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.experts = nn.ModuleList(copy.deepcopy(mlp) for _ in range(4))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.experts[2](hidden)


def test_the_proof_allows_experts_that_no_token_was_routed_to(full_model: Any) -> None:
    layer = full_model.model.layers[5]
    layer.mlp = OneOfFour(layer.mlp)
    watched = watched_step(full_model)
    full_model(**token_batch()).loss.backward()
    without = watched.check()
    assert len(without) == 9
    assert {name.split(".")[5] for name in without} == {"0", "1", "3"}


class FusedAway(nn.Module):
    """Reads the weights of its layer without running the modules that own them, and outside of autograd."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.inner = layer

    def forward(self, hidden: Tensor, **_: Any) -> Tensor:
        return hidden + (hidden @ self.inner.self_attn.q_proj.weight.T).detach()


def test_the_proof_notices_a_fused_layer_that_trains_nothing(full_model: Any) -> None:
    full_model.model.layers[4] = FusedAway(full_model.model.layers[4])
    watched = watched_step(full_model)
    full_model(**token_batch()).loss.backward()
    with pytest.raises(BackwardCutError, match="decoder layer 4 ran in the first step, but none of its 9 trained"):
        watched.check()


def test_the_proof_needs_a_step(full_model: Any) -> None:
    watched = watched_step(full_model)
    with torch.no_grad():
        full_model(**token_batch())
    with pytest.raises(BackwardCutError, match=r"layer 3 \(model\.layers\.3\) did not run with gradients on"):
        watched.check()
    watched = watched_step(full_model, first_trainable=0)
    with pytest.raises(BackwardCutError, match="decoder layer 4 ran in the first step, but none of its 9 trained"):
        watched.check()
    train_only(full_model, lambda name: name == "lm_head.weight")
    watched = watched_step(full_model, first_trainable=0)
    with pytest.raises(
        BackwardCutError, match=r"no trained parameter got a gradient in the first step: lm_head\.weight"
    ):
        watched.check()
    train_only(full_model, in_suffix)
    watched = watched_step(full_model)
    watched.detach()
    assert hooks_of(full_model) == []


def test_with_a_cut_at_zero_only_gradients_are_proved() -> None:
    model = tiny_llama()
    model.enable_input_require_grads()
    watched = watched_step(model, first_trainable=0)
    model(**token_batch()).loss.backward()
    assert watched.check() == []


def test_the_proof_starts_only_from_the_planned_parameters(full_model: Any) -> None:
    layers = full_model.model.layers
    with pytest.raises(BackwardCutError, match="the trainable parameters are not those of the plan; missing, 0: none"):
        FirstStepCheck(full_model, layers=layers, first_trainable=CUT, expected_trainable=["lm_head.weight"])
    assert hooks_of(full_model) == []


def test_the_proof_watches_the_layers_of_its_own_model(full_model: Any) -> None:
    expected = [name for name, p in full_model.named_parameters() if p.requires_grad]
    layers = copy.deepcopy(full_model).model.layers
    with pytest.raises(BackwardCutError, match="decoder layers to watch are not part of the model"):
        FirstStepCheck(full_model, layers=layers, first_trainable=CUT, expected_trainable=expected)
