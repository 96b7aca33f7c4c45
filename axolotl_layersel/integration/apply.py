"""Apply a plan to a run: the config keys that axolotl trains by, what the cut costs, and the files that describe it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import nn

from axolotl_layersel.cost.cut_cost import Mode
from axolotl_layersel.cost.peak_memory import Holds, peak_memory
from axolotl_layersel.cost.prediction import predict
from axolotl_layersel.integration import axolotl_api
from axolotl_layersel.integration.cache_prediction import with_cache
from axolotl_layersel.integration.log import LOG
from axolotl_layersel.integration.run_settings import RunSettings
from axolotl_layersel.integration.runnable_model import evaluating
from axolotl_layersel.method.pilot_rates import rate_ratio
from axolotl_layersel.model.adapted_modules import Adapters, adapted_modules
from axolotl_layersel.model.decoder_stack import DecoderStack, find_stack
from axolotl_layersel.model.weights_here import whole_shape
from axolotl_layersel.plan import Plan, PlanError, read_plan, write_text
from axolotl_layersel.plan_parts import Prediction
from axolotl_layersel.report.page import write_report
from axolotl_layersel.report.recipe import RECIPE_FILE, recipe_text
from axolotl_layersel.report.table import print_plan
from axolotl_layersel.training.adapter_targets import adapter_updates, continued_patterns
from axolotl_layersel.training.trainable_parameters import full_patterns

SCORED_FILE = "plan.scored.json"  # an earlier run's, where this one was given its cut


def complete(
    settings: RunSettings, model: nn.Module, plan: Plan, *, data_sets: Sequence[Any] = (), world_size: int = 1
) -> Plan:
    """The plan with the config keys that apply it, what they cost, and the notes of this config.

    Args:
        data_sets: of training and evaluation, as far as they are known.
        world_size: processes.

    Raises:
        ValueError: the user's targets lie outside of the plan's layers, or axolotl cannot freeze this model.
    """
    adapters = adapters_of(settings, model)
    updates = config_updates(settings, model, plan, adapters)
    notes = list(settings.notes)
    if plan.first_trainable:
        ratio = rate_ratio(plan.first_trainable, plan.num_layers, adapters=settings.adapter is not None)
        if settings.options.scale_learning_rate:
            updates["learning_rate"] = settings.learning_rate * ratio
        notes.append(_rate_note(settings, ratio))
    return dataclasses.replace(
        plan,
        config_updates=updates,
        notes=[*plan.notes, *(note for note in notes if note not in plan.notes)],
        prediction=predict_costs(
            *(settings, model, adapters),
            first_trainable=plan.first_trainable,
            data_sets=data_sets,
            world_size=world_size,
        ),
    )


def adapters_of(settings: RunSettings, model: nn.Module) -> Adapters | None:
    """The adapters of this run, as if every layer were trained; None for full fine-tuning."""
    if settings.continued_adapter:  # what is continued has a config of its own, which governs
        return adapted_modules(model, LoraConfig.from_pretrained(settings.continued_adapter))
    return adapted_modules(model, axolotl_api.stock_lora_config(model, settings.cfg)) if settings.adapter else None


def config_updates(settings: RunSettings, model: nn.Module, plan: Plan, adapters: Adapters | None) -> dict[str, Any]:
    """The config keys that make axolotl train exactly the plan's layers, in this run's mode.

    Raises:
        ValueError: the user's targets lie outside of the plan's layers, or axolotl cannot freeze this model.
    """
    stack = find_stack(model)
    k = plan.first_trainable
    scalar = next((name for name, p in model.named_parameters() if not whole_shape(p)), None)
    if scalar and (not settings.adapter or settings.continued_adapter):
        raise ValueError(
            f"the parameter {scalar!r} is a single number, and axolotl's `unfrozen_parameters` fails on such a model: "
            "train it with a new adapter (`adapter: lora`)"
        )
    if settings.continued_adapter:
        return {"unfrozen_parameters": continued_patterns(stack, first_trainable=k)}
    if adapters is None:
        read_out = settings.train_norm_and_head(stack)
        return {"unfrozen_parameters": full_patterns(stack, first_trainable=k, train_norm_and_head=read_out)}
    updates = adapter_updates(
        model,
        stack,
        first_trainable=k,
        adapters=adapters,
        named=settings.lora_targets,
        target_linear=settings.lora_target_linear,
    )
    if settings.dropout_on_experts and "lora_target_parameters" in updates:
        axolotl_api.accept_dropout_beside_experts()  # as axolotl does where PEFT adds these parameters by itself
    if scalar:  # adapters are trained and everything else is frozen without this key, too
        del updates["unfrozen_parameters"]
    return updates


def _rate_note(settings: RunSettings, ratio: float) -> str:
    if settings.options.scale_learning_rate:
        return f"learning_rate {settings.learning_rate:g} is raised by {ratio:.2f} for this cut (scale_learning_rate)"
    seen = (
        "tiny models, SmolLM2-135M and Gemma 3 270M"
        if settings.adapter
        else "one task of a tiny model and of SmolLM2-135M"
    )
    return (
        f"at such a cut the best learning rate was about {ratio:.2f} times that of all layers or more, on {seen}: "
        "`scale_learning_rate: true` raises yours"
    )


def predict_costs(
    settings: RunSettings,
    model: nn.Module,
    adapters: Adapters | None,
    *,
    first_trainable: int,
    data_sets: Sequence[Any] = (),
    world_size: int = 1,
) -> Prediction | None:
    """What a step costs with this cut, and with every other; None where no process holds the layers to be measured."""
    if settings.sharded:
        return None
    stack = find_stack(model)
    key = settings.trains_embeddings
    mode = mode_of(settings, stack, adapters)
    with evaluating(model, stack, autocast=settings.autocast):
        prediction, costs = predict(
            stack,
            mode=mode,
            first_trainable=first_trainable,
            shape=settings.shape,
            autocast=settings.autocast,
            why=f"`{key}` trains embeddings, so the backward pass runs through every layer." if key else None,
        )
    prediction = with_cache(
        *(settings, stack, prediction, costs),
        first_trainable=first_trainable,
        data_sets=data_sets,
        world_size=world_size,
    )
    if settings.rl or settings.zero_stage:  # more rows and passes than a micro batch says; states are shared out
        return prediction
    holds = Holds(
        optimizer=settings.optimizer,
        accumulates=settings.rows_per_step > settings.shape.batch,
        fused_loss=settings.fused_loss,
        offloads=prediction.cache is not None and prediction.cache.offloaded_bytes > 0,
    )
    memory = peak_memory(model, stack, cut=costs[first_trainable], mode=mode, shape=settings.shape, holds=holds)
    return dataclasses.replace(prediction, memory=memory)


def mode_of(settings: RunSettings, stack: DecoderStack, adapters: Adapters | None) -> Mode:
    """How a config trains, in the cost model's terms."""
    return Mode(
        adapters=adapters,
        checkpointing=settings.checkpointing,
        reentrant=settings.reentrant,
        train_norm_and_head=settings.train_norm_and_head(stack),
        stop_backward=settings.stop_backward,
    )


def publish(settings: RunSettings, plan: Plan, *, config_as_written: Mapping[str, Any]) -> None:
    """Write plan, recipe and report, and print the table; only the main process does this."""
    path = settings.plan_path
    _keep_scores(path, plan)
    write_text(path, plan.to_json())
    config_text = recipe_text(config_as_written, plan)
    write_text(path.with_name(RECIPE_FILE), config_text)
    if settings.options.report:
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
