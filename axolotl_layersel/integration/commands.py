"""Score or compare without training: config, data and model as axolotl loads them for a run, and nothing after that.

Both go through axolotl's own loaders and hooks, so what is scored is what a run would score. `score` arms the plugin
as `axolotl train` does; its hook decides and writes the plan while the model is loaded. `compare` visits the same hook
and writes nothing. Settings that split a model over processes are left out: one process scores for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_datasets, load_preference_datasets
from axolotl.integrations.base import BasePlugin, PluginManager
from axolotl.loaders import ModelLoader, load_processor, load_tokenizer
from torch import nn

from axolotl_layersel import LayerSelPlugin
from axolotl_layersel.compare.methods import Choice, Rule, compare_methods
from axolotl_layersel.config.conflicts import names_plugin
from axolotl_layersel.integration.apply import adapters_of, predict_costs
from axolotl_layersel.integration.decide import draw_sample
from axolotl_layersel.integration.prefix_guard import PrefixGuard
from axolotl_layersel.integration.run_settings import cache_folder, settings_of
from axolotl_layersel.integration.runnable_model import place, ready_to_run
from axolotl_layersel.integration.scoring_way import check_whole
from axolotl_layersel.model.decoder_stack import find_stack
from axolotl_layersel.plan import Plan, read_plan
from axolotl_layersel.prefix_cache.folders import CacheFolder, clear_cache, list_caches
from axolotl_layersel.prefix_cache.state_store import PrefixCacheError
from axolotl_layersel.report.recipe import read_config

DOTTED_NAME = "axolotl_layersel.LayerSelPlugin"
_SPLITTING: dict[str, Any] = {  # and what each is for one process
    **dict.fromkeys(("fsdp", "fsdp_config", "fsdp_version", "deepspeed", "dp_shard_size", "dp_replicate_size")),
    **dict.fromkeys(("tensor_parallel_size", "context_parallel", "context_parallel_size", "sequence_parallel_degree")),
    "expert_parallel_size": 1,  # in axolotl 0.21 a number, always
}
_RESUMING = {"resume_from_checkpoint": None, "auto_resume_from_checkpoints": None}


def score(config: Path, overrides: Mapping[str, Any]) -> tuple[Plan, Path]:
    """Score the config's model on its data and write the plan; a cut or a plan that the config gives is left aside.

    Args:
        config: an axolotl config.
        overrides: keys to change, nested ones as `block__key`.

    Returns:
        The plan and its file.

    Raises:
        ValueError: the config is not valid, or its model or data cannot be scored.
    """
    cfg = _load(config, overrides)
    manager = PluginManager.get_instance()
    manager.load_datasets(cfg, preprocess=False)  # arms the plugin, as `axolotl train` does
    _load_model(cfg)
    manager.post_train_unload(cfg)
    path = settings_of(cfg).plan_path
    return read_plan(path), path


def compare(config: Path, overrides: Mapping[str, Any]) -> tuple[list[Choice], dict[str, Any]]:
    """What every method would choose for the config's model on its data; writes nothing.

    Returns:
        The choices, and what they were made on.

    Raises:
        ValueError: the config is not valid, or its model or data cannot be scored.
    """
    cfg = _load(config, overrides)
    settings = settings_of(cfg)
    options = settings.options
    meta = (load_preference_datasets if settings.rl else load_datasets)(cfg=cfg)
    sample = draw_sample(settings, meta.train_dataset)
    found: list[Choice] = []
    about: dict[str, Any] = {
        "base_model": settings.base_model,
        "adapter": settings.adapter,
        "sample": {
            "rows": len(sample.rows),
            "tokens": sample.tokens,
            "seed": settings.seed,
            "fingerprint": sample.fingerprint(),
        },
        "policy": options.policy,
        "coverage": options.coverage,
    }

    def visit(model: nn.Module) -> None:
        stack = find_stack(model)
        check_whole(settings, model, stack, what="`compare`")
        place(model)
        about["num_layers"] = stack.num_layers
        sets = [rows for rows in (meta.train_dataset, meta.eval_dataset) if rows is not None]
        adapters = adapters_of(settings, model)
        predicted = predict_costs(settings, model, adapters, first_trainable=0, data_sets=sets)
        with ready_to_run(model, stack):
            found[:] = compare_methods(
                model,
                sample.rows,
                deviation=options.deviation,
                rule=Rule(options.policy, options.coverage, options.budget, options.min_layers),
                seed=settings.seed,
                batch_tokens=settings.batch_tokens,
                autocast=settings.autocast,
                step_of_cut=None if predicted is None else predicted.per_cut.step,
                run_of_cut=None if predicted is None else predicted.per_cut.whole_run,
            )

    with _visiting(visit):
        _load_model(cfg)
    return found, about


def fill_cache(config: Path, overrides: Mapping[str, Any]) -> CacheFolder:
    """Compute the frozen layers' output for all samples of the config's data and keep it on the disk; train nothing.

    Args:
        config: an axolotl config; its cut is used, or found by scoring as a run would.
        overrides: keys to change, nested ones as `block__key`.

    Raises:
        PrefixCacheError: these states cannot be cached, or there is no room for them.
        ValueError: the config is not valid.
    """
    from axolotl.train import setup_model_and_trainer

    changes = (
        {}
        if _block(read_config(config), overrides).get("prefix_cache") == "disk"
        else {"layersel__prefix_cache": "disk"}
    )
    cfg = _load(config, {**overrides, **changes}, keep_cut=True)
    manager = PluginManager.get_instance()
    meta = manager.load_datasets(cfg, preprocess=False)
    trainer = setup_model_and_trainer(cfg, meta)[0]
    guards = [c for c in trainer.callback_handler.callbacks if isinstance(c, PrefixGuard)]
    if not guards:
        raise PrefixCacheError("the plan trains all layers, so no layer is frozen and there is nothing to cache")
    place(trainer.model)
    folder = guards[0].run.prepare(trainer.model, epochs=float(cfg.num_epochs or 1), train=False)
    manager.post_train_unload(cfg)
    return next(cache for cache in list_caches(cache_folder(cfg)) if cache.path == folder)


def find_caches(config: Path, overrides: Mapping[str, Any], *, remove: bool = False) -> list[CacheFolder]:
    """The caches that runs with this config look into, and with `remove` their end; loads nothing but the config."""
    written = read_config(config)
    values = {**written, **{key: value for key, value in overrides.items() if "__" not in key}}
    found = list_caches(cache_folder({**values, "layersel": _block(values, overrides)}))
    for cache in found if remove else []:
        clear_cache(cache)
    return found


def _block(written: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The `layersel:` block as the overrides make it."""
    changed = {k.removeprefix("layersel__"): v for k, v in overrides.items() if k.startswith("layersel__")}
    return {**(written.get("layersel") or {}), **changed}


