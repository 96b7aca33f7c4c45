"""The predicted cost of a cut against torch's own FLOP counter, autograd's saved tensors and PEFT's parameters."""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama_4bit
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    DeepseekV3Config,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)
from transformers.pytorch_utils import Conv1D

from axolotl_layersel.cost.balance import measure_balance
from axolotl_layersel.cost.cut_cost import (
    CutCost,
    Mode,
    StepCost,
    StepShape,
    cut_costs,
    explain,
    price_cuts,
    probe_mode,
)
from axolotl_layersel.cost.layer_run import Moved
from axolotl_layersel.model.decoder_stack import DecoderStack, find_stack
from axolotl_layersel.training.backward_cut import stop_backward

NUM_LAYERS = 4
SHAPE = StepShape(batch=3, positions=80)
COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
GROUPED = COMMON | {"num_key_value_heads": 2}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "experts_implementation": "eager"}

CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "grouped-query attention": lambda: LlamaConfig(**GROUPED),
    "tied head": lambda: Qwen2Config(**GROUPED, tie_word_embeddings=True),
    "stacked experts": lambda: MixtralConfig(**GROUPED, **EXPERTS, num_local_experts=4),
    "experts in every other layer": lambda: Qwen3MoeConfig(
        **GROUPED, **EXPERTS, head_dim=16, num_experts=8, moe_intermediate_size=48, decoder_sparse_step=2
    ),
    "Conv1D, fused qkv, learned positions": lambda: GPT2Config(
        vocab_size=128,
        n_embd=64,
        n_layer=NUM_LAYERS,
        n_head=4,
        n_positions=100,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
    ),
    "attention beside the MLP": lambda: GPTNeoXConfig(**COMMON, hidden_dropout=0.0, attention_dropout=0.0),
    "soft-capped scores and logits, norms after": lambda: Gemma2Config(
        **GROUPED, head_dim=16, query_pre_attn_scalar=16, sliding_window=32
    ),
    "eager attention": lambda: LlamaConfig(**GROUPED, attn_implementation="eager"),
}
TARGETS = {  # PEFT would expand the names of an MLP to experts of every layer
    "stacked experts": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "experts in every other layer": ("q_proj", "k_proj", "v_proj", "o_proj"),
}


def build(config: PretrainedConfig) -> Any:
    torch.manual_seed(0)
    return Auto.from_config(config).train()


def linear_leaves(stack: DecoderStack) -> list[str]:
    found = [(name, module) for layer in stack.layers for name, module in layer.named_modules()]
    return sorted({name.rpartition(".")[2] for name, m in found if isinstance(m, (nn.Linear, Conv1D))})


def prepared(model: Any, mode: Mode, *, first_trainable: int) -> Any:
    """The model as it would be trained, set up by PEFT and transformers and, where asked for, by `stop_backward`."""
    stack = find_stack(model)
    if mode.adapter:
        chosen = range(first_trainable, stack.num_layers)
        config = LoraConfig(
            r=mode.rank,
            target_modules=list(linear_leaves(stack) if mode.target_modules is None else mode.target_modules),
            target_parameters=[f"layers.{i}.{name}" for i in chosen for name in mode.target_parameters] or None,
            layers_to_transform=list(chosen),
            lora_dropout=mode.dropout,
            task_type="CAUSAL_LM",
            fan_in_fan_out=model.config.model_type == "gpt2",
        )
        model = get_peft_model(model, config)
    else:
        model.requires_grad_(False)
        for layer in stack.layers[first_trainable:]:
            layer.requires_grad_(True)
        if mode.train_norm_and_head:
            stack.final_norm.requires_grad_(True)
            stack.head.requires_grad_(True)
    model.enable_input_require_grads()
    if mode.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": mode.reentrant})
    if mode.stop_backward:
        stop_backward(model, layers=stack.layers, first_trainable=first_trainable, reentrant=mode.reentrant)
    return model.train()


