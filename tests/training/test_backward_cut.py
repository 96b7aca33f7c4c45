"""The backward pass stops at the cut, with the gradients of the stock run.

Stock means what transformers, PEFT and TRL do for the same trained layers: the embeddings' output requires grad.
"""

from __future__ import annotations

import copy
import functools
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from backward_steps import (
    CHECKPOINTING,
    CUT,
    MODES,
    NUM_LAYERS,
    assert_same_gradients,
    assert_stopped,
    build,
    in_suffix,
    take_step,
    watched_step,
)
from peft import prepare_model_for_kbit_training
from tiny import VOCABULARY, add_lora, tiny_llama, tiny_llama_4bit, token_batch, train_only
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from axolotl_layersel.model.decoder_stack import find_stack
from axolotl_layersel.model.parameter_names import normalise
from axolotl_layersel.training.backward_cut import (
    BackwardCutError,
    boundary,
    no_input_grads,
    restore_backward,
    stop_backward,
)
from axolotl_layersel.training.first_step_check import FirstStepCheck
from axolotl_layersel.training.trained_below_cut import obstacles


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("mode", MODES)
def test_nothing_below_the_cut_is_kept_walked_or_recomputed_and_gradients_equal_stock(
    mode: str, checkpointing: str, tmp_path: Path
) -> None:
    stock = take_step(build(mode, tmp_path, checkpointing=checkpointing, stop=False))
    ours = take_step(build(mode, tmp_path, checkpointing=checkpointing, stop=True))

    assert stock.saved_below > 0, "the stock run shows what there is to save"
    assert_stopped(ours)
    assert_same_gradients(ours, stock)
    assert all(bool(gradient.any()) for gradient in ours.gradients.values())
    assert ours.saved_bytes < stock.saved_bytes
    again = [] if checkpointing == "none" else [5, 4]
    assert ours.recomputed == again
    assert stock.recomputed == again + ([] if checkpointing == "none" else [3, 2, 1, 0])