def _load(config: Path, overrides: Mapping[str, Any], *, keep_cut: bool = False) -> Any:
    """The validated config, with the plugin, for one process, and without a cut unless it is to be kept."""
    written = read_config(config)
    single = {**_SPLITTING, **_RESUMING}
    changes: dict[str, Any] = {key: single[key] for key in single if written.get(key) is not None}
    if not names_plugin(written):
        changes["plugins"] = [*(written.get("plugins") or []), DOTTED_NAME]
    block = {} if keep_cut else written.get("layersel") or {}
    changes |= {f"layersel__{key}": None for key in ("first_layer", "plan") if block.get(key) is not None}
    cfg = load_cfg(str(config), **{**changes, **overrides})
    # The recipe keeps what was only left out for scoring.
    as_written = LayerSelPlugin.written[settings_of(cfg).config_file]
    as_written |= {key: written[key] for key in changes if key in _SPLITTING}
    return cfg


def _load_model(cfg: Any) -> None:
    tokenizer = load_tokenizer(cfg)
    processor = load_processor(cfg, tokenizer) if cfg.is_multimodal else None
    ModelLoader(cfg, tokenizer, processor=processor).load()


@contextmanager
def _visiting(visit: Callable[[nn.Module], None]) -> Iterator[None]:
    """Call `visit` where the plugin would decide: the model is whole and has no adapters yet."""
    visitor = BasePlugin()
    visitor.pre_lora_load = lambda _cfg, model: visit(model)
    plugins = PluginManager.get_instance().plugins
    plugins["layersel-visitor"] = visitor
    try:
        yield
    finally:
        del plugins["layersel-visitor"]


def parse_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """`block.key=value` or `key=value`, values as YAML, to the form that axolotl takes.

    Raises:
        ValueError: a pair without "=".
    """
    values = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"{pair!r} is not KEY=VALUE; write for example layersel.coverage=0.9")
        values[key.replace(".", "__", 1)] = yaml.safe_load(value)
    return values