class Held:
    """A saved tensor, alive for as long as a graph holds it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def measured(model: Any, shape: StepShape = SHAPE) -> StepCost:
    """One training step under torch's FLOP counter and saved-tensor hooks: the reference."""
    ids = (
        torch.arange(shape.batch * shape.positions).reshape(shape.batch, shape.positions) * 7 % model.config.vocab_size
    )
    sdpa = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
        ),
    }
    held: weakref.WeakSet[Held] = weakref.WeakSet()

    def pack(tensor: Tensor) -> Held:
        held.add(packed := Held(tensor))
        return packed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed.tensor):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    own = {t.untyped_storage().data_ptr() for t in itertools.chain(model.parameters(), model.buffers())}
    storages = [packed.tensor.untyped_storage() for packed in held]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages if storage.data_ptr() not in own}
    del loss
    with FlopCounterMode(display=False, custom_mapping=sdpa) as forward:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    with FlopCounterMode(display=False, custom_mapping=sdpa) as backward:
        loss.backward()
    return StepCost(
        forward_flops=forward.get_total_flops(),
        backward_flops=backward.get_total_flops(),
        head_flops=0.0,
        forward_moved=0.0,
        backward_moved=0.0,
        head_moved=0.0,
        saved_activation_bytes=sum(sizes.values()),
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        optimizer_bytes=0.0,
    )


def agree(predicted: StepCost, reference: StepCost) -> None:
    # transformers computes rotary angles as a product of positions and frequencies, once for all layers.
    assert predicted.forward_flops == pytest.approx(reference.forward_flops, rel=1e-4)
    assert predicted.backward_flops == reference.backward_flops
    assert predicted.trainable_parameters == reference.trainable_parameters
    # The labels, and the mask that eager attention shares, are not the layers' own: under one percent even here.
    assert predicted.saved_activation_bytes == pytest.approx(reference.saved_activation_bytes, rel=0.01)


def mode_for(kind: str, name: str, config: PretrainedConfig, **options: Any) -> Mode:
    if kind == "lora":
        return Mode(adapter="lora", rank=4, target_modules=TARGETS.get(name), **options)
    return Mode(adapter=None, train_norm_and_head=not config.tie_word_embeddings, **options)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("name", CONFIGS)
def test_flops_bytes_and_parameters_are_those_of_a_real_step(name: str, kind: str, checkpointing: bool) -> None:
    config = CONFIGS[name]()
    for stops, first_trainable in ((True, 0), (True, 3), (False, 2)):
        model = build(config)
        mode = mode_for(kind, name, config, checkpointing=checkpointing, stop_backward=stops)
        cost = cut_costs(find_stack(model), mode=mode, shape=SHAPE)[first_trainable]
        agree(cost.cut, measured(prepared(model, mode, first_trainable=first_trainable)))
        assert cost.first_trainable == first_trainable


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("grouped-query attention", Mode(adapter="lora", rank=4, target_modules=("q_proj", "v_proj"), dropout=0.1)),
        ("grouped-query attention", Mode(adapter="lora", rank=4, target_modules=("gate_proj", "mlp.down_proj"))),
        ("grouped-query attention", Mode(adapter="lora", rank=4, checkpointing=True, reentrant=True)),
        ("grouped-query attention", Mode(adapter=None, checkpointing=True, reentrant=True)),
        (
            "attention beside the MLP",
            Mode(adapter="lora", rank=2, target_modules=("dense_4h_to_h",), checkpointing=True),
        ),
        (
            "stacked experts",
            Mode(
                adapter="lora",
                rank=4,
                target_modules=("o_proj",),
                target_parameters=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
            ),
        ),
    ],
    ids=["dropout", "half of the MLP", "reentrant LoRA", "reentrant", "only the last product", "experts' tensors"],
)
def test_other_targets_and_reentrant_checkpointing(name: str, mode: Mode) -> None:
    for first_trainable in (1, 3):
        model = build(CONFIGS[name]())
        cost = cut_costs(find_stack(model), mode=mode, shape=SHAPE)[first_trainable]
        agree(cost.cut, measured(prepared(model, mode, first_trainable=first_trainable)))


def test_attention_with_its_own_sizes_of_heads() -> None:
    config = DeepseekV3Config(
        **COMMON | EXPERTS,
        num_key_value_heads=4,
        moe_intermediate_size=48,
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
    )
    one_row = StepShape(batch=1, positions=80)
    model, mode = build(config), Mode(adapter=None, train_norm_and_head=True)
    cost = cut_costs(find_stack(model), mode=mode, shape=one_row)[2]
    agree(cost.cut, measured(prepared(model, mode, first_trainable=2), one_row))