@pytest.mark.parametrize("mode", MODES)
def test_a_later_call_for_reentrant_checkpointing_gets_non_reentrant(
    mode: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Reentrant checkpointing without input gradients dies with 'element 0 of tensors does not require grad'."""
    stock = take_step(build(mode, tmp_path, checkpointing="reentrant", stop=False))
    with caplog.at_level(logging.WARNING):
        model = build(mode, tmp_path, checkpointing="reentrant", stop=True, reentrant=False)
    ours = take_step(model)
    assert_stopped(ours)
    assert_same_gradients(ours, stock)
    told = [record for record in caplog.records if "use_reentrant=True; False is used" in record.getMessage()]
    assert len(told) == 1, "said once, not at every call"


@pytest.mark.parametrize("kwargs", [None, {}, {"use_reentrant": False}, {"use_reentrant": True}])
@pytest.mark.parametrize("reentrant", [False, True])
def test_every_later_call_keeps_the_chosen_kind(kwargs: dict[str, Any] | None, reentrant: bool) -> None:
    model = tiny_llama()
    stop_backward(model, layers=model.model.layers, first_trainable=CUT, reentrant=reentrant)
    assert not model.is_gradient_checkpointing, "checkpointing is not switched on by stopping"
    model.gradient_checkpointing_enable(kwargs)
    flags = [layer.gradient_checkpointing for layer in model.model.layers]
    assert flags == [False] * CUT + [True] * (NUM_LAYERS - CUT)
    used = {layer._gradient_checkpointing_func.keywords["use_reentrant"] for layer in model.model.layers}
    assert used == {reentrant}
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


@pytest.mark.parametrize("kwargs", [{}, {"use_reentrant": True}])
def test_checkpointing_that_is_on_already_is_switched_at_once(kwargs: dict[str, Any], tmp_path: Path) -> None:
    """With activation offloading nobody enables it again: the loader's call, reentrant or silent on it, would stay."""
    model = tiny_llama_4bit(tmp_path)
    prepare_model_for_kbit_training(model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs)
    stop_backward(model, layers=model.model.layers, first_trainable=CUT)
    step = take_step(add_lora(model, first_trainable=CUT))
    assert_stopped(step)
    assert step.recomputed == [5, 4]
    assert len(step.gradients) == 28


def test_every_n_layers_is_kept_when_stopping_is_repeated() -> None:
    model = tiny_llama()
    stop_backward(model, layers=model.model.layers, first_trainable=2)
    model.gradient_checkpointing_enable({"preserve_rng_state": False}, every_n_layers=2)
    stop_backward(model, layers=model.model.layers, first_trainable=2)
    assert [layer.gradient_checkpointing for layer in model.model.layers] == [False, False, True, False, True, False]
    arguments = model.model.layers[2]._gradient_checkpointing_func.keywords
    assert arguments == {"preserve_rng_state": False, "use_reentrant": False}


def test_how_checkpointing_was_enabled_is_kept_but_for_reentrancy() -> None:
    """Since 5.20 transformers has `offload`, no keyword of what it enables; it was lost when training began."""

    def offloading(*_: Any, **__: Any) -> None:
        """Stands for what transformers makes of `offload`."""

    model = tiny_llama()
    model._set_gradient_checkpointing(gradient_checkpointing_func=functools.partial(offloading, debug=True))
    for _ in range(2):
        stop_backward(model, layers=model.model.layers, first_trainable=CUT)
    functions = {id(layer): layer._gradient_checkpointing_func for layer in model.model.layers}.values()
    assert {function.func for function in functions} == {offloading}
    assert [function.keywords for function in functions] == [{"debug": True, "use_reentrant": False}] * NUM_LAYERS
    restore_backward(model)
    assert {layer._gradient_checkpointing_func.func for layer in model.model.layers} == {offloading}
    assert all(layer.gradient_checkpointing for layer in model.model.layers)


def test_a_method_that_stood_on_the_instance_before_is_still_called() -> None:
    """Selective checkpointing of axolotl wraps the method on the instance to add its context_fn."""
    model, calls = tiny_llama(), []
    stock = model.gradient_checkpointing_enable

    def selective(gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        calls.append(gradient_checkpointing_kwargs)
        stock(gradient_checkpointing_kwargs={**(gradient_checkpointing_kwargs or {}), "debug": False}, **kwargs)

    model.gradient_checkpointing_enable = selective
    for _ in range(2):
        stop_backward(model, layers=model.model.layers, first_trainable=CUT)
    model.gradient_checkpointing_enable()
    assert calls == [{"use_reentrant": False}], "once for a call, however often the backward pass was stopped"
    assert [layer.gradient_checkpointing for layer in model.model.layers] == [False] * CUT + [True] * 2
    restore_backward(model)
    assert model.gradient_checkpointing_enable is selective


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_repeating_the_call_on_the_wrapped_model_changes_nothing(checkpointing: str, tmp_path: Path) -> None:
    stock = take_step(build("lora", tmp_path, checkpointing=checkpointing, stop=False))
    model = build("lora", tmp_path, checkpointing=checkpointing, stop=True)
    layers = find_stack(model).layers
    for _ in range(2):
        stop_backward(model, layers=layers, first_trainable=CUT, reentrant=checkpointing == "reentrant")
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    assert hooks == ([boundary] if checkpointing == "reentrant" else [])
    ours = take_step(model)
    assert_stopped(ours)
    assert_same_gradients(ours, stock)


@pytest.mark.parametrize("hook_name", ["make_inputs_require_grad", "make_inputs_require_grads"])
def test_hooks_that_were_put_on_the_embeddings_directly_are_taken_away(hook_name: str) -> None:
    model, kept = tiny_llama(), []

    def require_grad(_module: nn.Module, _args: Any, output: Tensor) -> None:
        output.requires_grad_(True)

    require_grad.__name__ = hook_name
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(require_grad, always_call=True)
    for _ in range(3):
        model.enable_input_require_grads()  # each call forgets the handles of the one before
    embeddings.register_forward_hook(lambda *_: kept.append(1))
    train_only(model, in_suffix)
    stop_backward(model, layers=model.model.layers, first_trainable=CUT)
    assert len(embeddings._forward_hooks) == 1, "a hook of another kind stays"
    assert not embeddings._forward_hooks_always_called
    assert_stopped(take_step(model))
    assert kept == [1]
    model.disable_input_require_grads()


def test_a_cut_at_zero_changes_nothing() -> None:
    model = tiny_llama()
    model.enable_input_require_grads()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    hooks = list(model.get_input_embeddings()._forward_hooks)
    stop_backward(model, layers=model.model.layers, first_trainable=0, reentrant=True)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert list(model.get_input_embeddings()._forward_hooks) == hooks


def test_a_cut_outside_the_layers_is_refused() -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match="first_trainable is 6; 6 decoder layers allow 0 to 5"):
        stop_backward(model, layers=model.model.layers, first_trainable=6)


def test_a_model_that_transformers_did_not_make_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(BackwardCutError, match="nothing in Sequential has enable_input_require_grads"):
        stop_backward(model, layers=list(model), first_trainable=1)


def test_packed_rows_stop_at_the_cut_too(tmp_path: Path) -> None:
    """With sample packing, `position_ids` start again at every sample and there is no attention mask."""
    batch = {key: value for key, value in token_batch(rows=1, tokens=12).items() if key != "attention_mask"}
    batch["position_ids"] = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]])
    stock = take_step(build("lora", tmp_path, checkpointing="non-reentrant", stop=False), batch=batch)
    ours = take_step(build("lora", tmp_path, checkpointing="non-reentrant", stop=True), batch=batch)
    assert_stopped(ours)
    assert_same_gradients(ours, stock)


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_inside_checkpoint_wrappers_are_found(reentrant: bool) -> None:
    """Full fine-tuning with `activation_offloading: true` wraps each layer before adapters would be loaded."""

    def wrapped(stop: bool) -> Any:
        model = tiny_llama()
        apply_activation_checkpointing(model, auto_wrap_policy=ModuleWrapPolicy({GradientCheckpointingLayer}))
        model.enable_input_require_grads()
        train_only(model, lambda name: in_suffix(normalise(name)))
        if stop:
            stop_backward(model, layers=model.model.layers, first_trainable=CUT, reentrant=reentrant)
        return model

    model = wrapped(stop=True)
    stop_backward(model, layers=model.model.layers, first_trainable=CUT, reentrant=reentrant)
    stock, ours = take_step(wrapped(stop=False)), take_step(model)
    assert sorted(stock.recomputed) == [0, 1, 2, 3, 4, 5]
    assert_stopped(ours)
    assert sorted(ours.recomputed) == [4, 5]
    assert_same_gradients(ours, stock)
    model.zero_grad()
    restore_backward(model)
    again = take_step(model)
    assert again.recomputed == stock.recomputed
    assert_same_gradients(again, stock)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": True}])
