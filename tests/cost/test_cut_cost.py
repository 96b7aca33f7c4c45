"""The predicted cost of a cut against torch's own FLOP counter, autograd's saved tensors and PEFT's parameters."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from axolotl.monkeypatch import moe_quant
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import ParamWrapper
from peft.tuners.tuners_utils import BaseTuner
from tiny import tiny_llama_4bit
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    BitsAndBytesConfig,
    BloomConfig,
    DeepseekV3Config,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    JambaConfig,
    LlamaConfig,
    Mamba2Config,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)
from transformers.pytorch_utils import Conv1D

from axolotl_layersel.cost.count_step import flop_counter
from axolotl_layersel.cost.cut_cost import CutCost, Mode, StepCost, StepShape, cut_costs, measure_mode, price_cuts
from axolotl_layersel.model.adapted_modules import adapted_modules
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
EXPERT_TENSORS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
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


def lora(model: Any, *, rank: int = 4, targets: tuple[str, ...] | None = None, **options: Any) -> Mode:
    """LoRA on the named modules, or on all linear ones; options of PEFT's config and of the mode."""
    known = {field.name for field in dataclasses.fields(Mode)}
    config = LoraConfig(
        r=rank,
        target_modules=list(linear_leaves(find_stack(model)) if targets is None else targets),
        task_type="CAUSAL_LM",
        fan_in_fan_out=model.config.model_type == "gpt2",
        **{name: value for name, value in options.items() if name not in known},
    )
    return Mode(adapted_modules(model, config), **{n: value for n, value in options.items() if n in known})


def full(model: Any, **options: Any) -> Mode:
    return Mode(None, train_norm_and_head=not model.config.tie_word_embeddings, **options)


def prepared(model: Any, mode: Mode, *, first_trainable: int) -> Any:
    """The model as it would be trained, set up by PEFT and transformers and, where asked for, by `stop_backward`."""
    stack = find_stack(model)
    if mode.adapters:
        chosen = range(first_trainable, stack.num_layers)
        parameters = [n for n in mode.adapters.parameters if any(f".{i}." in n for i in chosen)]
        config = dataclasses.replace(
            mode.adapters.config, layers_to_transform=list(chosen), target_parameters=parameters or None
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
        torch.ops.aten.convolution_backward: (  # torch's own overlooks groups
            lambda grad, _, w, *rest, **__: 2 * math.prod(grad) * math.prod(w[1:]) * sum(rest[-1][:2])
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
        frozen_flops=0.0,
        backward_flops=backward.get_total_flops(),
        head_flops=0.0,
        saved_activation_bytes=sum(sizes.values()),
        recomputed_bytes=0.0,
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
    )


def agree(predicted: StepCost, reference: StepCost) -> None:
    # transformers computes rotary angles as a product of positions and frequencies, once for all layers.
    assert predicted.forward_flops == pytest.approx(reference.forward_flops, rel=1e-4)
    assert predicted.backward_flops == reference.backward_flops
    assert predicted.trainable_parameters == reference.trainable_parameters
    # The labels, and the mask that eager attention shares, are not the layers' own: under one percent even here.
    assert predicted.saved_activation_bytes == pytest.approx(reference.saved_activation_bytes, rel=0.01)


def mode_for(kind: str, name: str, model: Any, **options: Any) -> Mode:
    return full(model, **options) if kind == "full" else lora(model, targets=TARGETS.get(name), **options)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("name", CONFIGS)
def test_flops_bytes_and_parameters_are_those_of_a_real_step(name: str, kind: str, checkpointing: bool) -> None:
    for stops, first_trainable in ((True, 0), (True, 3), (False, 2)):
        model = build(CONFIGS[name]())
        mode = mode_for(kind, name, model, checkpointing=checkpointing, stop_backward=stops)
        cost = cut_costs(find_stack(model), mode=mode, shape=SHAPE)[first_trainable]
        agree(cost.cut, measured(prepared(model, mode, first_trainable=first_trainable)))
        assert cost.first_trainable == first_trainable


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("grouped-query attention", {"targets": ("q_proj", "v_proj"), "lora_dropout": 0.1}),
        ("grouped-query attention", {"targets": ("gate_proj", "mlp.down_proj")}),
        ("grouped-query attention", {"checkpointing": True, "reentrant": True}),
        ("grouped-query attention", {"checkpointing": True, "use_dora": True}),
        ("grouped-query attention", {"rank_pattern": {"layers.3.mlp.down_proj": 2, "q_proj": 8}}),
        ("attention beside the MLP", {"rank": 2, "targets": ("dense_4h_to_h",), "checkpointing": True}),
        ("stacked experts", {"targets": ("o_proj",), "target_parameters": EXPERT_TENSORS}),
        ("stacked experts", {"targets": (), "target_parameters": EXPERT_TENSORS[:1], "checkpointing": True}),
    ],
    ids=[
        "dropout", "half of the MLP", "reentrant", "DoRA", "ranks of their own", "only the last product",
        "experts' tensors", "experts' tensors alone, recomputed",
    ],
)  # fmt: skip
def test_other_adapters(name: str, options: dict[str, Any]) -> None:
    for first_trainable in (1, 3):
        model = build(CONFIGS[name]())
        mode = lora(model, **options)
        cost = cut_costs(find_stack(model), mode=mode, shape=SHAPE)[first_trainable]
        agree(cost.cut, measured(prepared(model, mode, first_trainable=first_trainable)))