def test_layers_without_softmax_attention_count_by_their_matrices() -> None:
    config = Qwen3NextConfig(
        **GROUPED | EXPERTS,
        head_dim=16,
        num_experts=4,
        moe_intermediate_size=48,
        shared_expert_intermediate_size=48,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
    )
    stack = find_stack(build(config))
    probe = probe_mode(stack, mode=Mode(adapter=None))
    for layer, found, kind in zip(stack.layers, probe.layers, config.layer_types, strict=True):
        assert len(found.passes["trained"].attention) == (kind == "full_attention")
        counted = sum(p.inputs * p.outputs * p.modules for p in found.passes["trained"].products)
        assert counted == sum(parameter.numel() for parameter in layer.parameters() if parameter.dim() > 1)


def test_4_bit_weights_count_with_the_shape_that_they_stand_for(tmp_path: Path) -> None:
    mode = Mode(adapter="qlora", rank=2, checkpointing=False)
    packed = tiny_llama_4bit(tmp_path)
    costs = cut_costs(find_stack(packed), mode=mode, shape=SHAPE)
    reference = prepared(packed, mode, first_trainable=4)
    measured_bytes = measured(reference).saved_activation_bytes
    assert costs[4].cut.saved_activation_bytes == pytest.approx(measured_bytes, rel=0.01)
    assert costs[4].cut.trainable_parameters == sum(p.numel() for p in reference.parameters() if p.requires_grad)
    plain = build(LlamaConfig(**{**packed.config.to_dict(), "quantization_config": None, "dtype": None}))
    floats = cut_costs(find_stack(plain), mode=dataclasses.replace(mode, adapter="lora"), shape=SHAPE)
    for one, other in zip(costs, floats, strict=True):
        assert (one.cut.forward_flops, one.cut.backward_flops) == (other.cut.forward_flops, other.cut.backward_flops)


def test_a_step_worked_out_by_hand() -> None:
    """Two layers, D = 8, two heads of 4 and one for keys, MLP 16, vocabulary 32; one row of 10; LoRA r = 2 on layer 1.

    Matrices of a layer: q, o 64, k, v 32, gate, up, down 128, together 576. FLOPs for 10 positions:
    products 20 * 576 = 11520, attention 2 * 100 * 2 * (4 + 4) = 3200, head 20 * 256 = 5120.
    Adapters: sums of inputs and of outputs are both 64, so 40 * 64 = 2560 into the rank and 2560 out of it.
    Backward in layer 1: o, gate, up, down (448) need the gradient of their inputs, q, k, v do not.
    """
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    mode = Mode(adapter="lora", rank=2, optimizer_bytes_per_parameter=8)
    all_layers, cost = cut_costs(find_stack(build(config)), mode=mode, shape=StepShape(batch=1, positions=10))
    assert cost.cut.forward_flops == 2 * (11520 + 3200) + 5120 + (2560 + 2560)
    adapters = (
        2 * 2560 + 2560 + 40 * (8 + 8 + 8 + 16)
    )  # out of the rank twice, into it, and inputs of o, gate, up, down
    assert cost.cut.backward_flops == 5120 + 20 * 448 + 8000 + adapters == 31360
    assert cost.cut.trainable_parameters == 2 * (64 + 64)
    assert cost.cut.optimizer_bytes == 2048
    assert all_layers.cut.backward_flops == 5120 + 2 * (11520 + 8000 + 3 * 2560 + 2560)
    assert cost.backward == 31360 / all_layers.cut.backward_flops
    assert cost.head_share == 2 * 5120 / (cost.cut.forward_flops + 31360)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stops", [False, True])
@pytest.mark.parametrize("adapter", ["lora", None])
def test_a_later_cut_never_costs_more(adapter: str | None, stops: bool, checkpointing: bool) -> None:
    mode = Mode(adapter, rank=4 if adapter else 0, checkpointing=checkpointing, stop_backward=stops)
    costs = cut_costs(find_stack(build(CONFIGS["experts in every other layer"]())), mode=mode, shape=SHAPE)
    ratios = [field.name for field in dataclasses.fields(CutCost) if field.type == "float"]
    for name in ratios[: ratios.index("head_share")]:
        values = [getattr(cost, name) for cost in costs]
        assert values[0] == 1.0, name
        assert values == sorted(values, reverse=True), name
    assert [cost.first_trainable for cost in costs] == list(range(NUM_LAYERS))
    assert all(cost.step > cost.floor for cost in costs)


