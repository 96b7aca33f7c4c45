"""Tiny real models, built from configs with a seed: no download, no mock."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

VOCABULARY = 61
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tiny_llama(*, num_layers: int = 6, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A float32 Llama in train mode, with grouped-query attention and a vocabulary of 61."""
    torch.manual_seed(seed)
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**{**options, **overrides})).train()


def tiny_llama_4bit(folder: Path, *, num_layers: int = 6, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """The same model as `tiny_llama`, its decoder layers in 4 bits as QLoRA loads them."""
    if not (folder / "config.json").exists():
        tiny_llama(num_layers=num_layers, seed=seed, **overrides).save_pretrained(folder)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.float32)
    return model.train()


def add_lora(
    model: PreTrainedModel, *, first_trainable: int, num_layers: int = 6, seed: int = 1, **options: Any
) -> Any:
    """LoRA on every projection of layers `first_trainable`.., with both factors random, so that both get gradients."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=2,
        target_modules=options.pop("target_modules", PROJECTIONS),
        layers_to_transform=list(range(first_trainable, num_layers)),
        init_lora_weights=False,
        task_type="CAUSAL_LM",
        **options,
    )
    return get_peft_model(model, config).train()


def train_only(model: nn.Module, wanted: Callable[[str], bool]) -> None:
    """Full fine-tuning of the parameters whose name is wanted."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(wanted(name))


def token_batch(*, rows: int = 2, tokens: int = 9, seed: int = 2) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels`, (B, T) each; the first row is right-padded by one."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(1, VOCABULARY, (rows, tokens), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    input_ids[0, -1], attention_mask[0, -1] = 0, 0
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": input_ids.masked_fill(attention_mask == 0, -100),
    }
