"""axolotl's LoRA kernels and tiled MLPs: the plan, the gradients and the end of the backward pass are as without them.

On the CPU: the attention kernels are plain torch, the MLP kernels run in Triton's interpreter. The reference is always
the same model without them, as stock axolotl back-propagates through it.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from axolotl.cli.config import load_cfg
from axolotl.integrations.base import PluginManager
from axolotl.kernels import lora, swiglu
from axolotl.monkeypatch import lora_kernels
from axolotl.monkeypatch.tiled_mlp import patch_tiled_mlp
from axolotl.train import train as axolotl_train
from axolotl.utils.dict import DictDefault
from axolotl_runs import environment, plan_of, write_config
from backward_steps import CHECKPOINTING, CUT, NUM_LAYERS, Step, assert_stopped, in_suffix, take_step
from peft import LoraConfig
from safetensors.torch import load_file
from tiny import PROJECTIONS, add_lora, tiny_llama, token_batch, train_only
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

import axolotl_layersel._startup  # noqa: F401  # the alias, where the package is not installed
from axolotl_layersel.config.conflicts import find_notes
from axolotl_layersel.cost.cut_cost import Mode, StepShape, cut_costs
from axolotl_layersel.integration.runnable_model import ready_to_run
from axolotl_layersel.model.adapted_modules import adapted_modules
from axolotl_layersel.model.decoder_stack import find_stack
from axolotl_layersel.model.parameter_names import normalise
from axolotl_layersel.training.backward_cut import restore_backward, stop_backward, tiled_input
from axolotl_layersel.training.first_step_check import FirstStepCheck

MLP = ["gate_proj", "up_proj", "down_proj"]
TARGETS = {"MLP": MLP, "MLP and attention": ["q_proj", "down_proj"], "full": None}
ATTENTION_KERNELS = {"lora_qkv_kernel": True, "lora_o_kernel": True}
TILED = {"tiled_mlp": True, "tiled_mlp_num_shards": 3}
DEEPSPEED = "deepspeed.runtime.sequence_parallel.ulysses_sp"


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what axolotl leaves in this process: rewritten classes of transformers, plugins.

    axolotl imports DeepSpeed's tiled MLP too, and takes it only where DeepSpeed trains, so an empty module will do.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    if DEEPSPEED not in sys.modules:
        stand_in = ModuleType(DEEPSPEED)
        vars(stand_in)["TiledMLP"] = None
        monkeypatch.setitem(sys.modules, DEEPSPEED, stand_in)
    before = {cls: dict(vars(cls)) for cls in (LlamaAttention, LlamaMLP)}
    PluginManager.get_instance().plugins.clear()
    yield
    PluginManager.get_instance().plugins.clear()
    for cls, attributes in before.items():
        for name in set(vars(cls)) - set(attributes):
            delattr(cls, name)
        cls.forward = attributes["forward"]
    torch.set_num_threads(threads)


def build(targets: list[str] | None, *, checkpointing: str, stop: bool) -> Any:
    """Adapters on `targets` of layers CUT.., or None for full fine-tuning; hooks and calls as in an axolotl run."""
    kwargs, model = CHECKPOINTING[checkpointing], tiny_llama()
    model.enable_input_require_grads()
    if stop:
        layers = find_stack(model).layers
        stop_backward(model, layers=layers, first_trainable=CUT, reentrant=checkpointing == "reentrant")
    if targets is None:
        train_only(model, in_suffix)
    else:
        model = add_lora(model, first_trainable=CUT, target_modules=targets)
    model.enable_input_require_grads()
    if kwargs is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    return model


def proved_step(model: Any, *, batch: dict[str, Tensor] | None = None) -> Step:
    """A step that the proof of every run has watched."""
    names = [normalise(name) for name, p in model.named_parameters() if p.requires_grad]
    watched = FirstStepCheck(model, layers=find_stack(model).layers, first_trainable=CUT, expected_trainable=names)
    step = take_step(model, batch=batch)
    assert watched.check() == []
    return step


def assert_close(ours: Step, stock: Step) -> None:
    assert ours.gradients.keys() == stock.gradients.keys()
    assert len(ours.gradients) >= 8
    for name, gradient in ours.gradients.items():
        assert bool(gradient.any()), name
        torch.testing.assert_close(gradient, stock.gradients[name], rtol=1e-4, atol=1e-6, msg=name)


# ---- tiled MLPs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("targets", TARGETS)
def test_tiled_mlps_get_the_gradients_of_whole_ones_and_nothing_below_the_cut(targets: str, checkpointing: str) -> None:
    """A tiled MLP is an autograd function of its input alone: parameters get gradients where the input needs one."""
    batch = token_batch(rows=1, tokens=11)
    stock = take_step(build(TARGETS[targets], checkpointing=checkpointing, stop=False), batch=batch)
    patch_tiled_mlp("llama", cfg_num_shards=3)
    model = build(TARGETS[targets], checkpointing=checkpointing, stop=True)
    ours = proved_step(model, batch=batch)
    assert model.get_decoder().layers[CUT].mlp._compute_params, "the MLP was tiled"
    assert_stopped(ours)
    assert_close(ours, stock)


@pytest.mark.parametrize("adapted", [True, False], ids=["LoRA", "full"])
def test_a_step_is_predicted_as_with_whole_mlps(adapted: bool) -> None:
    costs = []
    for tiles in (None, 3):
        if tiles:
            patch_tiled_mlp("llama", cfg_num_shards=tiles)
        model = tiny_llama(num_layers=NUM_LAYERS)
        stack, lora = find_stack(model), LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
        mode = Mode(adapted_modules(model, lora) if adapted else None)
        with ready_to_run(model, stack):
            costs.append(cut_costs(stack, mode=mode, shape=StepShape(batch=1, positions=16)))
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not any("_compute_params" in vars(module) for module in model.modules())
    assert costs[0] == costs[1]


def test_without_a_leaf_nothing_would_be_trained() -> None:
    """What stopping the backward pass does to adapters on tiled MLPs alone, if nothing else is done."""
    patch_tiled_mlp("llama", cfg_num_shards=3)
    model = build(MLP, checkpointing="none", stop=True)
    for module in model.modules():
        module._forward_pre_hooks.clear()
    with pytest.raises(RuntimeError, match="element 0 of tensors does not require grad"):
        take_step(model, batch=token_batch(rows=1, tokens=11))


def test_the_leaf_is_put_once_where_it_is_needed_and_taken_back() -> None:
    patch_tiled_mlp("llama", cfg_num_shards=3)
    model = build(MLP, checkpointing="none", stop=True)
    layers = find_stack(model).layers
    stop_backward(model, layers=layers, first_trainable=CUT)
    hooks = [list(layer.mlp._forward_pre_hooks.values()) for layer in layers]
    assert hooks == [[]] * CUT + [[tiled_input]] * (NUM_LAYERS - CUT)

    mlp, state = layers[CUT].mlp, torch.randn(1, 3, 32)
    assert tiled_input(mlp, (state,))[0].is_leaf
    assert tiled_input(mlp, (state.clone().requires_grad_(True) * 1,)) is None, "a graph is never cut"
    assert tiled_input(layers[0].mlp, (state,)) is None, "nothing is trained there"
    with torch.no_grad():
        assert tiled_input(mlp, (state,)) is None

    restore_backward(model)
    assert not any(layer.mlp._forward_pre_hooks for layer in layers)


# ---- LoRA kernels --------------------------------------------------------------------------------------------------


def with_kernels(folder: Path, *, checkpointing: str, **kernels: bool) -> Any:
    """A model with adapters on every projection from the cut on, patched by axolotl, class and instances."""
    tiny_llama().config.save_pretrained(folder)
    cfg = DictDefault({"base_model": str(folder), **kernels})
    if cfg.lora_qkv_kernel or cfg.lora_o_kernel:
        lora_kernels.patch_self_attn_lora(cfg)
    model = build(PROJECTIONS, checkpointing=checkpointing, stop=True)
    return lora_kernels.apply_lora_kernel_patches(model, cfg)


def boundary_state(model: Any) -> Tensor:
    """The output of the last frozen layer, (B, T, D)."""
    kept: list[Tensor] = []
    handle = find_stack(model).layers[CUT - 1].register_forward_hook(lambda _m, _a, output: kept.append(output))
    with torch.no_grad():
        model(**token_batch(), use_cache=False)
    handle.remove()
    return kept[0]


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_attention_kernels_train_the_layers_above_the_cut_with_the_same_gradients(
    checkpointing: str, tmp_path: Path
) -> None:
    reference = build(PROJECTIONS, checkpointing=checkpointing, stop=False)
    stock, state = take_step(reference), boundary_state(reference)
    model = with_kernels(tmp_path, checkpointing=checkpointing, **ATTENTION_KERNELS)
    attentions = [layer.self_attn for layer in find_stack(model).layers]
    stock_path, kernel = lora_kernels.original_apply_qkv, lora_kernels.apply_lora_qkv
    assert [a.apply_qkv.__func__ for a in attentions] == [stock_path] * CUT + [kernel] * (NUM_LAYERS - CUT)
    assert [a.apply_o.__func__ is lora_kernels.apply_lora_o for a in attentions] == [
        i >= CUT for i in range(NUM_LAYERS)
    ]
    ours = proved_step(model)
    assert_stopped(ours)
    assert_close(ours, stock)
    assert torch.equal(boundary_state(model), state), "frozen layers compute the same"


def test_mlp_kernels_need_a_gpu_for_their_output(tmp_path: Path) -> None:
    """Why the next test does not simply train with them."""
    model = with_kernels(tmp_path, checkpointing="none", lora_mlp_kernel=True)
    if torch.cuda.is_available():
        model.cuda()
        model(**{name: value.cuda() for name, value in token_batch().items()})
    else:
        with pytest.raises((AssertionError, RuntimeError), match="CUDA|NVIDIA"):
            model(**token_batch())


@pytest.mark.slow
def test_mlp_kernels_in_the_interpreter_give_the_same_gradients(tmp_path: Path) -> None:
    here = Path(__file__).parent
    code = "import sys, pathlib; sys.path.insert(0, sys.argv[1]); from test_kernels import interpreted_step as step"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; step(pathlib.Path(sys.argv[2]))", str(here), str(tmp_path)],
        env=environment(TRITON_INTERPRET="1"),  # read when the kernels are defined
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def interpreted_step(folder: Path) -> None:
    """In a process of its own: axolotl's Triton kernels, autograd function and patches, on the CPU."""
    assert os.environ["TRITON_INTERPRET"] == "1"
    stock = take_step(build(PROJECTIONS, checkpointing="non-reentrant", stop=False))
    for module in (lora, swiglu):  # axolotl 0.21 imports it when it is called
        vars(module)["swiglu_forward"] = swiglu_forward_on_cpu
    model = with_kernels(folder, checkpointing="non-reentrant", lora_mlp_kernel=True, **ATTENTION_KERNELS)
    forwards = [getattr(layer.mlp.forward, "__func__", None) for layer in find_stack(model).layers]
    assert [f is lora.apply_lora_mlp_swiglu for f in forwards] == [i >= CUT for i in range(NUM_LAYERS)]
    ours = proved_step(model)
    assert_stopped(ours)
    assert_close(ours, stock)


