"""Where the plan of a training run comes from. Called by the hooks in `plugin.py`; `apply.py` is what follows.

    a plan of the checkpoint that is resumed  >  `first_layer`  >  `plan`  >  scoring

axolotl's own loaders give the dataset and the model; nothing is loaded twice.
"""

from __future__ import annotations

import hashlib
import json
import time
from importlib.metadata import version
from typing import Any

from axolotl.loaders import load_tokenizer
from axolotl.utils.logging import get_logger
from torch import nn

from axolotl_layersel import __version__
from axolotl_layersel.config.options import LayerSelOptions
from axolotl_layersel.integration.output_folder import check_writable, claim_folder
from axolotl_layersel.integration.preference_rows import PreferenceRows
from axolotl_layersel.integration.processes import Processes
from axolotl_layersel.integration.run_settings import autocast_of, options_of, plan_path, seed_of
from axolotl_layersel.integration.runnable_model import check_whole, place, ready_to_run
from axolotl_layersel.method.calibration import Sample, draw_rows
from axolotl_layersel.method.score_layers import score_layers
from axolotl_layersel.model.decoder_stack import DecoderStack, find_stack
from axolotl_layersel.plan import Plan, PlanError, ScoredSample, read_plan
from axolotl_layersel.report.progress import progress

LOG = get_logger("axolotl.integrations.layersel")


def claim(cfg: Any) -> None:
    """Keep other runs out of this run's folder, and see that the plan can be written there before anything is scored.

    Raises:
        ClaimError: another run is in it.
        PlanError: nothing can be written there.
    """
    path = plan_path(cfg)
    try:
        note = claim_folder(path.parent.parent)
        check_writable(path.parent)
    except OSError as error:
        raise PlanError(
            f"the plan cannot be written to {str(path)!r}: {error}. Nothing was scored or trained; free some space, or "
            "choose another output_dir"
        ) from error
    if note is not None:
        LOG.warning(note)


def decide(cfg: Any, model: nn.Module, dataset: Any, *, processes: Processes) -> Plan:
    """The plan of this run, equal on every process.

    Args:
        cfg: axolotl's validated config.
        model: the base model, before adapters.
        dataset: the prepared training set; unused where a cut is given.

    Raises:
        ValueError (and its kinds in the core): nothing may be trained.
    """
    options = options_of(cfg)
    stack = find_stack(model)
    # One process reads for all: on another machine the same path may hold another plan, or none.
    given, resumed = processes.main_only(lambda: (_given_plan(cfg, options, stack), _resumed_plan(cfg)))
    if resumed is not None:
        if given is not None and given.first_trainable != resumed.first_trainable:
            raise PlanError(
                f"the checkpoint {cfg.resume_from_checkpoint or cfg.output_dir} was trained with "
                f"first_layer {resumed.first_trainable}, this config asks for {given.first_trainable}: remove the cut "
                "from the config to resume, or train into another output_dir"
            )
        _check_fits(resumed, cfg, stack, source="the plan of the checkpoint")
        LOG.info("resuming: the plan of the checkpoint is used, nothing is scored")
        return resumed
    if given is not None:
        return given
    return _scored_plan(cfg, options, model, stack, dataset, processes)


def _given_plan(cfg: Any, options: LayerSelOptions, stack: DecoderStack) -> Plan | None:
    """A plan by hand or from a file, without its scores where there are none."""
    if options.plan is not None:
        plan = read_plan(options.plan)
        _check_fits(plan, cfg, stack, source=options.plan)
        return plan
    if options.first_layer is None:
        return None
    if options.first_layer >= stack.num_layers:
        raise PlanError(
            f"first_layer is {options.first_layer}; the model has {stack.num_layers} decoder layers, so allowed is "
            f"0 to {stack.num_layers - 1}"
        )
    return Plan(
        **_identity(cfg), num_layers=stack.num_layers, first_trainable=options.first_layer, options=options.model_dump()
    )


