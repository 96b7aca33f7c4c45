"""Apply a plan to a run: the config keys that axolotl trains by, what the cut costs, and the files that tell of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from axolotl.loaders.adapter import _build_peft_lora_config, _patch_peft_param_wrapper_dropout
from axolotl.utils.logging import get_logger
from peft import LoraConfig
from torch import nn

from axolotl_layersel.config.conflicts import find_notes, sharded, trains_embeddings
from axolotl_layersel.cost.cut_cost import Mode, StepShape
from axolotl_layersel.cost.prediction import predict
from axolotl_layersel.integration.run_settings import (
    autocast_of,
    options_of,
    plan_path,
    reentrant,
    stops_backward,
    trains_head,
)
from axolotl_layersel.integration.runnable_model import ready_to_run
from axolotl_layersel.model.adapted_modules import adapted_modules
from axolotl_layersel.model.decoder_stack import DecoderStack, find_stack
from axolotl_layersel.model.latent_states import left_as_found
from axolotl_layersel.plan import Plan, PlanError, read_plan, write_text
from axolotl_layersel.report.page import write_report
from axolotl_layersel.report.recipe import RECIPE_FILE, recipe_text
from axolotl_layersel.report.table import print_plan
from axolotl_layersel.training import adapter_targets as adapters
from axolotl_layersel.training import trainable_parameters as targets

LOG = get_logger("axolotl.integrations.layersel")
SCORED_FILE = "plan.scored.json"  # an earlier run's, where this one was given its cut


def config_updates(cfg: Any, model: nn.Module, plan: Plan) -> dict[str, Any]:
    """The config keys that make axolotl train exactly the plan's layers, in this run's mode.

    Raises:
        ValueError: the user's targets lie outside of the plan's layers, or axolotl cannot freeze this model.
    """
    stack = find_stack(model)
    k = plan.first_trainable
    scalar = next((name for name, p in model.named_parameters() if p.dim() == 0), None)
    if scalar and (not cfg.adapter or cfg.lora_model_dir):
        raise ValueError(
            f"the parameter {scalar!r} is a single number, and axolotl's `unfrozen_parameters` fails on such a model: "
            "train it with a new adapter (`adapter: lora`)"
        )
    if not cfg.adapter:
        patterns = targets.full_patterns(stack, first_trainable=k, train_head=trains_head(cfg, stack))
        return {"unfrozen_parameters": patterns}
    if cfg.lora_model_dir:
        return {"unfrozen_parameters": adapters.continued_patterns(stack, first_trainable=k)}
    listed = cfg.lora_target_modules
    updates = adapters.adapter_updates(
        model,
        stack,
        first_trainable=k,
        stock=_build_peft_lora_config(model, cfg),
        named=listed if isinstance(listed, list) else [],
        target_linear=bool(cfg.lora_target_linear),
    )
    if cfg.lora_dropout and not cfg.lora_target_parameters and "lora_target_parameters" in updates:
        _patch_peft_param_wrapper_dropout()  # as axolotl does where PEFT adds these parameters by itself
    if scalar:  # adapters are trained and everything else is frozen without this key, too
        del updates["unfrozen_parameters"]
    return updates


def complete(cfg: Any, model: nn.Module, plan: Plan, updates: Mapping[str, Any]) -> Plan:
    """The plan with the config keys that apply it, what they cost, and the notes of this config."""
    notes = [note for note in find_notes(cfg) if note not in plan.notes]
    plan = dataclasses.replace(plan, config_updates=dict(updates), notes=[*plan.notes, *notes])
    if sharded(cfg):  # no process holds the layers whose shapes a prediction is made from
        return plan
    stack = find_stack(model)
    key = trains_embeddings(cfg)
    with ready_to_run(model, stack), left_as_found(model, autocast=autocast_of(cfg)):
        prediction = predict(
            stack,
            mode=mode_of(cfg, model, stack),
            first_trainable=plan.first_trainable,
            shape=StepShape(batch=cfg.micro_batch_size or 1, positions=cfg.sequence_len),
            autocast=autocast_of(cfg),
            why=f"`{key}` trains embeddings, so the backward pass runs through every layer." if key else None,
        )
    return dataclasses.replace(plan, prediction=prediction)


def mode_of(cfg: Any, model: nn.Module, stack: DecoderStack) -> Mode:
    """How a config trains, in the cost model's terms; for adapters as if every layer were trained."""
    stock = None
    if cfg.lora_model_dir:  # what is continued has a config of its own, which governs
        stock = LoraConfig.from_pretrained(cfg.lora_model_dir)
    elif cfg.adapter:
        stock = _build_peft_lora_config(model, cfg)
    return Mode(
        adapters=None if stock is None else adapted_modules(model, stock),
        checkpointing=bool(cfg.gradient_checkpointing),
        reentrant=reentrant(cfg),
        train_norm_and_head=trains_head(cfg, stack),
        stop_backward=stops_backward(cfg),
    )


def publish(cfg: Any, plan: Plan, *, config_as_written: Mapping[str, Any]) -> None:
    """Write plan, recipe and report, and print the table; only the main process does this."""
    path = plan_path(cfg)
    _keep_scores(path, plan)
    write_text(path, plan.to_json())
    config_text = recipe_text(config_as_written, plan)
    write_text(path.with_name(RECIPE_FILE), config_text)
    if options_of(cfg).report:
        write_report(plan, path.parent, config_text=config_text)
    print_plan(plan)
    LOG.info("layersel: the plan is %s", path)


def _keep_scores(path: Path, plan: Plan) -> None:
    """Move the scored plan of an earlier run aside before a plan without scores takes its place."""
    try:
        earlier = read_plan(path)
    except PlanError:  # none, or nothing that could be read again
        return
    if earlier.scores is not None and plan.scores is None:
        kept = path.with_name(SCORED_FILE)
        path.replace(kept)
        LOG.info("layersel: this cut was given, so nothing is scored; the scores of the earlier run are now %s", kept)
