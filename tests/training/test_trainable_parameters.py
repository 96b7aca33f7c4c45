"""Adapters sit where the user's targets and the plan both say, whatever way the targets are written.

The reference is axolotl's own adapter loading without the plugin: with the plugin's config keys, the same loading must
give the same adapter parameters, minus those of the frozen layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from axolotl.loaders.adapter import load_lora
from axolotl.utils.dict import DictDefault
from axolotl.utils.freeze import freeze_layers_except
from models import CASES
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from axolotl_layersel.cost.cut_cost import StepShape, cut_costs
from axolotl_layersel.integration import apply
from axolotl_layersel.integration.run_settings import settings_of
from axolotl_layersel.model.decoder_stack import find_stack
from axolotl_layersel.model.parameter_names import layer_of
from axolotl_layersel.plan import Plan
from axolotl_layersel.training.first_step_check import check_trainable
from axolotl_layersel.training.trainable_parameters import expected_trainable, full_patterns

BASE = {"base_model": "tiny", "adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
ATTENTION = ["q_proj", "v_proj"]
ALL = [f"model.layers.{i}.self_attn.q_proj" for i in range(12)]


def tiny(name: str, **overrides: Any) -> PreTrainedModel:
    """The model of that row of the table in `tests/README.md`."""
    return next(case for case in CASES if case.name == name).model(**overrides)


def llama(**overrides: Any) -> PreTrainedModel:
    """Twelve layers, so that layer 1 and layers 10 and 11 start alike."""
    return tiny("Llama", num_hidden_layers=12, **overrides)


def updates_of(cfg: Mapping[str, Any], model: PreTrainedModel, cut: int) -> dict[str, Any]:
    """The config keys that the plugin writes."""
    num_layers = find_stack(model).num_layers
    plan = Plan(base_model="tiny", num_layers=num_layers, first_trainable=cut, adapter=cfg.get("adapter"))
    settings = settings_of(DictDefault({"output_dir": "out", **cfg}))
    return apply.config_updates(settings, model, plan, apply.adapters_of(settings, model))


def trained(model: nn.Module) -> set[str]:
    """Names of the parameters that require grad."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def with_and_without(
    options: Mapping[str, Any], make: Callable[[], PreTrainedModel], cut: int
) -> tuple[set[str], set[str], dict[str, Any]]:
    """What axolotl trains with the plugin's keys and without, and the keys; with them, the plan's check is made."""
    cfg = {**BASE, **options}
    stock, _ = load_lora(make(), DictDefault(dict(cfg)))
    model = make()
    updates = updates_of(cfg, model, cut)
    ours, _ = load_lora(model, DictDefault({**cfg, **updates}))
    from_peft = trained(ours)
    freeze_layers_except(ours, updates["unfrozen_parameters"])
    expected = expected_trainable(
        [name for name, _ in ours.named_parameters()],
        find_stack(ours),
        first_trainable=cut,
        adapter="lora",
        train_norm_and_head=False,
    )
    check_trainable(ours, expected=expected)
    assert trained(ours) == from_peft, "the two ways of saying it, in one config each, differ"
    return trained(ours), trained(stock), updates


