"""What in a config contradicts layer selection: each conflict and note names the key and what to change."""

import re

import pytest

from axolotl_layersel.config.conflicts import find_conflicts, find_notes, names_plugin

BASE = {"plugins": ["layersel"], "adapter": "lora", "lora_target_linear": True}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unfrozen_parameters": ["model.layers.1"]}, "`unfrozen_parameters` is .*remove it"),
        ({"peft_layers_to_transform": [1]}, "`peft_layers_to_transform` is .*first_layer"),
        ({"peft_layers_pattern": "layers"}, "`peft_layers_pattern` is set"),
        ({"adapter": "llama-adapter"}, "`adapter` is 'llama-adapter'; allowed are lora, qlora"),
        ({"lisa_n_layers": 2}, "lisa"),
        ({"relora": True}, "ReLoRA"),
        ({"plugins": ["layersel", "axolotl.integrations.spectrum.SpectrumPlugin"]}, "Spectrum"),
        ({"plugins": ["layersel", "axolotl.integrations.diffusion.DiffusionPlugin"]}, "diffusion.*remove the plugin"),
        ({"diffusion_lm": {"mask_token_id": 3}, "layersel": {"first_layer": 2}}, "diffusion.*remove the plugin"),
        ({"adapter": "mixlora"}, "`adapter` is 'mixlora'; allowed are lora, qlora"),
        ({"adapter": None, "optimizer": "polora"}, "polora"),
        ({"peft_layer_replication": [[0, 4]]}, "peft_layer_replication"),
        ({"reward_model": True}, "reward models"),
        ({"rl": "grpo"}, "`rl: grpo`.*nor trained"),
        ({"rl": "grpo", "layersel": {"first_layer": 2}}, "`rl: grpo`.*nor trained"),
        ({"activation_offloading": "legacy"}, "activation_offloading: legacy.*`true` or `hidden_states`"),
        ({"skip_prepare_dataset": True}, "^`skip_prepare_dataset` leaves.*first_layer"),
        (
            {"processor_type": "AutoProcessor", "skip_prepare_dataset": True},
            "^`processor_type` has images.*no images, remove.*first_layer: ...}`.*plan: ...}`;.*on text",
        ),
        ({"processor_type": "AutoProcessor"}, "images.*plan: ...}`, with `skip_prepare_dataset: true`"),
        ({"processor_type": "AutoProcessor", "streaming": True}, "images.*batch by batch"),
        ({"rl": "simpo"}, "`rl: simpo` without `simpo_gamma`.*set it, 0.5"),
        ({"rl": "simpo", "layersel": {"first_layer": 2}}, "`rl: simpo` without `simpo_gamma`"),
        ({"fsdp_config": {"x": 1}}, "FSDP1 .* shards the model.*plan"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size: 2"),
        ({"context_parallel": {"size": 4}}, "`context_parallel: {size: 4}` splits the input, so.*plan"),
        ({"sequence_parallel_degree": 2}, "sequence_parallel_degree: 2"),
        ({"expert_parallel_size": 2}, "expert_parallel_size: 2"),
        ({"deepspeed": {"tensor_parallel": {"autotp_size": 4}}}, "autotp_size: 4}` of `deepspeed` splits the model"),
    ],
)
def test_a_conflict_says_what_to_change(changes: dict, message: str) -> None:
    conflicts = find_conflicts({**BASE, **changes})
    assert len(conflicts) == 1
    assert re.search(message, conflicts[0])