def test_reentrant_checkpointing() -> None:
    for first_trainable in (1, 3):
        model = build(CONFIGS["grouped-query attention"]())
        mode = full(model, checkpointing=True, reentrant=True)
        cost = cut_costs(find_stack(model), mode=mode, shape=SHAPE)[first_trainable]
        agree(cost.cut, measured(prepared(model, mode, first_trainable=first_trainable)))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_attention_whose_scores_start_from_a_bias(kind: str) -> None:
    one_row = StepShape(batch=1, positions=80)  # its mask is made for each row
    model = build(
        BloomConfig(
            vocab_size=128, hidden_size=64, n_layer=NUM_LAYERS, n_head=4, hidden_dropout=0.0, attention_dropout=0.0
        )
    )
    mode = lora(model) if kind == "lora" else full(model)
    cost = cut_costs(find_stack(model), mode=mode, shape=one_row)[2]
    agree(cost.cut, measured(prepared(model, mode, first_trainable=2), one_row))


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
    model = build(config)
    mode = full(model)
    cost = cut_costs(find_stack(model), mode=mode, shape=one_row)[2]
    agree(cost.cut, measured(prepared(model, mode, first_trainable=2), one_row))


HYBRIDS: dict[str, Callable[[], PretrainedConfig]] = {
    "linear attention": lambda: Qwen3NextConfig(
        **GROUPED | EXPERTS,
        head_dim=16,
        num_experts=4,
        moe_intermediate_size=48,
        shared_expert_intermediate_size=48,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
    ),
    "state space": lambda: Mamba2Config(
        vocab_size=128,
        hidden_size=32,
        num_hidden_layers=NUM_LAYERS,
        num_heads=8,
        head_dim=8,
        state_size=8,
        n_groups=2,
        chunk_size=128,
    ),
}


def runs_in_triton() -> bool:
    """Whether flash-linear-attention can be imported: some pairs of its versions and Triton's cannot."""
    try:
        importlib.import_module("fla")
    except (ImportError, ValueError):
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("name", HYBRIDS)
def test_recurrences_count_where_torch_computes_them(name: str, kind: str) -> None:
    """They work in chunks, of which the first of a row needs less: one row of whole chunks is compared."""
    if name == "linear attention" and runs_in_triton() and not torch.cuda.is_available():
        pytest.skip("flash-linear-attention's Triton kernels take the place of torch's code, and need a GPU")
    chunks = StepShape(batch=1, positions=256)
    for stops, first_trainable in ((True, 3), (False, 2)):
        model = build(HYBRIDS[name]())
        mode = lora(model, targets=("in_proj", "o_proj")) if kind == "lora" else full(model)
        mode = dataclasses.replace(mode, stop_backward=stops)
        cost = cut_costs(find_stack(model), mode=mode, shape=chunks)[first_trainable]
        agree(cost.cut, measured(prepared(model, mode, first_trainable=first_trainable), chunks))


