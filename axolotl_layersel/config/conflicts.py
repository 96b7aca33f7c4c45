"""What in an axolotl config contradicts layer selection, cancels its saving, or cannot be scored.

Pure functions of the raw config mapping, so that they run at validation, before anything is loaded. Each sentence
says what was got and what to change. A conflict stops the run; a note is logged and the run goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SHORT_NAME = "layersel"
ADAPTERS = ("lora", "qlora")
_EMBEDDING_NAMES = ("embed_tokens", "wte", "embed_in", "word_embeddings", "embeddings", "tok_embeddings")
_GIVE_CUT = "give the cut with `layersel: {first_layer: ...}` or `layersel: {plan: ...}`"


def names_plugin(cfg: Mapping[str, Any]) -> bool:
    """Whether the config lists this plugin, under any spelling."""
    return any(is_plugin(name) for name in as_list(cfg.get("plugins")))


def is_plugin(name: Any) -> bool:
    """Whether this is a name of the plugin: the short one, or a path in the package, its last part after "." or ":"."""
    parts = str(name).replace(":", ".").split(".")
    return parts == [SHORT_NAME] or (parts[0] == "axolotl_layersel" and parts[-1] == "LayerSelPlugin")


def cut_is_given(cfg: Mapping[str, Any]) -> bool:
    """Whether the config gives a cut or a plan, so that nothing is scored."""
    block = cfg.get("layersel")
    block = block if isinstance(block, Mapping) else {}
    return block.get("first_layer") is not None or block.get("plan") is not None


def find_conflicts(cfg: Mapping[str, Any]) -> list[str]:
    """Sentences for everything in the config that a run with layer selection cannot go on with."""
    return list(_conflicts(cfg)) if names_plugin(cfg) else []


def find_notes(cfg: Mapping[str, Any]) -> list[str]:
    """Sentences for what the user should know, though the run goes on."""
    return list(_notes(cfg)) if names_plugin(cfg) else []


def trains_embeddings(cfg: Mapping[str, Any]) -> str | None:
    """The config key that trains embedding rows with an adapter, so that every layer is back-propagated, or None."""
    for key in ("lora_modules_to_save", "lora_target_modules"):
        values = as_list(cfg.get(key))
        if any(str(v).rpartition(".")[2] in _EMBEDDING_NAMES for v in values):
            return key
    return "peft_trainable_token_indices" if cfg.get("peft_trainable_token_indices") else None


def _conflicts(cfg: Mapping[str, Any]) -> Iterator[str]:
    adapter = cfg.get("adapter")
    for key in ("unfrozen_parameters", "peft_layers_to_transform"):
        if cfg.get(key):
            yield (
                f"`{key}` is {_short(cfg[key])}, and the plugin writes that key itself: remove it, or keep it and "
                "remove the plugin; a cut of your own goes into `layersel: {first_layer: ...}`."
            )
    if cfg.get("peft_layers_pattern"):
        yield "`peft_layers_pattern` is set, and the plugin writes that key itself: remove it."
    if adapter is not None and adapter not in ADAPTERS:
        yield f"`adapter` is {adapter!r}; allowed are lora, qlora, or none of them for full fine-tuning."
    if cfg.get("lisa_n_layers") or cfg.get("lisa_step_interval"):
        yield "`lisa_n_layers` re-draws the trained layers in every interval: remove the lisa keys or the plugin."
    if cfg.get("relora") or cfg.get("relora_steps") or cfg.get("jagged_restart_steps"):
        yield "ReLoRA merges and re-initialises adapters as it goes: remove `relora` or the plugin."
    plugins = [str(name) for name in as_list(cfg.get("plugins"))]
    if any(name.startswith("axolotl.integrations.spectrum") for name in plugins):
        yield "the Spectrum plugin chooses layers as well: keep one of the two plugins."
    if cfg.get("diffusion_lm") or any(name.startswith("axolotl.integrations.diffusion") for name in plugins):
        yield "diffusion training predicts masked tokens, not next ones, which is what is scored: remove the plugin."
    if cfg.get("optimizer") == "polora" and not adapter:
        yield "`optimizer: polora` refuses `unfrozen_parameters`, which full fine-tuning of a suffix needs: change it."
    if cfg.get("peft_layer_replication"):
        yield "`peft_layer_replication` repeats layers, so layer indices mean something else: remove it."
    if cfg.get("reward_model") or cfg.get("process_reward_model"):
        yield "reward models have no labels in the vocabulary, so no semantics to score: remove the plugin."
    if cfg.get("rl") and cfg["rl"] not in SCORED_RL:
        yield f"`rl: {cfg['rl']}` cannot be scored, nor trained with a cut; allowed are {', '.join(SCORED_RL)}."
    if cfg.get("activation_offloading") in ("legacy", "disk"):
        yield (
            f"`activation_offloading: {cfg['activation_offloading']}` turns checkpointing on again for every layer, "
            "frozen ones too: use `true` or `hidden_states`."
        )
    if cfg.get("rl") == "simpo" and cfg.get("simpo_gamma") is None:
        yield "`rl: simpo` without `simpo_gamma` fails in the trainer's first step: set it, 0.5 is TRL's own default."
    if not cut_is_given(cfg):
        yield from _not_scorable(cfg)


def _not_scorable(cfg: Mapping[str, Any]) -> Iterator[str]:
    """Why nothing can be scored before training starts."""
    if reason := _split_beyond_scoring(cfg):
        yield (
            f"{reason}, so no process can run the model to score it: score once on one process with `axolotl layersel "
            f"score {cfg.get('axolotl_config_path') or 'CONFIG'}`, then train with `layersel: {{plan: "
            f"{str(cfg.get('output_dir') or 'OUTPUT_DIR').rstrip('/')}/layersel/plan.json}}`; or give the cut with "
            "`layersel: {first_layer: ...}`."
        )
    collated = not (cfg.get("rl") or cfg.get("sample_packing") or cfg.get("pretraining_dataset"))
    if cfg.get("processor_type") and collated:
        with_rows = "" if cfg.get("skip_prepare_dataset") else ", with `skip_prepare_dataset: true` as axolotl needs it"
        yield (
            "`processor_type` has images and text turned into tokens batch by batch while "
            "training, so there is nothing to score before. If your data has no images, remove `processor_type` and "
            f"`skip_prepare_dataset`: the text is scored. For images {_GIVE_CUT}{with_rows}; a plan may come from the "
            "same model scored on text."
        )
    elif cfg.get("skip_prepare_dataset"):
        yield f"`skip_prepare_dataset` leaves rows without tokens, so they cannot be scored: remove it, or {_GIVE_CUT}."


SCORED_RL = ("dpo", "ipo", "orpo", "simpo", "kto")  # scored on chosen and desirable completions (`preference_rows.py`)


def sharded(cfg: Mapping[str, Any]) -> str | None:
    """Why the model of this config is not whole on a process while it trains, or None."""
    if fsdp_version(cfg):
        return "FSDP shards the model"
    if zero_stage(cfg) == 3:
        return "DeepSpeed ZeRO-3 partitions the model"
    return _split_beyond_scoring(cfg)


def fsdp_version(cfg: Mapping[str, Any]) -> int | None:
    """1 or 2 where FSDP shards the model; 1 is what axolotl 0.19 takes where nothing is said, and later ones refuse."""
    block = cfg.get("fsdp_config")
    if not (cfg.get("fsdp") or block):
        return None
    block = block if isinstance(block, Mapping) else {}
    version = cfg.get("fsdp_version") or block.get("fsdp_version") or block.get("version")
    return 2 if str(version) == "2" else 1


def _split_beyond_scoring(cfg: Mapping[str, Any]) -> str | None:
    """Why no process can run the model of this config before training starts, or None."""
    if fsdp_version(cfg) == 1:
        return "FSDP1 (`fsdp_version` is not 2) shards the model"
    if isinstance(size := (_deepspeed(cfg).get("tensor_parallel") or {}).get("autotp_size"), int) and size > 1:
        return f"`tensor_parallel: {{autotp_size: {size}}}` of `deepspeed` splits the model"
    for key in ("tensor_parallel_size", "context_parallel_size", "sequence_parallel_degree", "expert_parallel_size"):
        value = cfg.get(key)
        if isinstance(value, int) and value > 1:
            return f"`{key}: {value}` splits the model or its input"
    block = cfg.get("context_parallel")  # axolotl 0.20 and later; the older key stays
    if isinstance(block, Mapping) and isinstance(block.get("size"), int) and block["size"] > 1:
        return f"`context_parallel: {{size: {block['size']}}}` splits the input"
    return None


def zero_stage(cfg: Mapping[str, Any]) -> int | None:
    """The ZeRO stage of axolotl's `deepspeed:`, a mapping or the path of a JSON file, or of `accelerate launch`."""
    if block := _deepspeed(cfg):
        stage = (block.get("zero_optimization") or {}).get("stage")
        return stage if isinstance(stage, int) else None
    if "zero3" in str(cfg.get("deepspeed")).lower():
        return 3
    launched = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "")
    return int(launched) if launched.isdecimal() else None


