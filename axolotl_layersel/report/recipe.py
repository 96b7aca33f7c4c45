"""A run's choice as a config file to share: the user's own YAML with the cut written in.

`recipe` keeps the plugin and gives it the cut, so that a rerun scores nothing and has the whole saving. With
`plain=True` the result is for stock axolotl: it trains the same layers, but stock axolotl makes the output of the
embeddings require grad, so the backward pass still walks the frozen layers. It carries either
`peft_layers_to_transform` or `unfrozen_parameters`: axolotl's validation rejects both together.

Built from the config as the user wrote it, never from the validated one, which holds derived keys that do not validate
again. Nothing here knows axolotl or torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from axolotl_layersel.config.conflicts import SHORT_NAME, as_list, find_conflicts, is_plugin, names_plugin
from axolotl_layersel.plan import Plan
from axolotl_layersel.report.wording import dataset_name, layer_range, mode_name, model_name, printable

RECIPE_FILE = "recipe.yml"

_OTHER_OPTIONS = (  # those that mean something where the cut is given
    *("stop_backward", "train_head", "report"),
    *("prefix_cache", "prefix_cache_gb", "prefix_cache_dtype", "offload_prefix"),  # its folder is of one machine
)
_NOT_SHARED = ("axolotl_config_path", "resume_from_checkpoint")  # of the machine that ran it


class RecipeError(ValueError):
    """The plan and the config do not belong together, or the config cannot carry the plan's choice."""


def read_config(path: Path) -> dict[str, Any]:
    """A config file as it is written.

    Raises:
        RecipeError: it is not YAML, or holds no mapping of keys.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path} is not an axolotl config: it holds no mapping of keys")
    return values


def recipe(config: Mapping[str, Any], plan: Plan, *, plain: bool = False) -> dict[str, Any]:
    """The config with the plan's layers written in, keys in the user's order.

    Args:
        config: as written by the user, before validation; it is not changed.
        plan: made for this config's model and adapter.
        plain: for stock axolotl, without this plugin and its saving of compute.

    Raises:
        PlanError: the plan was made for another model or adapter.
        RecipeError: the config chooses layers itself, or the plan does not say which keys apply it.
    """
    result = {key: _plain_values(value) for key, value in config.items() if _is_shared(key)}
    plan.check_fits(
        base_model=result.get("base_model", ""),
        adapter=result.get("adapter") or None,
        num_layers=plan.num_layers,
        source="the plan",
    )
    block = result.get("layersel") or {}
    if not isinstance(block, dict):
        raise RecipeError(f"`layersel:` is {block!r}; allowed is a block of options, or nothing")
    if not names_plugin(result):
        result["plugins"] = [*as_list(result.get("plugins")), SHORT_NAME]
    others = {name: block[name] for name in _OTHER_OPTIONS if name in block}
    result["layersel"] = {"first_layer": plan.first_trainable, **others}
    if "learning_rate" in plan.config_updates:  # raised for the cut, on request
        result["learning_rate"] = plan.config_updates["learning_rate"]
    if conflicts := find_conflicts(result):
        raise RecipeError("this config cannot carry the plan: " + " ".join(conflicts))
    return _without_plugin(result, plan) if plain else result


def recipe_text(config: Mapping[str, Any], plan: Plan, *, plain: bool = False) -> str:
    """The same as a YAML file with a header that says what it is and how to run it.

    Raises:
        PlanError, RecipeError: see `recipe`.
    """
    values = recipe(config, plan, plain=plain)
    body: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    return "".join(f"# {line}".rstrip() + "\n" for line in _header(plan, plain=plain)) + "\n" + body


class _Dumper(yaml.SafeDumper):
    """YAML as people write it: lists indented, lists of numbers on one line."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> Any:
        in_line = bool(sequence) and all(isinstance(item, (int, float)) for item in sequence)
        return super().represent_sequence(tag, sequence, flow_style=in_line)


def _header(plan: Plan, *, plain: bool) -> list[str]:
    k, last = plan.first_trainable, plan.num_layers - 1
    frozen = f"; {layer_range(0, k - 1)} {'is' if k == 1 else 'are'} frozen" if k else ""
    lines = [f"{model_name(plan)}: {mode_name(plan)} of {layer_range(k, last)} of {plan.num_layers}{frozen}."]
    if plan.sample is not None and plan.scores is not None:
        of_data = f" of {dataset_name(plan)}" if dataset_name(plan) else ""
        lines.append(f"Chosen by layersel from {plan.sample.rows} rows ({plan.scores.tokens} scored tokens){of_data}.")
    if versions := [f"{name} {v}" for name, v in plan.created_by.items() if name in ("axolotl_layersel", "axolotl")]:
        lines.append(f"Made with {', '.join(versions)}.")
    lines.append("")
    if plain:
        lines += [
            "For stock axolotl, without the layersel plugin. It trains the same layers without saving compute: the",
            "backward pass still runs through the frozen layers.",
        ]
    else:
        lines += ["Needs axolotl and the plugin axolotl-layersel. The cut is given below, so nothing is scored."]
    lines += ["Paths are as they were written, relative to the folder that training is started in.", ""]
    return [printable(line) for line in [*lines, "    axolotl train FILE"]]


def _without_plugin(result: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """For stock axolotl: the keys that the run wrote, one kind of them."""
    updates = dict(plan.config_updates)
    if plan.adapter and set(updates) - {"unfrozen_parameters", "learning_rate"}:
        updates.pop("unfrozen_parameters", None)
    if not updates:
        raise RecipeError(
            "the plan has no config_updates, so the keys for stock axolotl are not known: take the plan.json that a "
            "run or `axolotl layersel score` wrote"
        )
    plugins = [name for name in as_list(result["plugins"]) if not is_plugin(name)]
    if plugins:
        result["plugins"] = plugins
    else:
        del result["plugins"]
    del result["layersel"]
    if result.get("gradient_checkpointing"):
        kwargs = result.get("gradient_checkpointing_kwargs") or {}
        if not kwargs or (kwargs.get("use_reentrant") and "unfrozen_parameters" in updates):
            # axolotl rejects reentrant checkpointing beside `unfrozen_parameters`
            result["gradient_checkpointing_kwargs"] = {**kwargs, "use_reentrant": False}
    return {**result, **{key: _plain_values(value) for key, value in updates.items()}}


def _is_shared(key: str) -> bool:
    """Whether a key is safe to share: no path of one machine, no secret."""
    return key not in _NOT_SHARED and not key.endswith(("_api_key", "_secret", "_password"))


def _plain_values(value: Any) -> Any:
    """The value in types that YAML writes without tags; axolotl's configs are subclasses of dict."""
    if isinstance(value, Mapping):
        return {key: _plain_values(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain_values(item) for item in value]
    return value
