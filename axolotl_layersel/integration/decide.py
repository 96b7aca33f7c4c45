"""Where the plan of a training run comes from. Called by the hooks in `plugin.py`; `apply.py` is what follows.

    a plan of the checkpoint that is resumed  >  `first_layer`  >  `plan`  >  scoring

axolotl's own loaders give the dataset and the model; nothing is loaded twice.
"""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

from axolotl.loaders import load_tokenizer
from torch import nn

from axolotl_layersel import __version__
from axolotl_layersel.integration import axolotl_api
from axolotl_layersel.integration.log import LOG
from axolotl_layersel.integration.pilot_settings import pilot_settings
from axolotl_layersel.integration.preference_rows import PreferenceRows
from axolotl_layersel.integration.processes import Processes
from axolotl_layersel.integration.run_settings import RunSettings
from axolotl_layersel.integration.runnable_model import placed, ready_to_run
from axolotl_layersel.integration.scoring_way import scoring_way, telling_time
from axolotl_layersel.method.calibration import Sample, draw_rows
from axolotl_layersel.method.score_layers import score_layers
from axolotl_layersel.model.decoder_stack import DecoderStack, find_stack
from axolotl_layersel.plan import Plan, PlanError, read_plan
from axolotl_layersel.plan_parts import ScoredSample
from axolotl_layersel.report.progress import progress


def decide(settings: RunSettings, model: nn.Module, dataset: Any, *, processes: Processes) -> Plan:
    """The plan of this run, equal on every process.

    Args:
        settings: of the run.
        model: the base model, before adapters.
        dataset: the prepared training set; unused where a cut is given.

    Raises:
        ValueError (and its kinds in the core): nothing may be trained.
    """
    stack = find_stack(model)
    # One process reads for all: on another machine the same path may hold another plan, or none.
    given, resumed = processes.main_only(lambda: (_given_plan(settings, stack), _resumed_plan(settings)))
    if resumed is not None:
        if given is not None and given.first_trainable != resumed.first_trainable:
            raise PlanError(
                f"the checkpoint {settings.resume_from_checkpoint or settings.output_dir} was trained with "
                f"first_layer {resumed.first_trainable}, this config asks for {given.first_trainable}: remove the cut "
                "from the config to resume, or train into another output_dir"
            )
        _check_fits(resumed, settings, stack, source="the plan of the checkpoint")
        LOG.info("resuming: the plan of the checkpoint is used, nothing is scored")
        return resumed
    if given is not None:
        return given
    return _scored_plan(settings, model, stack, dataset, processes)


def _given_plan(settings: RunSettings, stack: DecoderStack) -> Plan | None:
    """A plan by hand or from a file, without its scores where there are none."""
    options = settings.options
    if options.plan is not None:
        plan = read_plan(options.plan)
        _check_fits(plan, settings, stack, source=options.plan)
        return plan
    if options.first_layer is None:
        return None
    if options.first_layer >= stack.num_layers:
        raise PlanError(
            f"first_layer is {options.first_layer}; the model has {stack.num_layers} decoder layers, so allowed is "
            f"0 to {stack.num_layers - 1}"
        )
    return Plan(
        **_identity(settings),
        num_layers=stack.num_layers,
        first_trainable=options.first_layer,
        options=options.model_dump(),
    )


def _resumed_plan(settings: RunSettings) -> Plan | None:
    """The plan beside the checkpoint that training will resume from, or None if it starts afresh."""
    checkpoint = settings.resume_from_checkpoint
    if checkpoint is None and settings.auto_resume:
        checkpoint = axolotl_api.checkpoint_to_resume(settings.cfg)
    if not checkpoint:
        return None
    if settings.adapter and (reason := axolotl_api.lost_adapters(Path(checkpoint))):
        raise PlanError(reason)
    try:
        return read_plan(checkpoint)
    except PlanError as error:
        raise PlanError(
            f"the checkpoint {str(checkpoint)!r} has no readable plan, so nobody knows which layers it trained: it was "
            "written without this plugin, or training was killed while it was written. Remove it to go on from the "
            f"one before, or train into another output_dir. ({error})"
        ) from error