def test_a_depthwise_convolution_costs_as_much_as_its_channels_one_by_one() -> None:
    def flops(channels: int, groups: int) -> int:
        convolution = nn.Conv1d(channels, channels, 4, groups=groups)
        with flop_counter() as counter:
            convolution(torch.ones(2, channels, 10, requires_grad=True)).sum().backward()
        return counter.get_total_flops()

    assert flops(6, groups=6) == 6 * flops(1, groups=1)
    with FlopCounterMode(display=False) as stock:
        nn.Conv1d(1, 1, 4)(torch.ones(2, 1, 10, requires_grad=True)).sum().backward()
    assert flops(1, groups=1) == stock.get_total_flops()


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_experts_cost_the_same_in_one_grouped_product(kind: str) -> None:
    found = []
    for implementation in ("eager", "grouped_mm"):
        model = build(CONFIGS["stacked experts"]())
        model.config._experts_implementation = implementation
        mode = lora(model, targets=("q_proj",), target_parameters=EXPERT_TENSORS) if kind == "lora" else full(model)
        costs = cut_costs(find_stack(model), mode=mode, shape=SHAPE)
        assert model.config._experts_implementation == implementation
        found.append([(cost.cut.forward_flops, cost.cut.backward_flops) for cost in costs])
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["grouped-query attention", "stacked experts"])
def test_kernels_that_cannot_be_counted_are_replaced_for_counting(name: str) -> None:
    model = build(CONFIGS[name]())
    stack, mode = find_stack(model), lora(model, targets=("q_proj", "o_proj"))
    expected = cut_costs(stack, mode=mode, shape=SHAPE)
    model.config._attn_implementation = "flash_attention_2"
    model.config._experts_implementation = "scattermoe"
    assert cut_costs(stack, mode=mode, shape=SHAPE) == expected
    assert model.config._attn_implementation == "flash_attention_2"
    assert model.config._experts_implementation == "scattermoe"


@pytest.mark.slow
def test_a_fused_kernel_saves_no_scores_although_they_are_counted_eagerly() -> None:
    """gpt-oss has attention sinks, which torch's own fused attention lacks."""
    costs = {}
    for implementation in ("eager", "kernels-community/vllm-flash-attn3"):
        model = build(GptOssConfig(**GROUPED | EXPERTS, num_local_experts=4, head_dim=16))
        model.config._attn_implementation = implementation
        mode = lora(model, targets=("q_proj",))
        costs[implementation] = [
            cut_costs(find_stack(model), mode=mode, shape=StepShape(batch=1, positions=n))[0].cut
            for n in (1024, 2048, 4096)
        ]
    eager, fused = costs.values()
    assert [cost.backward_flops for cost in eager] == [cost.backward_flops for cost in fused]
    one, two, four = (cost.saved_activation_bytes for cost in fused)
    assert four - two == pytest.approx(2 * (two - one)) and eager[2].saved_activation_bytes > 5 * four


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "autocast"])
def test_a_step_with_4_bit_weights(tmp_path: Path, autocast: torch.dtype | None) -> None:
    packed = tiny_llama_4bit(tmp_path)
    mode = lora(packed, rank=2)
    costs = cut_costs(find_stack(packed), mode=mode, shape=SHAPE, autocast=autocast)
    plain = build(LlamaConfig(**{**packed.config.to_dict(), "quantization_config": None, "dtype": None}))
    floats = cut_costs(find_stack(plain), mode=mode, shape=SHAPE, autocast=autocast)
    for one, other in zip(costs, floats, strict=True):
        assert (one.cut.forward_flops, one.cut.backward_flops) == (other.cut.forward_flops, other.cut.backward_flops)
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        reference = measured(prepared(packed, mode, first_trainable=4))
    # On a CPU, a kernel that torch's counter does not see computes the forward pass of frozen layers.
    agree(costs[4].cut, dataclasses.replace(reference, forward_flops=floats[4].cut.forward_flops))


def test_8_bit_weights_count_with_the_shape_that_they_stand_for() -> None:
    plain = build(CONFIGS["grouped-query attention"]())
    packed = build(CONFIGS["grouped-query attention"]())
    for layer in find_stack(packed).layers:
        old = layer.mlp.up_proj
        layer.mlp.up_proj = bitsandbytes.nn.Linear8bitLt(64, 160, bias=False, has_fp16_weights=False)
        layer.mlp.up_proj.load_state_dict(old.state_dict())
        layer.mlp.up_proj.to("cpu")
    before = [(name, type(module)) for name, module in packed.named_modules()]
    costs = [cut_costs(find_stack(model), mode=lora(plain), shape=SHAPE) for model in (plain, packed)]
    assert costs[0] == costs[1]
    assert [(name, type(module)) for name, module in packed.named_modules()] == before