def _resumed_plan(cfg: Any) -> Plan | None:
    """The plan beside the checkpoint that training will resume from, or None if it starts afresh."""
    checkpoint = cfg.resume_from_checkpoint
    if checkpoint is None and cfg.auto_resume_from_checkpoints:
        from axolotl.utils.train import determine_last_checkpoint

        checkpoint = determine_last_checkpoint(cfg, update=False)
    if not checkpoint:
        return None
    try:
        return read_plan(checkpoint)
    except PlanError as error:
        raise PlanError(
            f"the checkpoint {str(checkpoint)!r} has no readable plan, so nobody knows which layers it trained: it was "
            "written without this plugin, or training was killed while it was written. Remove it to go on from the "
            f"one before, or train into another output_dir. ({error})"
        ) from error


def _check_fits(plan: Plan, cfg: Any, stack: DecoderStack, *, source: str) -> None:
    plan.check_fits(base_model=cfg.base_model, adapter=cfg.adapter, num_layers=stack.num_layers, source=source)


def _identity(cfg: Any) -> dict[str, Any]:
    packages = ("axolotl", "torch", "transformers", "peft")
    return {
        "base_model": cfg.base_model,
        "revision": cfg.revision_of_model,
        "adapter": cfg.adapter,
        "created_by": {"axolotl_layersel": __version__, **{name: version(name) for name in packages}},
    }


def draw_sample(cfg: Any, dataset: Any) -> Sample:
    """The calibration sample of this config, from the prepared training set."""
    options = options_of(cfg)
    if cfg.rl:
        tokenizer = load_tokenizer(cfg)
        dataset = PreferenceRows(dataset, rl=cfg.rl, tokenizer=tokenizer, max_length=cfg.sequence_len)
    return draw_rows(
        dataset,
        num_samples=options.num_samples,
        max_tokens=options.max_tokens,
        seed=seed_of(cfg),
        sequence_len=cfg.sequence_len,
    )


def _scored_plan(
    cfg: Any, options: LayerSelOptions, model: nn.Module, stack: DecoderStack, dataset: Any, processes: Processes
) -> Plan:
    """Score on the prepared training set with the model that will be trained."""
    started = time.perf_counter()
    sample = draw_sample(cfg, dataset)
    check_whole(model)
    place(model)
    share = len(range(processes.rank, len(sample.rows), processes.world_size))
    with ready_to_run(model, stack), progress(share, enabled=processes.is_main) as advance:
        scored = score_layers(
            model,
            sample.rows,
            deviation=options.deviation,
            gain=options.gain,
            policy=options.policy,
            coverage=options.coverage,
            budget=options.budget,
            min_layers=options.min_layers,
            seed=seed_of(cfg),
            batch_tokens=max(cfg.micro_batch_size or 1, 1) * cfg.sequence_len,
            autocast=autocast_of(cfg),
            share=(processes.rank, processes.world_size),
            together=processes.together,
            progress=advance,
        )
    plan = Plan(
        **_identity(cfg),
        num_layers=stack.num_layers,
        first_trainable=scored.first_trainable,
        options=options.model_dump(),
        scores=scored.scores,
        sample=_describe(sample, cfg),
        notes=[*sample.notes, *scored.notes],
        seconds=round(time.perf_counter() - started, 3),
    )
    return processes.main_only(lambda: plan)


def _tokenizer_fingerprint(cfg: Any) -> str:
    """Twelve hexadecimal digits that change with any entry of the vocabulary."""
    vocabulary = sorted(load_tokenizer(cfg).get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:12]


def _describe(sample: Sample, cfg: Any) -> ScoredSample:
    return ScoredSample(
        rows=len(sample.rows),
        seed=seed_of(cfg),
        dataset_fingerprint=sample.fingerprint(),
        tokenizer_fingerprint=_tokenizer_fingerprint(cfg),
        datasets=[str(d.get("path")) for d in cfg.datasets or cfg.pretraining_dataset or []],
    )