def test_what_the_paper_formulas_give_on_a_wide_model() -> None:
    """Head and attention aside: full 1 - 2f/3, LoRA 1 - f/2; with checkpointing 1 - 3f/4 and 1 - 2f/3."""
    config = LlamaConfig(**GROUPED | {"hidden_size": 256, "num_hidden_layers": 16, "vocab_size": 8})
    stack, frozen = find_stack(build(config)), 0.75
    expected = {("full", False): 1 - 2 / 3 * frozen, ("full", True): 1 - 3 / 4 * frozen}
    expected |= {("lora", False): 1 - 1 / 2 * frozen, ("lora", True): 1 - 2 / 3 * frozen}
    for (kind, checkpointing), step in expected.items():
        lora = kind == "lora"
        # With reentrant checkpointing a layer is recomputed to its end, as the formulas have it.
        mode = Mode("lora" if lora else None, rank=1 if lora else 0, checkpointing=checkpointing, reentrant=True)
        cost = cut_costs(stack, mode=mode, shape=StepShape(batch=1, positions=4))[12]
        assert cost.step == pytest.approx(step, abs=0.02), (kind, checkpointing)


def test_a_probe_serves_other_shapes_and_checkpointing() -> None:
    stack = find_stack(build(CONFIGS["grouped-query attention"]()))
    mode = Mode(adapter="lora", rank=4)
    probe = probe_mode(stack, mode=mode)
    for other in (mode, dataclasses.replace(mode, checkpointing=True), dataclasses.replace(mode, stop_backward=False)):
        for shape in (SHAPE, StepShape(batch=1, positions=7)):
            assert price_cuts(probe, mode=other, shape=shape) == cut_costs(stack, mode=other, shape=shape)


def test_autocast_keeps_half_precision_activations() -> None:
    stack = find_stack(build(CONFIGS["grouped-query attention"]()))
    model, mode = build(CONFIGS["grouped-query attention"]()), Mode(adapter="lora", rank=4)
    cost = cut_costs(stack, mode=mode, shape=SHAPE, autocast=torch.bfloat16)[2]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reference = measured(prepared(model, mode, first_trainable=2))
    assert cost.cut.saved_activation_bytes == pytest.approx(reference.saved_activation_bytes, rel=0.05)
    assert cost.cut.saved_activation_bytes < cut_costs(stack, mode=mode, shape=SHAPE)[2].cut.saved_activation_bytes


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("name", ["grouped-query attention", "experts in every other layer", "eager attention"])
def test_moved_bytes_are_those_of_a_real_step(name: str, kind: str) -> None:
    config = CONFIGS[name]()
    for stops in (True, False):
        model, mode = build(config), mode_for(kind, name, config, stop_backward=stops)
        cost = cut_costs(find_stack(model), mode=mode, shape=SHAPE)[2].cut
        model = prepared(model, mode, first_trainable=2)
        ids = torch.arange(SHAPE.batch * SHAPE.positions).reshape(SHAPE.batch, -1) * 7 % config.vocab_size
        forward, backward = Moved(), Moved()
        with forward:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        with backward:
            loss.backward()
        # Embeddings and rotary angles are no part of a layer, and 240 positions do not reach experts as 128 do.
        assert cost.forward_moved == pytest.approx(forward.bytes, rel=0.05)
        assert cost.backward_moved == pytest.approx(backward.bytes, rel=0.05)


def test_moved_bytes_worked_out_by_hand() -> None:
    numbers = torch.ones(10)
    moved = Moved()
    with moved:
        total = numbers + numbers  # reads 10 numbers twice, writes 10
        total.view(2, 5).T.mul_(2.0)  # views move nothing; reads 10, writes 10
        torch.empty(1000)
    assert moved.bytes == 4 * (30 + 20)


def test_a_balance_weighs_bytes_against_flops() -> None:
    stack, mode = find_stack(build(CONFIGS["grouped-query attention"]())), Mode(adapter="lora", rank=4)
    probe = probe_mode(stack, mode=mode)
    flops, weighed, moved = (price_cuts(probe, mode=mode, shape=SHAPE, balance=b)[2] for b in (0.0, 5.0, 1e12))
    cut, base = weighed.cut, weighed.all_layers
    assert flops.backward == cut.backward_flops / base.backward_flops
    assert moved.backward == pytest.approx(cut.backward_moved / base.backward_moved)
    expected = (cut.backward_flops + 5 * cut.backward_moved) / (base.backward_flops + 5 * base.backward_moved)
    assert weighed.backward == expected
    assert moved.step < weighed.step < flops.step  # adapters move more than they compute
    assert weighed.cut == flops.cut


