"""What a run needs to know of axolotl's validated config, in this package's terms: asked once, when the run starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from axolotl_layersel.config.conflicts import find_notes, fsdp_version, sharded, trains_embeddings, zero_stage
from axolotl_layersel.config.options import LayerSelOptions
from axolotl_layersel.config.prefix_cache import cache_obstacles
from axolotl_layersel.cost.cut_cost import StepShape
from axolotl_layersel.integration import axolotl_api
from axolotl_layersel.model.decoder_stack import DecoderStack
from axolotl_layersel.plan import PLAN_FILE, PLAN_FOLDER
from axolotl_layersel.training.trainable_parameters import resolve_train_head

AUTOCAST_TYPES = (torch.bfloat16, torch.float16)
_FUSED_LOSSES = ("cut_cross_entropy", "liger_fused_linear_cross_entropy", "chunked_cross_entropy")
CACHE_FOLDER = "layersel_prefix_cache"  # in the folder of the prepared data


@dataclass(frozen=True)
class RunSettings:
    """One run's config. The rest of the package asks this, and never the config itself."""

    cfg: Any = field(repr=False)  # axolotl's own, to be passed to axolotl's functions
    config_file: str | None
    options: LayerSelOptions  # the `layersel:` block
    base_model: str
    revision: str | None
    adapter: Literal["lora", "qlora"] | None  # None for full fine-tuning
    continued_adapter: str | None  # folder of an adapter that is trained on
    lora_targets: tuple[str, ...]  # the modules that are listed one by one
    lora_target_linear: bool
    dropout_on_experts: bool  # PEFT is to accept adapters with dropout on single parameters
    output_dir: Path
    cache_folder: Path  # where caches on the disk lie
    datasets: tuple[str, ...]  # their paths or names
    rl: str | None
    seed: int  # of every draw
    autocast: torch.dtype | None  # the trainer's; None for full precision
    shape: StepShape  # of a micro batch
    rows_per_step: int  # of an optimizer step, on one process; packed rows where `packs`
    packs: bool  # rows are packed to the length of a sequence
    max_steps: int | None
    epochs: float
    learning_rate: float
    optimizer: str
    fused_loss: bool  # the loss is computed without logits of all tokens at once
    zero_stage: int | None  # DeepSpeed's
    checkpointing: bool
    reentrant: bool  # checkpointing is reentrant, with a boundary at the cut
    stop_backward: bool  # the backward pass ends at the cut
    sharded: bool  # no process holds the whole model while it trains
    loaded_by_main: bool  # FSDP's `cpu_ram_efficient_loading`: the others get their shards later
    trains_embeddings: str | None  # the key that does, so that gradients must reach the input
    use_cpu: bool
    resume_from_checkpoint: str | None
    auto_resume: bool
    cache_obstacles: tuple[str, ...]  # why there can be no prefix cache
    notes: tuple[str, ...]  # what the user should know about this config

    @property
    def plan_path(self) -> Path:
        """Where this run's plan is written: `<output_dir>/layersel/plan.json`."""
        return self.output_dir / PLAN_FOLDER / PLAN_FILE

    @property
    def cut_is_given(self) -> bool:
        """Whether the config gives a cut or a plan, so that nothing is scored."""
        return self.options.first_layer is not None or self.options.plan is not None

    @property
    def batch_tokens(self) -> int:
        """Padded tokens of a micro batch."""
        return self.shape.batch * self.shape.positions

    def train_norm_and_head(self, stack: DecoderStack) -> bool:
        """Whether final norm and head are trained: in full fine-tuning, where that does not reach the embeddings."""
        return self.adapter is None and resolve_train_head(self.options.train_head, tied=stack.tied)