LLAMA_OPTIONS: dict[str, dict[str, Any]] = {
    "list": {"lora_target_modules": ATTENTION},
    "linear": {"lora_target_linear": True},
    "linear and list": {"lora_target_linear": True, "lora_target_modules": ["lm_head"]},
    "all-linear": {"lora_target_modules": "all-linear"},
    "regex": {"lora_target_modules": r".*\.(q_proj|down_proj)"},
    "regex over layers": {"lora_target_modules": r"model\.layers\.(\d|1\d)\.mlp\.(up|gate)_proj"},
    "regex with head": {"lora_target_modules": r"(.*q_proj|lm_head)"},
    "full paths": {"lora_target_modules": ALL},
    "paths from the layer on": {"lora_target_modules": [name.removeprefix("model.") for name in ALL]},
    "full paths and names": {"lora_target_modules": [*ALL, "v_proj"]},
    "exclude list": {"lora_target_linear": True, "lora_exclude_modules": ["q_proj", "model.layers.11.mlp.up_proj"]},
    "exclude regex": {"lora_target_modules": ATTENTION, "lora_exclude_modules": r".*\.10\..*v_proj"},
    "regex and exclude": {"lora_target_modules": r".*_proj", "lora_exclude_modules": ["o_proj"]},
    "DoRA": {"lora_target_modules": ATTENTION, "peft_use_dora": True},
    "rsLoRA": {"lora_target_modules": ATTENTION, "peft_use_rslora": True},
    "patterns": {
        "lora_target_modules": ATTENTION,
        "lora_rank_pattern": {"q_proj": 2},
        "lora_alpha_pattern": {r".*\.1\..*v_proj": 1},
    },
    "head saved": {"lora_target_modules": ATTENTION, "lora_modules_to_save": ["lm_head"]},
    "norms saved": {"lora_target_modules": ATTENTION, "lora_modules_to_save": ["input_layernorm", "lm_head"]},
    "head": {"lora_target_modules": [*ATTENTION, "lm_head"]},
    "embeddings": {"lora_target_modules": [*ATTENTION, "embed_tokens"]},
    "embeddings saved": {"lora_target_linear": True, "lora_modules_to_save": ["embed_tokens", "lm_head"]},
    "token rows": {"lora_target_modules": ATTENTION, "peft_trainable_token_indices": [3, 5]},
    "dropout": {"lora_target_modules": ATTENTION, "lora_dropout": 0.1},
}


@pytest.mark.parametrize("cut", [1, 10])
@pytest.mark.parametrize("options", LLAMA_OPTIONS.values(), ids=LLAMA_OPTIONS)
def test_adapters_are_axolotl_s_own_minus_the_frozen_layers(options: dict[str, Any], cut: int) -> None:
    ours, stock, _ = with_and_without(options, llama, cut)
    stack = find_stack(llama())
    frozen = {name for name in stock if (layer := layer_of(name, stack)) is not None and layer < cut}
    assert frozen and ours == stock - frozen
    assert {layer_of(name, stack) for name in ours} - {None} == set(range(cut, 12))