def _deepspeed(cfg: Mapping[str, Any]) -> Mapping[str, Any]:
    """Axolotl's `deepspeed:`, read from its file; empty where there is none that can be read."""
    block = cfg.get("deepspeed")
    if isinstance(block, str) and Path(block).is_file():
        block = json.loads(Path(block).read_text(encoding="utf-8"))
    return block if isinstance(block, Mapping) else {}


def _notes(cfg: Mapping[str, Any]) -> Iterator[str]:
    if key := trains_embeddings(cfg):
        yield (
            f"`{key}` trains embeddings, so the backward pass runs through every layer and freezing saves no compute; "
            "train without new tokens, or expect only the saving of adapters and optimizer state."
        )
    if cfg.get("tokens") and not cfg.get("adapter"):
        yield (
            "`tokens` adds tokens, and full fine-tuning of a suffix freezes the input embeddings: the new rows stay as "
            "they were initialised; use `adapter: lora` with `lora_modules_to_save: [embed_tokens, lm_head]` to train "
            "them."
        )
    if cfg.get("lora_model_dir"):
        yield (
            "`lora_model_dir` continues an adapter whose own file says where it sits: adapters of frozen layers stay "
            "where they are and are not trained."
        )
    if cfg.get("tiled_mlp"):
        yield "`tiled_mlp` keeps less for the backward pass and computes MLPs once more; the prediction counts neither."
        if (cfg.get("micro_batch_size") or 1) > 1:
            yield (
                f"`tiled_mlp` with `micro_batch_size: {cfg['micro_batch_size']}`: where axolotl 0.19 cuts rows into "
                "several shards, its gradients of more than one row are wrong, with this plugin or without: use "
                "`micro_batch_size: 1`."
            )
    kwargs = cfg.get("gradient_checkpointing_kwargs") or {}
    if cfg.get("gradient_checkpointing") and isinstance(kwargs, Mapping) and kwargs.get("use_reentrant"):
        if zero_stage(cfg) == 3:  # nothing to choose: a non-reentrant recomputation fails there
            return
        if cfg.get("torch_compile"):
            yield "`use_reentrant: true` is changed to false: a compiled layer may lose the boundary at the cut."
        else:
            yield (
                "`use_reentrant: true` is kept: the input of the first trained layer is made to require grad, and a "
                "gradient is computed that nobody uses; `use_reentrant: false` is cheaper."
            )


def as_list(value: Any) -> list[Any]:
    """The values of a key that takes one or several: none for None."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