@pytest.mark.slow
def test_a_model_that_reads_the_bias_of_a_module_with_4_bit_weights(tmp_path: Path) -> None:
    """Transformers 5.20 subtracts the bias of Jamba's `dt_proj` from its output if the model is quantised."""
    options = GROUPED | {"num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1}
    build(JambaConfig(**options, num_experts=1, num_experts_per_tok=1)).save_pretrained(tmp_path)
    quantisation = BitsAndBytesConfig(load_in_4bit=True)
    packed, plain = (
        Auto.from_pretrained(tmp_path, quantization_config=chosen, dtype=torch.float32).train()
        for chosen in (quantisation, None)
    )
    costs = [cut_costs(find_stack(model), mode=lora(plain), shape=SHAPE)[1].cut for model in (packed, plain)]
    assert costs[0].forward_flops == costs[1].forward_flops


def test_experts_in_4_bit_with_adapters_on_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """As axolotl stores them, and with what it changes in PEFT for them: the changes are taken back afterwards."""
    changed = ((BaseTuner, "_inject_parameters"), (BaseTuner, "_check_target_module_exists"))
    for owner, name in (*changed, (ParamWrapper, "_activate_lora")):
        monkeypatch.setattr(owner, name, vars(owner)[name])
    monkeypatch.setattr(moe_quant.patch_peft_target_parameters_matching, "_axolotl_patched", False, raising=False)
    moe_quant.patch_peft_target_parameters_matching()
    model = build(CONFIGS["stacked experts"]())
    for layer in find_stack(model).layers:
        for name in ("gate_up_proj", "down_proj"):
            replace_parameter_4bit(layer.mlp.experts, name, quant_type="nf4")
    mode = lora(model, targets=("q_proj",), target_parameters=EXPERT_TENSORS)
    assert len(mode.adapters.parameters) == 2 * NUM_LAYERS
    before = state_of(model)
    cost = cut_costs(find_stack(model), mode=mode, shape=SHAPE)[2]
    assert state_of(model) == before
    agree(cost.cut, measured(prepared(model, mode, first_trainable=2)))


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
    model = build(config)
    mode = lora(model, rank=2)
    all_layers, cost = cut_costs(find_stack(model), mode=mode, shape=StepShape(batch=1, positions=10))
    assert cost.cut.forward_flops == 2 * (11520 + 3200) + 5120 + (2560 + 2560)
    adapters = (
        2 * 2560 + 2560 + 40 * (8 + 8 + 8 + 16)
    )  # out of the rank twice, into it, and inputs of o, gate, up, down
    assert cost.cut.backward_flops == 5120 + 20 * 448 + 8000 + adapters == 31360
    assert cost.cut.trainable_parameters == 2 * (64 + 64)
    assert cost.cut.frozen_flops == 11520 + 3200
    assert cost.floor == (2 * (11520 + 3200) + 2 * 5120) / all_layers.cut.flops
    assert all_layers.cut.backward_flops == 5120 + 2 * (11520 + 8000 + 3 * 2560 + 2560)
    assert cost.backward == 31360 / all_layers.cut.backward_flops
    assert cost.head_share == 2 * 5120 / (cost.cut.forward_flops + 31360)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stops", [False, True])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_later_cut_never_costs_more(kind: str, stops: bool, checkpointing: bool) -> None:
    model = build(CONFIGS["experts in every other layer"]())
    mode = mode_for(kind, "experts in every other layer", model, checkpointing=checkpointing, stop_backward=stops)
    costs = cut_costs(find_stack(model), mode=mode, shape=SHAPE)
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
    model, frozen = build(config), 0.75
    expected = {("full", False): 1 - 2 / 3 * frozen, ("full", True): 1 - 3 / 4 * frozen}
    expected |= {("lora", False): 1 - 1 / 2 * frozen, ("lora", True): 1 - 2 / 3 * frozen}
    for (kind, checkpointing), step in expected.items():
        # With reentrant checkpointing a layer is recomputed to its end, as the formulas have it.
        options = {"checkpointing": checkpointing, "reentrant": True}
        mode = lora(model, rank=1, **options) if kind == "lora" else Mode(None, **options)
        cost = cut_costs(find_stack(model), mode=mode, shape=StepShape(batch=1, positions=4))[12]
        assert cost.step == pytest.approx(step, abs=0.02), (kind, checkpointing)


def test_measurements_serve_other_shapes_and_checkpointing() -> None:
    model = build(CONFIGS["grouped-query attention"]())
    stack, mode = find_stack(model), lora(model)
    measurements = measure_mode(stack, mode=mode)
    for other in (mode, dataclasses.replace(mode, checkpointing=True), dataclasses.replace(mode, stop_backward=False)):
        for shape in (SHAPE, StepShape(batch=1, positions=7)):
            assert price_cuts(measurements, mode=other, shape=shape) == cut_costs(stack, mode=other, shape=shape)


def test_autocast_keeps_half_precision_activations() -> None:
    model = build(CONFIGS["grouped-query attention"]())
    stack, mode = find_stack(build(CONFIGS["grouped-query attention"]())), lora(model)
    cost = cut_costs(stack, mode=mode, shape=SHAPE, autocast=torch.bfloat16)[2]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reference = measured(prepared(model, mode, first_trainable=2))
    assert cost.cut.saved_activation_bytes == pytest.approx(reference.saved_activation_bytes, rel=0.05)
    assert cost.cut.saved_activation_bytes < cut_costs(stack, mode=mode, shape=SHAPE)[2].cut.saved_activation_bytes


def state_of(model: nn.Module) -> list[Any]:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    modules = [(m.training, [dict(vars(m)[name]) for name in hooks], sorted(vars(m))) for m in model.modules()]
    parameters = [(n, p.requires_grad, p.grad, p.detach().clone().tolist()) for n, p in model.named_parameters()]
    return [modules, parameters, torch.get_rng_state().tolist(), torch.is_grad_enabled()]


def test_the_model_is_left_as_found() -> None:
    model = build(CONFIGS["grouped-query attention"]())
    model.model.layers[1].requires_grad_(False)
    model.model.layers[2].eval()
    model.gradient_checkpointing_enable()
    before = state_of(model)
    cut_costs(find_stack(model), mode=lora(model, lora_dropout=0.5), shape=SHAPE)
    cut_costs(find_stack(model), mode=full(model), shape=SHAPE)
    assert state_of(model) == before


def test_experts_are_left_as_found() -> None:
    """PEFT adapts their tensors within a forward pass, which moves them behind the other parameters of their module."""
    model = build(CONFIGS["stacked experts"]())
    before = state_of(model)
    cut_costs(find_stack(model), mode=lora(model, targets=(), target_parameters=EXPERT_TENSORS[:1]), shape=SHAPE)
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
        cut_costs(stack, mode=lora(model), shape=SHAPE)
    assert state_of(model) == before


def test_a_large_vocabulary_bounds_the_saving() -> None:
    costs: dict[int, CutCost] = {}
    for vocabulary in (64, 4096):
        model = build(LlamaConfig(**GROUPED | {"vocab_size": vocabulary}))
        costs[vocabulary] = cut_costs(find_stack(model), mode=lora(model), shape=SHAPE)[3]
    small, large = costs.values()
    assert large.head_share > 0.5 > 0.2 > small.head_share
    assert large.step > large.floor > small.step > small.floor


def test_an_adapter_with_a_trained_head_is_refused() -> None:
    with pytest.raises(ValueError, match="train_norm_and_head is for full fine-tuning"):
        lora(build(CONFIGS["grouped-query attention"]()), train_norm_and_head=True)


def test_a_model_with_adapters_is_refused() -> None:
    model = build(CONFIGS["grouped-query attention"]())
    mode = lora(model)
    prepared(model, mode, first_trainable=0)
    with pytest.raises(ValueError, match="'layers.0.self_attn.q_proj' carries an adapter already"):
        cut_costs(find_stack(model), mode=mode, shape=SHAPE)


def test_targets_that_match_nothing_are_refused() -> None:
    model = build(CONFIGS["grouped-query attention"]())
    with pytest.raises(ValueError, match=r"target_modules \{'c_attn'\} .* match nothing .* \['self_attn.q_proj"):
        cut_costs(find_stack(model), mode=lora(model, targets=("c_attn",)), shape=SHAPE)


def test_a_layer_that_does_not_run_is_refused() -> None:
    model = build(CONFIGS["experts in every other layer"]())
    stack = find_stack(model)
    model.config.num_hidden_layers = 1
    with pytest.raises(ValueError, match=r"decoder layers \[1\] did not run"):
        cut_costs(stack, mode=Mode(None), shape=SHAPE)