def test_a_compiled_model_stops_at_the_cut_in_one_graph(checkpointing: dict[str, Any] | None) -> None:
    """Hooks that note what ran would break the graph inside checkpoints; reentrant is asked for and not given."""

    def three_layers() -> Any:
        model = tiny_llama(num_layers=3)
        train_only(model, lambda name: "layers.2." in name)
        return model

    reference, model = three_layers(), three_layers()
    reference(**token_batch()).loss.backward()
    expected = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    model.enable_input_require_grads()
    stop_backward(model, layers=model.model.layers, first_trainable=2)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(checkpointing)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    stop_backward(compiled, layers=model.model.layers, first_trainable=2)
    watched = watched_step(compiled, first_trainable=2)
    for step in range(2):
        compiled(**token_batch(), use_cache=False).loss.backward()
        if step == 0:
            assert watched.check() == []
            assert not any(module._forward_hooks for module in compiled.modules()), "nothing stays on the hot path"
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name])
        model.zero_grad()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    watched = watched_step(compiled, first_trainable=2)
    compiled(**token_batch(), use_cache=False).loss.backward()
    with pytest.raises(BackwardCutError, match=r"frozen decoder layer 1 \(model\.layers\.1\) needs gradient"):
        watched.check()


@pytest.mark.parametrize("case", ["stopped", "input gradients", "trained below"])
def test_where_compiled_code_runs_no_hook_the_model_itself_is_judged(case: str) -> None:
    """Layers that were compiled before the hooks came do not run them."""
    model = tiny_llama()
    train_only(model, lambda name: in_suffix(name) or (case == "trained below" and "layers.1.mlp" in name))
    model.enable_input_require_grads()
    if case != "input gradients":
        stop_backward(model, layers=model.model.layers, first_trainable=CUT)
    watched = watched_step(model)
    watched._handles.pop(0).remove()
    model(**token_batch()).loss.backward()
    if case == "stopped":
        assert watched.check() == []
    else:
        with pytest.raises(BackwardCutError, match="needs gradient, so the backward pass does not stop at the cut 4"):
            watched.check()


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_a_copy_stops_at_its_own_cut(checkpointing: str, tmp_path: Path) -> None:
    model = build("full", tmp_path, checkpointing=checkpointing, stop=True)
    twin = copy.deepcopy(model)
    assert twin.gradient_checkpointing_enable.owner is twin
    assert twin.enable_input_require_grads is no_input_grads
    model.gradient_checkpointing_disable()
    twin.enable_input_require_grads()
    twin.gradient_checkpointing_enable({"use_reentrant": True})
    assert [layer.gradient_checkpointing for layer in twin.model.layers] == [False] * CUT + [True] * 2
    assert not model.is_gradient_checkpointing
    step = take_step(twin)
    assert_stopped(step)
    assert step.recomputed == [5, 4]


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_pickled_model_stops_at_its_own_cut(reentrant: bool) -> None:
    """A GPT-2, because transformers' own Llama cannot be pickled."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=3, n_head=2, n_positions=16))
    stop_backward(model, layers=model.transformer.h, first_trainable=2, reentrant=reentrant)
    twin = pickle.loads(pickle.dumps(model))
    twin.gradient_checkpointing_enable()
    assert twin.gradient_checkpointing_enable.owner is twin
    assert [layer.gradient_checkpointing for layer in twin.transformer.h] == [False, False, True]
    assert not model.is_gradient_checkpointing


def test_a_stopped_model_is_saved_and_loaded_as_any_other(tmp_path: Path) -> None:
    model = build("full", tmp_path, checkpointing="reentrant", stop=True)
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert "gradient_checkpointing_enable" not in vars(loaded)


class Watch(TrainerCallback):
    """Repeats the call and proves the first step, as the plugin does."""

    def __init__(self) -> None:
        self.watched: FirstStepCheck | None = None
        self.without: list[str] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        layers = find_stack(model).layers
        stop_backward(model, layers=layers, first_trainable=CUT)
        expected = [name for name, p in model.named_parameters() if p.requires_grad]
        self.watched = FirstStepCheck(model, layers=layers, first_trainable=CUT, expected_trainable=expected)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.without is None:
            assert self.watched is not None
            self.without = self.watched.check()


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_two_steps_of_the_real_trainer_end_in_the_stock_weights(mode: str, tmp_path: Path) -> None:
    rows = [{key: value[0] for key, value in token_batch(rows=1, seed=seed).items()} for seed in range(4)]

    def train(stop: bool) -> tuple[Any, Watch]:
        model, watch = build(mode, tmp_path / "model", checkpointing="reentrant", stop=stop, reentrant=False), Watch()
        args = TrainingArguments(
            output_dir=str(tmp_path / "out"),
            use_cpu=True,
            max_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": True},
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        Trainer(model=model, args=args, train_dataset=rows, callbacks=[watch] if stop else []).train()
        return model, watch

    stock, _ = train(stop=False)
    ours, watch = train(stop=True)
    assert watch.without == []
    assert_stopped(take_step(ours))
    trained = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    reference = dict(stock.named_parameters())
    assert trained and all(torch.equal(p, reference[name]) for name, p in trained.items())


def test_dpo_of_trl_stops_at_the_cut(tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    vocabulary = {"<pad>": 0, "<eos>": 1, **{f"w{index}": index for index in range(2, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    rows = [{"prompt": "w3 w4 w5", "chosen": f"w{6 + i} w7", "rejected": "w8 w9"} for i in range(4)]
    model, watch = build("lora", tmp_path, checkpointing="reentrant", stop=True, reentrant=False), Watch()
    args = DPOConfig(
        output_dir=str(tmp_path / "out"),
        use_cpu=True,
        bf16=False,
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": True},
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer = DPOTrainer(
        model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=fast, callbacks=[watch]
    )
    trainer.train()
    assert watch.without == []
    after = dict(trainer.model.named_parameters())
    assert all(not torch.equal(value, after[name]) for name, value in before.items())
    assert_stopped(take_step(trainer.model))


def test_grpo_style_toggling_keeps_the_frozen_layers_out(tmp_path: Path) -> None:
    """TRL's online trainers switch checkpointing off to generate, and on again without arguments, at every step."""
    from trl.models.utils import disable_gradient_checkpointing

    model = build("lora", tmp_path, checkpointing="non-reentrant", stop=True)
    for _ in range(2):
        with disable_gradient_checkpointing(model, {"use_reentrant": True}):
            assert not model.is_gradient_checkpointing
        step = take_step(model)
        assert_stopped(step)
        assert step.recomputed == [5, 4]