EXPERTS: dict[str, tuple[str, dict[str, Any]]] = {
    "full suffix": ("Mixtral", {"lora_target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
    "short": ("Mixtral", {"lora_target_modules": ["q_proj"], "lora_target_parameters": ["gate_up_proj"]}),
    "Qwen3-MoE": ("Qwen3-MoE", {"lora_target_linear": True, "lora_target_parameters": ["experts.down_proj"]}),
    "gpt-oss": ("gpt-oss", {"lora_target_linear": True, "lora_target_parameters": ["mlp.experts.gate_up_proj"]}),
    "w1 to w3": ("Mixtral", {"lora_target_modules": ["w1", "w2", "w3"]}),
    "w1 to w3, attention, dropout": (
        "Mixtral",
        {"lora_target_modules": ["q_proj", "w1", "w2", "w3"], "lora_dropout": 0.1},
    ),
    "router": ("Mixtral", {"lora_target_modules": ["q_proj", "gate"]}),
    "regex on experts": ("Mixtral", {"lora_target_modules": r".*\.(q_proj|w1|w2|w3)"}),
    "all-linear": ("Mixtral", {"lora_target_modules": "all-linear"}),
    "linear with shared experts": ("Qwen3-Next (hybrid)", {"lora_target_linear": True}),
    "linear after a dense layer": ("DeepSeek-V3", {"lora_target_linear": True, "lora_dropout": 0.1}),
}


@pytest.mark.parametrize(("name", "options"), EXPERTS.values(), ids=EXPERTS)
def test_fused_experts_get_adapters_in_the_plan_s_layers_alone(name: str, options: dict[str, Any]) -> None:
    """PEFT ignores `layers_to_transform` for parameters, and turns some modules into parameters by itself."""
    ours, stock, updates = with_and_without(options, lambda: tiny(name), 2)
    stack = find_stack(tiny(name))
    frozen = {n for n in stock if (layer_of(n, stack) or 0) < 2}
    assert frozen and ours == stock - frozen
    assert all(layer_of(n, stack) in (2, 3) for n in updates.get("lora_target_parameters", []))
    ranks = {n: p.shape for n, p in load_lora(tiny(name), DictDefault({**BASE, **options}))[0].named_parameters()}
    model = load_lora(tiny(name), DictDefault({**BASE, **options, **updates}))[0]
    assert all(p.shape == ranks[n] for n, p in model.named_parameters() if n in ours)


@pytest.mark.parametrize("key", ["full suffix", "short", "Qwen3-MoE", "gpt-oss"])
def test_the_prediction_counts_the_adapters_of_experts(key: str) -> None:
    name, options = EXPERTS[key]
    cfg, model = DictDefault({**BASE, **options}), tiny(name)
    updates = updates_of(cfg, model, 2)
    stack = find_stack(model)
    settings = settings_of(DictDefault({"output_dir": "out", **cfg}))
    mode = apply.mode_of(settings, stack, apply.adapters_of(settings, model))
    cost = cut_costs(stack, mode=mode, shape=StepShape(batch=1, positions=8))[2]
    real, _ = load_lora(tiny(name), DictDefault({**BASE, **options, **updates}))
    assert cost.cut.trainable_parameters == sum(p.numel() for p in real.parameters() if p.requires_grad)


def test_vision_towers_get_no_adapters() -> None:
    """Their layers are numbered like the decoder's; PEFT takes the first number that it finds."""
    ours, stock, updates = with_and_without({"lora_target_linear": True}, lambda: tiny("Gemma 3 multimodal"), 3)
    assert any("vision_tower" in name for name in stock) and not any("vision_tower" in name for name in ours)
    assert updates["peft_layers_pattern"] == "language_model.layers"
    assert {layer_of(name, find_stack(tiny("Gemma 3 multimodal"))) for name in ours} == {3}


def test_all_linear_modules_are_those_of_the_decoder_where_there_are_towers() -> None:
    ours, stock, _ = with_and_without({"lora_target_modules": "all-linear"}, lambda: tiny("Gemma 3 multimodal"), 3)
    stack = find_stack(tiny("Gemma 3 multimodal"))
    assert ours == {name for name in stock if layer_of(name, stack) == 3}
    assert any("vision_tower" in name for name in stock)


def test_a_regex_that_names_the_text_tower_is_narrowed_to_the_plan_s_layers() -> None:
    """As axolotl's example configs for multimodal models write it; its dots stand for any character."""
    pattern = r"model.language_model.layers.[\d]+.(mlp|cross_attn|self_attn).(up|down|gate|q|k|v|o)_proj"
    ours, stock, updates = with_and_without({"lora_target_modules": pattern}, lambda: tiny("Gemma 3 multimodal"), 3)
    stack = find_stack(tiny("Gemma 3 multimodal"))
    assert ours == {name for name in stock if layer_of(name, stack) == 3} and len(updates["lora_target_modules"]) == 7
    assert {layer_of(name, stack) for name in stock} == {0, 1, 2, 3}


def test_a_linear_head_that_axolotl_adapts_keeps_its_adapter() -> None:
    """GPT-NeoX: `lora_target_linear` of axolotl 0.19 takes the head along, which it knows under an older name."""
    ours, stock, _ = with_and_without({"lora_target_linear": True}, lambda: tiny("GPT-NeoX (parallel block)"), 2)
    heads = {n for n in stock if "lm_head" in n}
    assert {n for n in ours if "lm_head" in n} == heads
    assert bool(heads) == version("axolotl").startswith("0.19.")


def test_a_continued_adapter_is_trained_in_the_plan_s_layers_alone(tmp_path: Path) -> None:
    cfg = {**BASE, "lora_target_modules": [*ATTENTION, "lm_head"], "lora_modules_to_save": ["model.norm"]}
    first, _ = load_lora(llama(), DictDefault(dict(cfg)))
    first.save_pretrained(tmp_path)
    model = llama()
    updates = updates_of({**cfg, "lora_model_dir": str(tmp_path)}, model, 10)
    assert set(updates) == {"unfrozen_parameters"}
    ours, _ = load_lora(model, DictDefault({**cfg, "lora_model_dir": str(tmp_path), **updates}))
    freeze_layers_except(ours, updates["unfrozen_parameters"])
    stack = find_stack(ours)
    names = [name for name, _ in ours.named_parameters()]
    expected = expected_trainable(names, stack, first_trainable=10, adapter="lora", train_norm_and_head=False)
    check_trainable(ours, expected=expected)
    kept = {n for n in trained(first) if layer_of(n, find_stack(llama())) in (10, 11, None)}
    assert trained(ours) == kept and any("lm_head" in n for n in kept) and any("model.norm" in n for n in kept)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_target_modules": r"model\.layers\.[0-4]\.self_attn\.q_proj"}, "matches 5 modules, none of them in"),
        ({"lora_target_modules": ALL[:5]}, "lists no module of the decoder layers 10 to 11"),
        ({"lora_target_parameters": ["experts.gate_up_proj"]}, "matches 0 parameters, none of them in"),
    ],
)
def test_targets_outside_of_the_plan_s_layers_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        updates_of({**BASE, **options}, llama(), 10)


