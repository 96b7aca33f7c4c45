"""Tiny models of every architecture in the table of `tests/README.md`, built from configs: offline and seeded.

`model_outcomes.py` runs them and makes the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
import without_fla  # noqa: F401
from transformers import AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 128
NUM_LAYERS = 4
MARKERS = ("<!-- models:begin -->", "<!-- models:end -->")
COLUMNS = ("scored", "LoRA", "QLoRA", "full", "backward stops")

# Names that most decoder configs share; a config class takes what it knows and keeps the rest as plain attributes.
COMMON: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
EXPERTS: Mapping[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str  # as users know the model family
    architecture: str  # transformers' config class, without "Config"
    options: Mapping[str, Any] = field(default_factory=dict)  # on top of COMMON
    targets: list[str] | None = None  # `lora_target_modules`; None: `lora_target_linear`
    build: Callable[[], PreTrainedModel] | None = None  # where one config class does not make a causal model
    refused: Mapping[str, str] = field(default_factory=dict)  # column of the table -> reason, part of our own message

    def model(self, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
        """A float32 model in eval mode, with random weights that depend on the seed alone."""
        torch.manual_seed(seed)
        if self.build is not None:
            return self.build().eval()
        options = {**COMMON, **self.options, **overrides}
        config = getattr(transformers, f"{self.architecture}Config")(
            **{name: value for name, value in options.items() if value is not None}
        )
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


GPT2: Mapping[str, Any] = {"n_embd": 32, "n_layer": NUM_LAYERS, "n_head": 4, "n_positions": 64}


def _gemma3_multimodal() -> PreTrainedModel:
    text = {**COMMON, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 5,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    del text["tie_word_embeddings"]
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return transformers.Gemma3ForConditionalGeneration(config)


CASES = (
    Case("Llama", "Llama"),
    Case("Llama 3.2 (tied)", "Llama", {"tie_word_embeddings": True}),
    Case("Mistral", "Mistral", {"sliding_window": 8}),
    Case("Mixtral", "Mixtral", EXPERTS),
    Case("Qwen2", "Qwen2"),
    Case("Qwen2.5 (tied)", "Qwen2", {"tie_word_embeddings": True}),
    Case("Qwen3", "Qwen3"),
    Case("Qwen3-MoE", "Qwen3Moe", {**EXPERTS, "decoder_sparse_step": 1}),
    Case(
        "Qwen3-Next (hybrid)",
        "Qwen3Next",
        {
            **EXPERTS,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "shared_expert_intermediate_size": 16,
        },
    ),
    Case("Gemma", "Gemma", {"tie_word_embeddings": True}),
    Case("Gemma 2 (soft-cap)", "Gemma2", {"tie_word_embeddings": True, "sliding_window": 8}),
    Case("Gemma 3 text", "Gemma3Text", {"tie_word_embeddings": True, "sliding_window": 8}),
    Case("Gemma 3 multimodal", "Gemma3", build=_gemma3_multimodal),
    Case("Phi-3", "Phi3", {"rope_scaling": None}),
    Case("Phi (parallel block)", "Phi"),
    Case("GPT-2", "GPT2", {**GPT2, "tie_word_embeddings": True}, ["c_attn", "c_proj", "c_fc"]),
    Case("GPT-NeoX (parallel block)", "GPTNeoX"),
    Case("GPT-J", "GPTJ", {**GPT2, "rotary_dim": 4}),
    Case("OPT", "OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    Case("BLOOM", "Bloom", {"n_layer": NUM_LAYERS, "n_head": 4, "tie_word_embeddings": True}),
    Case("OLMo (norms without weights)", "Olmo"),
    Case("OLMo 2", "Olmo2"),
    Case("Falcon", "Falcon", {"head_dim": None}),
    Case("StableLM", "StableLm"),
    Case("Cohere (logit scale)", "Cohere", {"tie_word_embeddings": True}),
    Case(
        "Granite (multipliers)",
        "Granite",
        {
            "logits_scaling": 8.0,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.25,
            "tie_word_embeddings": True,
        },
    ),
    Case("SmolLM3", "SmolLM3"),
    Case(
        "DeepSeek-V3",
        "DeepseekV3",
        {
            **EXPERTS,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
        },
    ),
    Case(
        "gpt-oss",
        "GptOss",
        {**EXPERTS, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    Case("GLM-4", "Glm4"),
    Case(
        "Mamba 2",
        "Mamba2",
        {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "chunk_size": 4, "conv_kernel": 2},
        ["in_proj"],  # PEFT adapts no `out_proj` of Mamba layers
    ),
    Case(
        "Nemotron-H (hybrid)",
        "NemotronH",
        {
            **EXPERTS,
            "layers_block_type": ["mamba", "attention", "mamba", "attention"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 2,
            "chunk_size": 4,
        },
        ["in_proj", "q_proj", "k_proj", "v_proj", "o_proj"],
    ),
    Case(
        "Falcon-H1 (hybrid)",
        "FalconH1",
        {
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_n_groups": 1,
            "mamba_d_state": 8,
            "mamba_chunk_size": 8,
        },
        ["in_proj", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    ),
)

GEMMA_3N = Case(  # refused: AltUp keeps several streams, so no layer's output is the final norm's input
    "Gemma 3n",
    "Gemma3nText",
    {
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY,
        "laurel_rank": 4,
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": None,
        "altup_num_inputs": 2,
        "tie_word_embeddings": True,
    },
)


def markdown(rows: Mapping[str, Mapping[str, str]]) -> str:
    """The table in `tests/README.md` from the cells of each model."""
    lines = ["| model | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(cells[column] for column in COLUMNS) + " |" for name, cells in rows.items()]
    return "\n".join(lines)