@pytest.mark.parametrize(
    "changes",
    [
        {"skip_prepare_dataset": True},
        {"fsdp_config": {"x": 1}},
        {"tensor_parallel_size": 2},
        {"rl": "dpo"},
        {"processor_type": "AutoProcessor"},
        {"processor_type": "AutoProcessor", "skip_prepare_dataset": True},
    ],
)
def test_a_given_cut_needs_no_scoring_and_lifts_the_conflict(changes: dict) -> None:
    assert find_conflicts({**BASE, **changes, "layersel": {"first_layer": 3}}) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_modules_to_save": ["embed_tokens", "lm_head"]}, "`lora_modules_to_save` trains embeddings"),
        ({"lora_target_modules": ["q_proj", "model.embed_tokens"]}, "`lora_target_modules` trains embeddings"),
        ({"peft_trainable_token_indices": [3]}, "`peft_trainable_token_indices` trains embeddings"),
        ({"lora_model_dir": "adapter"}, "`lora_model_dir` continues an adapter"),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "`use_reentrant: true` is kept",
        ),
        (
            {
                "gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"use_reentrant": True},
                "torch_compile": True,
            },
            "`use_reentrant: true` is changed to false",
        ),
    ],
)
def test_what_costs_the_saving_is_a_note(changes: dict, message: str) -> None:
    notes = find_notes({**BASE, **changes})
    assert len(notes) == 1
    assert notes[0].startswith(message)
    assert find_conflicts({**BASE, **changes}) == []


@pytest.mark.parametrize("changes", [{"rl": "dpo"}, {"sample_packing": True}, {"rl": "simpo", "simpo_gamma": 0.0}])
def test_text_that_is_tokenised_beforehand_is_scored_with_a_processor_too(changes: dict) -> None:
    assert find_conflicts({**BASE, "processor_type": "AutoProcessor", **changes}) == []


@pytest.mark.parametrize(
    "sizes",
    [
        {"expert_parallel_size": 1},
        {"context_parallel": {"size": 1}},
        {"deepspeed": "zero2.json"},
        {"deepspeed": "zero3.json"},
        {"fsdp_version": 2, "fsdp_config": {"x": 1}},
        {"fsdp_config": {"fsdp_version": 2}},
        {"fsdp_config": {"version": 2}},
    ],
)
def test_what_leaves_weights_within_reach_is_scored(sizes: dict) -> None:
    assert find_conflicts({**BASE, **sizes}) == []


def test_under_zero_3_reentrant_checkpointing_is_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Named in the config, or by `accelerate launch`, whose plugin tells through the environment."""
    reentrant = {**BASE, "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    assert find_notes(reentrant) != []
    assert find_notes({**reentrant, "deepspeed": "zero3.json"}) == []
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    assert find_notes(reentrant) == []


def test_new_tokens_without_an_adapter_are_noted() -> None:
    (note,) = find_notes({**BASE, "adapter": None, "tokens": ["<new>"]})
    assert note.startswith("`tokens` adds tokens, and full fine-tuning of a suffix freezes the input embeddings")
    assert find_notes({**BASE, "tokens": ["<new>"]}) == []


def test_tiled_mlps_of_several_rows_are_noted() -> None:
    one, several = (find_notes({**BASE, "tiled_mlp": True, "micro_batch_size": rows}) for rows in (1, 2))
    assert len(one) == 1 and one[0].startswith("`tiled_mlp` keeps less for the backward pass")
    assert several[0] == one[0] and "with `micro_batch_size: 2`" in several[1] and "gradients" in several[1]


def test_a_plain_config_has_neither() -> None:
    assert find_conflicts(BASE) == find_notes(BASE) == []


def test_a_config_without_the_plugin_is_nobody_s_business() -> None:
    assert find_conflicts({"plugins": ["other.Plugin"], "relora": True}) == []


@pytest.mark.parametrize(
    "name", ["layersel", "axolotl_layersel.LayerSelPlugin", "axolotl_layersel.plugin:LayerSelPlugin"]
)
def test_every_spelling_is_this_plugin(name: str) -> None:
    assert names_plugin({"plugins": ["another.Plugin", name]})


@pytest.mark.parametrize(
    "name", ["layersel.LayerSelPlugin", "my_layersel.LayerSelPlugin", "axolotl_layersel.Other", None]
)
def test_other_names_are_not(name: str | None) -> None:
    assert not names_plugin({"plugins": [name]})
