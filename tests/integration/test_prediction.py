"""What is predicted is the run's own way to train, whatever way its config says it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from axolotl.utils.dict import DictDefault
from models import CASES
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama

from axolotl_layersel.cost.cut_cost import StepShape, cut_costs
from axolotl_layersel.integration.apply import adapters_of, mode_of
from axolotl_layersel.integration.run_settings import settings_of
from axolotl_layersel.model.decoder_stack import find_stack

BASE = {
    "base_model": "tiny",
    "output_dir": "out",
    "adapter": "lora",
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_target_modules": ["q_proj"],
}


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def mode(**options: Any) -> Any:
    model = tiny_llama()
    settings = settings_of(DictDefault({**BASE, **options}))
    return mode_of(settings, find_stack(model), adapters_of(settings, model))


def test_compiled_runs_do_not_checkpoint_reentrantly() -> None:
    asked = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    assert mode(**asked).reentrant
    assert not mode(**asked, torch_compile=True).reentrant


def test_a_continued_adapter_is_the_one_that_was_saved(tmp_path: Path) -> None:
    saved = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["v_proj", "down_proj"], task_type="CAUSAL_LM"))
    saved.save_pretrained(tmp_path)
    model = tiny_llama()
    continued = mode(lora_model_dir=str(tmp_path))
    cost = cut_costs(find_stack(model), mode=continued, shape=StepShape(batch=1, positions=8))[0].cut
    assert cost.trainable_parameters == sum(p.numel() for p in saved.parameters() if p.requires_grad)


def test_adapters_on_experts_alone_need_no_plan() -> None:
    """`compare` predicts before a cut is chosen, and so before the plugin writes the targets of its layers."""
    model = next(case for case in CASES if case.name == "Mixtral").model()
    settings = settings_of(DictDefault({**BASE, "lora_target_modules": None, "lora_target_parameters": EXPERTS}))
    found = mode_of(settings, find_stack(model), adapters_of(settings, model))
    cost = cut_costs(find_stack(model), mode=found, shape=StepShape(batch=1, positions=8))[0].cut
    lora = LoraConfig(r=4, target_modules=[], target_parameters=EXPERTS, task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, lora)
    assert cost.trainable_parameters == sum(p.numel() for p in wrapped.parameters() if p.requires_grad)


def test_full_fine_tuning_has_no_adapters() -> None:
    full = mode(adapter=None, lora_r=None, lora_target_modules=None)
    assert full.adapters is None and full.train_norm_and_head
    assert mode().adapters is not None and not mode().train_norm_and_head