def test_a_machine_s_balance_is_a_number_of_flops_for_each_byte() -> None:
    before = torch.get_rng_state().tolist()
    found = measure_balance(rows=64, width=64, rank=4, device=torch.device("cpu"), dtype=torch.float32)
    assert 0 < found < 1e6
    assert torch.get_rng_state().tolist() == before


def state_of(model: nn.Module) -> list[Any]:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    modules = [(m.training, [dict(vars(m)[name]) for name in hooks], sorted(vars(m))) for m in model.modules()]
    parameters = [(p.requires_grad, p.grad, p.detach().clone().tolist()) for p in model.parameters()]
    return [modules, parameters, torch.get_rng_state().tolist(), torch.is_grad_enabled()]


def test_the_model_is_left_as_found() -> None:
    model = build(CONFIGS["grouped-query attention"]())
    model.model.layers[1].requires_grad_(False)
    model.model.layers[2].eval()
    model.gradient_checkpointing_enable()
    before = state_of(model)
    cut_costs(find_stack(model), mode=Mode(adapter="lora", rank=4, dropout=0.5), shape=SHAPE)
    cut_costs(find_stack(model), mode=Mode(adapter=None, train_norm_and_head=True), shape=SHAPE)
    assert state_of(model) == before


def test_the_model_is_left_as_found_when_a_layer_raises() -> None:
    model = build(CONFIGS["grouped-query attention"]())
    stack = find_stack(model)
    calls = iter(range(100))

    def fail_in_a_probe(_module: nn.Module, _args: Any) -> None:
        if torch.is_grad_enabled() and next(calls) == 1:
            raise RuntimeError("no memory")

    model.model.layers[0].mlp.register_forward_pre_hook(fail_in_a_probe)
    before = state_of(model)
    with pytest.raises(RuntimeError, match="no memory"):
        cut_costs(stack, mode=Mode(adapter=None), shape=SHAPE)
    assert state_of(model) == before


def test_a_large_vocabulary_is_said_to_bound_the_saving() -> None:
    costs: dict[int, CutCost] = {}
    for vocabulary in (64, 4096):
        stack = find_stack(build(LlamaConfig(**GROUPED | {"vocab_size": vocabulary})))
        costs[vocabulary] = cut_costs(stack, mode=Mode(adapter="lora", rank=4), shape=SHAPE)[3]
    small, large = costs.values()
    assert large.head_share > 0.5 > 0.2 > small.head_share
    assert large.step > small.step
    told = explain(large, num_layers=NUM_LAYERS)
    assert f"The unembedding takes {large.head_share:.2f}" in told
    assert f"below {large.floor:.2f}" in told
    assert "unembedding" not in explain(small, num_layers=NUM_LAYERS)
    assert "decoder layers 3 to 3 of 4" in explain(small, num_layers=NUM_LAYERS)


def test_a_rank_without_an_adapter_is_refused() -> None:
    for adapter, rank in (("lora", 0), (None, 8)):
        with pytest.raises(ValueError, match=f"adapter is {adapter!r} and rank {rank}; allowed are"):
            Mode(adapter=adapter, rank=rank)


def test_an_adapter_with_a_trained_head_is_refused() -> None:
    with pytest.raises(ValueError, match="train_norm_and_head is for full fine-tuning"):
        Mode(adapter="lora", rank=8, train_norm_and_head=True)


def test_a_model_with_adapters_is_refused() -> None:
    model = build(CONFIGS["grouped-query attention"]())
    mode = Mode(adapter="lora", rank=4)
    prepared(model, mode, first_trainable=0)
    with pytest.raises(ValueError, match="'self_attn.q_proj' carries an adapter already"):
        cut_costs(find_stack(model), mode=mode, shape=SHAPE)


def test_targets_that_match_nothing_are_refused() -> None:
    stack = find_stack(build(CONFIGS["grouped-query attention"]()))
    with pytest.raises(ValueError, match=r"target_modules \('c_attn',\) .* name nothing .* 'self_attn.q_proj'"):
        cut_costs(stack, mode=Mode(adapter="lora", rank=4, target_modules=("c_attn",)), shape=SHAPE)


def test_a_layer_that_does_not_run_is_refused() -> None:
    model = build(CONFIGS["experts in every other layer"]())
    stack = find_stack(model)
    model.config.num_hidden_layers = 1
    with pytest.raises(ValueError, match=r"decoder layers \[1\] did not run"):
        cut_costs(stack, mode=Mode(adapter=None), shape=SHAPE)
