"""What is trained below the cut is found and said, and nothing else is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from backward_steps import (
    CUT,
    MODES,
    build,
    in_suffix,
)
from peft import PromptTuningConfig, get_peft_model
from tiny import VOCABULARY, add_lora, tiny_llama, train_only
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from axolotl_layersel.model.decoder_stack import find_stack
from axolotl_layersel.training.backward_cut import (
    BackwardCutError,
)
from axolotl_layersel.training.trained_below_cut import obstacles


def lora_with(**options: Any) -> Any:
    return add_lora(tiny_llama(), first_trainable=CUT, **options)


def full_with(wanted: str, **config: Any) -> Any:
    model = tiny_llama(**config)
    train_only(model, lambda name: in_suffix(name) or wanted in name)
    return model


def prompt_tuned() -> Any:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return get_peft_model(tiny_llama(), config)


OBSTACLES: dict[str, tuple[Any, str]] = {
    "trained embeddings": (
        lambda: full_with("embed_tokens"),
        "the input embeddings 'model.embed_tokens' are trained (model.embed_tokens.weight), "
        "so gradients must pass through every layer.",
    ),
    "tied head": (
        lambda: full_with("embed_tokens", tie_word_embeddings=True),
        "the unembedding shares its weight with the input embeddings 'model.embed_tokens', and that is trained",
    ),
    "saved embeddings": (
        lambda: lora_with(modules_to_save=["embed_tokens", "lm_head"]),
        "embed_tokens' are trained (base_model.model.model.embed_tokens.modules_to_save.default.weight)",
    ),
    "trainable tokens": (
        lambda: lora_with(trainable_token_indices=[3, 5]),
        "embed_tokens' are trained (base_model.model.model.embed_tokens.token_adapter",
    ),
    "LoRA on embeddings": (
        lambda: lora_with(target_modules=["model.embed_tokens", "q_proj"]),
        "embed_tokens' are trained (base_model.model.model.embed_tokens.lora_embedding_A.default",
    ),
    "prompt tuning": (prompt_tuned, "a prompt in front of the first decoder layer is trained (prompt_encoder"),
    "frozen layer": (
        lambda: full_with("layers.1.mlp.up_proj"),
        "the frozen decoder layer 'model.layers.1' holds trained parameters (model.layers.1.mlp.up_proj.weight)",
    ),
}


@pytest.mark.parametrize("case", OBSTACLES)
def test_what_keeps_the_backward_pass_from_stopping_is_said(case: str) -> None:
    make, sentence = OBSTACLES[case]
    model = make()
    found = obstacles(model, stack=find_stack(model), first_trainable=CUT)
    assert len(found) == 1
    assert sentence in found[0]
    assert obstacles(model, stack=find_stack(model), first_trainable=0) == []


def test_a_trained_projector_is_an_obstacle() -> None:
    text = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4
    )
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=1))
    train_only(model, lambda name: "language_model.layers.5" in name or "multi_modal_projector" in name)
    stack = find_stack(model)
    (found,) = obstacles(model, stack=stack, first_trainable=5)
    assert found.startswith("parameters outside the decoder layers, the final norm and the unembedding are trained")
    assert "multi_modal_projector.linear_1.bias" in found


@pytest.mark.parametrize("mode", MODES)
def test_a_planned_run_has_no_obstacle(mode: str, tmp_path: Path) -> None:
    model = build(mode, tmp_path, checkpointing="none", stop=True)
    assert obstacles(model, stack=find_stack(model), first_trainable=CUT) == []


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_that_is_trained_by_itself_is_no_obstacle(tied: bool) -> None:
    """LoRA on a tied head trains two factors beside the shared weight, and a copy to save is a copy."""
    model = tiny_llama(tie_word_embeddings=tied)
    stack = find_stack(model)
    adapted = add_lora(model, first_trainable=CUT, target_modules=["q_proj", "lm_head"])
    assert any("lm_head.lora_A" in name for name, p in adapted.named_parameters() if p.requires_grad)
    assert obstacles(adapted, stack=stack, first_trainable=CUT) == []
    if not tied:
        saved = lora_with(modules_to_save=["lm_head", "model.norm"])
        assert obstacles(saved, stack=find_stack(saved), first_trainable=CUT) == []
        assert obstacles(saved, stack=find_stack(saved.base_model.model), first_trainable=CUT) == []


def test_a_stack_of_another_model_is_refused() -> None:
    with pytest.raises(BackwardCutError, match="is not part of the model"):
        obstacles(tiny_llama(), stack=find_stack(tiny_llama()), first_trainable=CUT)