def swiglu_forward_on_cpu(gate: Tensor, up: Tensor) -> Tensor:
    """What axolotl's function of this name does, but for the device of `out`; (B, T, hidden) each."""
    out = torch.empty_like(gate)
    grid = (-(-gate.numel() // 1024),)
    swiglu._swiglu_fwd_kernel[grid](gate_ptr=gate, up_ptr=up, out_ptr=out, n_elements=gate.numel(), block_size=1024)
    return out


# ---- whole runs ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Run:
    """What a run of axolotl in this process left."""

    plan: dict[str, Any]
    losses: list[float]
    weights: dict[str, Tensor]  # adapters, or the whole model


def run(folder: Path, inputs: dict[str, Path], **overrides: Any) -> Run:
    """What `axolotl.cli.train` does; plain SGD, so that weights tell of gradients."""
    config = write_config(
        folder,
        **inputs,
        **{
            "plugins": ["axolotl_test_plugins.FixedSeed", "layersel"],
            "layersel": {"num_samples": 8, "coverage": 0.85, "report": False},
            "optimizer": "sgd",
            "learning_rate": 1.0,
            "max_steps": 2,
            "micro_batch_size": 1,
            **overrides,
        },
    )
    cfg = load_cfg(str(config))
    meta = PluginManager.get_instance().load_datasets(cfg, preprocess=False)
    _model, _tokenizer, trainer = axolotl_train(cfg=cfg, dataset_meta=meta)
    PluginManager.get_instance().plugins.clear()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    file = "adapter_model.safetensors" if cfg.adapter else "model.safetensors"
    return Run(plan_of(folder / "out"), losses, load_file(folder / "out" / file))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("common", "feature"),
    [
        ({}, ATTENTION_KERNELS),
        ({"lora_target_linear": None, "lora_target_modules": MLP}, TILED),
        ({"adapter": None, "learning_rate": 0.1}, TILED),
    ],
    ids=["attention kernels", "tiled MLP, adapters on it alone", "tiled MLP, full"],
)
def test_a_run_of_axolotl_chooses_and_trains_the_same(
    common: dict[str, Any],
    feature: dict[str, Any],
    tmp_path: Path,
    run_inputs: dict[str, Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    stock = run(tmp_path / "stock", run_inputs, **common)
    assert "_compute_params" not in vars(LlamaMLP)
    assert "_original_forward" not in vars(LlamaAttention)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        ours = run(tmp_path / "ours", run_inputs, **common, **feature)
    rewritten = LlamaMLP if "tiled_mlp" in feature else LlamaAttention
    assert {"_compute_params", "_original_forward"} & set(vars(rewritten)), "the feature was on"
    k = stock.plan["first_trainable"]
    assert 0 < k == ours.plan["first_trainable"]
    assert ours.plan["scores"]["deviation"] == pytest.approx(stock.plan["scores"]["deviation"], abs=1e-6)
    assert ours.losses == pytest.approx(stock.losses, abs=1e-4)
    assert f"proved in the first step: the backward pass stops at layer {k}" in caplog.text
    assert ours.weights.keys() == stock.weights.keys()
    for name, weight in ours.weights.items():
        torch.testing.assert_close(weight, stock.weights[name], rtol=1e-3, atol=1e-5, msg=name)
    if not common.get("adapter", "lora"):
        return
    trained = {name for name, weight in ours.weights.items() if "lora_B" in name and weight.abs().max() > 1e-3}
    assert {int(name.split("layers.")[1].split(".")[0]) for name in trained} == set(ours.plan["trainable_layers"])


def test_a_tiled_mlp_is_a_note_on_the_prediction() -> None:
    config = {"plugins": ["layersel"], "tiled_mlp": True}
    assert any("`tiled_mlp`" in note for note in find_notes(config))
    assert find_notes({**config, "tiled_mlp": False}) == []