def settings_of(cfg: Any) -> RunSettings:
    """Everything that is asked of a validated config.

    Args:
        cfg: axolotl's, where a missing key is None.
    """
    options, embeddings = options_of(cfg), trains_embeddings(cfg)
    listed = cfg.lora_target_modules
    kwargs = cfg.gradient_checkpointing_kwargs or {}
    return RunSettings(
        cfg=cfg,
        config_file=cfg.axolotl_config_path,
        options=options,
        base_model=cfg.base_model,
        revision=cfg.revision_of_model,
        adapter=cfg.adapter or None,
        continued_adapter=cfg.lora_model_dir,
        lora_targets=tuple(listed) if isinstance(listed, list) else (),
        lora_target_linear=bool(cfg.lora_target_linear),
        dropout_on_experts=bool(cfg.lora_dropout and not cfg.lora_target_parameters),
        output_dir=Path(cfg.output_dir),
        cache_folder=cache_folder(cfg),
        datasets=tuple(str(d.get("path")) for d in cfg.datasets or cfg.pretraining_dataset or []),
        rl=cfg.rl,
        seed=42 if cfg.seed is None else int(cfg.seed),  # axolotl's own default
        autocast=cfg.torch_dtype if cfg.torch_dtype in AUTOCAST_TYPES else None,
        shape=StepShape(batch=cfg.micro_batch_size or 1, positions=cfg.sequence_len),
        rows_per_step=(cfg.micro_batch_size or 1) * (cfg.gradient_accumulation_steps or 1),
        packs=bool(cfg.sample_packing),
        max_steps=cfg.max_steps if cfg.max_steps and cfg.max_steps > 0 else None,
        epochs=float(cfg.num_epochs or 1),
        learning_rate=float(cfg.learning_rate or 0.0),
        optimizer=str(getattr(cfg.optimizer, "value", cfg.optimizer) or "adamw_torch_fused"),  # axolotl's own default
        fused_loss=any(cfg.get(key) for key in _FUSED_LOSSES),
        zero_stage=zero_stage(cfg),
        checkpointing=bool(cfg.gradient_checkpointing),
        # A compiled layer's frame may be used for another layer, without the boundary hook.
        reentrant=bool(cfg.gradient_checkpointing and kwargs.get("use_reentrant") and not cfg.torch_compile),
        stop_backward=options.stop_backward and not embeddings,
        sharded=sharded(cfg) is not None,
        loaded_by_main=bool((cfg.fsdp_config or {}).get("cpu_ram_efficient_loading")),
        trains_embeddings=embeddings,
        use_cpu=bool(cfg.use_cpu),
        resume_from_checkpoint=cfg.resume_from_checkpoint,
        auto_resume=bool(cfg.auto_resume_from_checkpoints),
        cache_obstacles=tuple(cache_obstacles(cfg)),
        notes=(*find_notes(cfg), *_notes_of_versions(cfg)),
    )


def _notes_of_versions(cfg: Any) -> list[str]:
    """What the user should know about this config with the versions that are installed."""
    in_full = (cfg.fsdp_config or {}).get("state_dict_type") == "FULL_STATE_DICT"
    if not (in_full and cfg.adapter and fsdp_version(cfg) == 2 and axolotl_api.saves_part_of_adapters()):
        return []
    return [
        "`state_dict_type: FULL_STATE_DICT`: checkpoints of this run will hold the first process's share of the "
        "adapters alone, so it cannot be resumed; with SHARDED_STATE_DICT it can. The adapter at the end is whole."
    ]


def options_of(cfg: Mapping[str, Any]) -> LayerSelOptions:
    """The `layersel:` block of a config, validated; all defaults where there is none."""
    return LayerSelOptions(**dict(cfg.get("layersel") or {}))


def cache_folder(cfg: Mapping[str, Any]) -> Path:
    """Where a config's prefix caches on the disk lie; the config need not be validated."""
    given = options_of(cfg).prefix_cache_dir
    return Path(given) if given else Path(cfg.get("dataset_prepared_path") or "last_run_prepared") / CACHE_FOLDER