def test_a_layer_without_any_adapter_is_refused_by_number() -> None:
    model = llama()
    cfg = {**BASE, "lora_target_modules": ["model.layers.11.self_attn.q_proj"]}
    ours, _ = load_lora(model, DictDefault({**cfg, **updates_of(cfg, model, 10)}))
    with pytest.raises(ValueError, match=r"decoder layers \[10\] are to be trained, but no parameter"):
        expected_trainable(
            [n for n, _ in ours.named_parameters()],
            find_stack(ours),
            first_trainable=10,
            adapter="lora",
            train_norm_and_head=False,
        )


@pytest.mark.parametrize("cut", [0, 1, 2, 10, 11])
def test_full_patterns_do_not_take_layer_1_for_layer_10(cut: int) -> None:
    model = llama()
    updates = updates_of({"base_model": "tiny"}, model, cut)
    freeze_layers_except(model, updates["unfrozen_parameters"])
    stack = find_stack(model)
    expected = expected_trainable(
        [n for n, _ in model.named_parameters()], stack, first_trainable=cut, adapter=None, train_norm_and_head=True
    )
    check_trainable(model, expected=expected)
    assert {layer_of(name, stack) for name in trained(model)} == {*range(cut, 12), None}
    assert "model.embed_tokens.weight" not in trained(model)


def test_full_patterns_without_the_head_leave_norm_and_head_frozen() -> None:
    model = llama()
    freeze_layers_except(model, full_patterns(find_stack(model), first_trainable=11, train_norm_and_head=False))
    assert {layer_of(name, find_stack(model)) for name in trained(model)} == {11}


def with_scalar() -> PreTrainedModel:
    """A model with a 0-dimensional parameter, on which axolotl's freezing raises TypeError."""
    model = llama()
    model.model.register_parameter("gate", nn.Parameter(torch.tensor(1.0)))
    return model


@pytest.mark.parametrize("continued", [False, True])
def test_a_parameter_that_is_a_single_number_is_refused_where_axolotl_cannot_freeze_it(
    continued: bool, tmp_path: Path
) -> None:
    LoraConfig(target_modules=ATTENTION).save_pretrained(tmp_path)
    options = {**BASE, "lora_model_dir": str(tmp_path)} if continued else {}
    with pytest.raises(ValueError, match="'model.gate' is a single number"):
        updates_of({"base_model": "tiny", **options}, with_scalar(), 10)


def test_a_parameter_that_is_a_single_number_does_not_hinder_a_new_adapter() -> None:
    model = with_scalar()
    cfg = {**BASE, "lora_target_modules": ATTENTION}
    updates = updates_of(cfg, model, 10)
    assert "unfrozen_parameters" not in updates
    ours, _ = load_lora(model, DictDefault({**cfg, **updates}))
    assert {layer_of(name, find_stack(ours)) for name in trained(ours)} == {10, 11}