def _check_fits(plan: Plan, settings: RunSettings, stack: DecoderStack, *, source: str) -> None:
    plan.check_fits(
        base_model=settings.base_model, adapter=settings.adapter, num_layers=stack.num_layers, source=source
    )


def _identity(settings: RunSettings) -> dict[str, Any]:
    packages = ("axolotl", "torch", "transformers", "peft")
    return {
        "base_model": settings.base_model,
        "revision": settings.revision,
        "adapter": settings.adapter,
        "created_by": {"axolotl_layersel": __version__, **{name: version(name) for name in packages}},
    }


def draw_sample(settings: RunSettings, dataset: Any) -> Sample:
    """The calibration sample of this config, from the prepared training set."""
    length = settings.shape.positions
    if settings.rl:
        tokenizer = load_tokenizer(settings.cfg)
        dataset = PreferenceRows(dataset, rl=settings.rl, tokenizer=tokenizer, max_length=length)
    return draw_rows(
        dataset,
        num_samples=settings.options.num_samples,
        max_tokens=settings.options.max_tokens,
        seed=settings.seed,
        sequence_len=length,
    )


def _scored_plan(
    settings: RunSettings, model: nn.Module, stack: DecoderStack, dataset: Any, processes: Processes
) -> Plan:
    """Score on the prepared training set with the model that will be trained."""
    started, options = time.perf_counter(), settings.options
    sample = draw_sample(settings, dataset)
    share = _share(settings, processes)
    rows = len(range(share[0], len(sample.rows), share[1])) if share else 0
    way = scoring_way(settings, model, stack, processes=processes) if share else None
    with ExitStack() as held:
        if share and way is None:
            held.enter_context(placed(model, keep=not settings.sharded))
        if share:
            held.enter_context(ready_to_run(model, stack))
        advance = held.enter_context(progress(rows, enabled=processes.is_main))
        if way is not None:
            advance = telling_time(advance, rows=rows, enabled=processes.is_main)
        scored = score_layers(
            model,
            sample.rows,
            deviation=options.deviation,
            policy=options.policy,
            coverage=options.coverage,
            budget=options.budget,
            min_layers=options.min_layers,
            pilot=pilot_settings(settings, sample, dataset, world_size=processes.world_size),
            seed=settings.seed,
            batch_tokens=settings.batch_tokens,
            autocast=settings.autocast,
            way=way,
            share=share,
            together=processes.together,
            main_only=processes.main_only,
            progress=advance,
        )
    plan = Plan(
        **_identity(settings),
        num_layers=stack.num_layers,
        first_trainable=scored.first_trainable,
        options=options.model_dump(),
        scores=scored.scores,
        sample=ScoredSample(
            rows=len(sample.rows),
            seed=settings.seed,
            dataset_fingerprint=sample.fingerprint(),
            tokenizer_fingerprint=_tokenizer_fingerprint(settings.cfg),
            datasets=list(settings.datasets),
        ),
        notes=[*sample.notes, *scored.notes],
        seconds=round(time.perf_counter() - started, 3),
    )
    return processes.main_only(lambda: plan)


def _share(settings: RunSettings, processes: Processes) -> tuple[int, int] | None:
    """(index, number) of this process among those that score, or None where it only waits for them.

    With FSDP's `cpu_ram_efficient_loading` the main process alone has loaded the weights: the others hold tensors that
    are empty, or zero.
    """
    if settings.loaded_by_main:
        return (0, 1) if processes.is_main else None
    return processes.rank, processes.world_size


def _tokenizer_fingerprint(cfg: Any) -> str:
    """Twelve hexadecimal digits that change with any entry of the vocabulary."""
    vocabulary = sorted(load_tokenizer(cfg).get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:12]