def ddp_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for checkpointing in ("non-reentrant", "reentrant"):
        three_steps_of_ddp(rank, folder, checkpointing)
    torch.distributed.destroy_process_group()


def three_steps_of_ddp(rank: int, folder: str, checkpointing: str) -> None:
    model = build("lora", Path(folder), checkpointing=checkpointing, stop=True)
    wrapped = DistributedDataParallel(model)
    layers = find_stack(model).layers
    expected = [name for name, p in model.named_parameters() if p.requires_grad]
    stop_backward(wrapped, layers=layers, first_trainable=CUT, reentrant=checkpointing == "reentrant")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    watched = FirstStepCheck(wrapped, layers=layers, first_trainable=CUT, expected_trainable=expected)
    for index in range(3):
        step = take_step(model, run=wrapped, batch=token_batch(seed=10 * index + rank))
        if index == 0:
            assert watched.check() == []
        assert_stopped(step)
        optimizer.step()
        optimizer.zero_grad()
    trained = {name: dict(model.named_parameters())[name].detach() for name in expected}
    torch.save(trained, f"{folder}/{checkpointing}-{rank}.pt")


@pytest.mark.slow
def test_two_processes_stop_at_the_cut_and_stay_equal(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(ddp_worker, args=(str(tmp_path),), nprocs=2)
    start = dict(build("lora", tmp_path, checkpointing="none", stop=True).named_parameters())
    one, *others = (torch.load(path) for path in sorted(tmp_path.glob("*.pt")))
    assert len(one) == 28 and all(not torch.equal(value, start[name]) for name, value in one.items())
    assert len(others) == 3
    for other in others:
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_boundary_is_inactive_without_gradients_and_in_evaluation(tmp_path: Path) -> None:
    model = build("full", tmp_path, checkpointing="reentrant", stop=True)
    outputs: list[Tensor] = []
    model.model.layers[CUT - 1].register_forward_hook(lambda _module, _args, output: outputs.append(output))
    with torch.no_grad():
        model(**token_batch())
    model.eval()(**token_batch())
    assert [output.requires_grad for output in outputs] == [False, False]


def test_the_boundary_keeps_what_else_a_layer_returns() -> None:
    module, state, other = nn.Identity().train(), torch.ones(1, 2, 3), torch.zeros(2)
    output = boundary(module, (), (state, other))
    assert isinstance(output, tuple) and output[0].requires_grad and output[1] is other
    assert not state.requires_grad


def test_the_boundary_refuses_to_cut_off_something_trained(tmp_path: Path) -> None:
    model = build("full", tmp_path, checkpointing="reentrant", stop=True)
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(True)
    with pytest.raises(BackwardCutError, match="output of the last frozen decoder layer needs gradient"):
        model(**token_batch())


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_restoring_gives_the_stock_run_back(checkpointing: str, tmp_path: Path) -> None:
    def trained_embeddings(stop: bool) -> Any:
        model = build("full", tmp_path, checkpointing=checkpointing, stop=stop)
        train_only(model, lambda name: in_suffix(name) or "embed_tokens" in name)
        if stop:
            assert obstacles(model, stack=find_stack(model), first_trainable=CUT)
            restore_backward(model)
            restore_backward(model)
        return model

    model = trained_embeddings(stop=True)
    assert "enable_input_require_grads" not in vars(model) and "gradient_checkpointing_enable" not in vars(model)
    assert [layer.gradient_checkpointing for layer in model.model.layers] == [checkpointing != "none"] * NUM_LAYERS
    assert len(model.get_input_embeddings()._forward_hooks) == 1, "one that the public method can remove again"
    ours, stock = take_step(model), take_step(trained_embeddings(stop=False))
    assert "model.embed_tokens.weight" in ours.gradients
    assert_same_gradients(ours, stock)
    assert ours.saved_below == stock.saved_below
