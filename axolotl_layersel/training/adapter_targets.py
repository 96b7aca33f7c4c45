"""What to write into an axolotl config so that adapters exist on the chosen layers and nowhere below them.

PEFT's `layers_to_transform` covers target lists. Everything that it does not cover becomes explicit names:

- a regex, "all-linear" and full module paths: the modules that they match in layers k..L-1;
- `lora_target_parameters` (fused experts): the parameters of layers k..L-1;
- MoE projections that PEFT turns into parameters of every layer by itself (`w1`, `gate_proj`): the same parameters;
- modules outside of the decoder layers that the user lists (`lm_head`, `embed_tokens`): their full paths.

`unfrozen_parameters` then lists the adapter parameters of those layers; its dialect is explained in
`trainable_parameters.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from axolotl_layersel.model.adapted_modules import Adapters
from axolotl_layersel.model.decoder_stack import DecoderStack
from axolotl_layersel.model.parameter_names import layer_of
from axolotl_layersel.training.trainable_parameters import layer_numbers

_PREFIX = "^base_model.model."


def adapter_updates(
    model: nn.Module,
    stack: DecoderStack,
    *,
    first_trainable: int,
    adapters: Adapters,
    named: Sequence[str] = (),
    target_linear: bool = False,
) -> dict[str, Any]:
    """Config keys that place adapters on layers k..L-1 only, and train nothing else.

    Args:
        model: the base model, before PEFT wraps it.
        stack: found in it.
        first_trainable: k.
        adapters: of the run, as if every layer were trained.
        named: the modules that the user listed, without those that `lora_target_linear` adds.
        target_linear: `lora_target_linear` is set.

    Raises:
        ValueError: what the user targets lies outside of layers k..L-1 altogether.
    """
    kept = (*range(first_trainable, stack.num_layers), None)
    names = [name for name, _ in model.named_modules()]
    config = adapters.config
    if isinstance(adapters.stock.target_modules, str):
        updates, outside = _named_one_by_one(adapters.stock.target_modules, adapters, stack, kept)
    else:
        updates, outside = _listed(adapters, stack, names, kept, named=named, target_linear=target_linear)
    if config.target_parameters:
        updates["lora_target_parameters"] = list(_parameters(adapters, stack, kept))
    if adapters.converted:
        updates |= {"lora_rank_pattern": config.rank_pattern, "lora_alpha_pattern": config.alpha_pattern}
    wanted = list(config.modules_to_save or ())
    saved = _modules_to_save(wanted, stack, names, kept)
    if saved != wanted:
        updates["lora_modules_to_save"] = saved
    updates["unfrozen_parameters"] = adapter_patterns(
        stack,
        first_trainable=first_trainable,
        outside=outside,
        modules_to_save=saved,
        token_rows=bool(config.trainable_token_indices),
    )
    return updates


def adapter_patterns(
    stack: DecoderStack,
    *,
    first_trainable: int,
    outside: Iterable[str] = (),
    modules_to_save: Iterable[str] = (),
    token_rows: bool = False,
) -> list[str]:
    """`unfrozen_parameters` of a PEFT-wrapped model: adapter parameters of layers k..L-1, and what the user adds.

    Args:
        outside: full names of modules outside of the decoder layers that have an adapter, such as the head.
        modules_to_save: the config's `lora_modules_to_save`, trained whole.
        token_rows: single embedding rows are trained (`peft_trainable_token_indices`).
    """
    patterns = [f"{_PREFIX}{stack.layers_name}.({layer_numbers(stack, first_trainable)})[.].+lora_.+"]
    patterns += [f"{_PREFIX}{name}.lora_.+" for name in outside]
    patterns += [f"{_PREFIX}(.+[.])?{name}.modules_to_save.+" for name in modules_to_save]
    if token_rows:
        patterns.append(f"{_PREFIX}(.+[.])?trainable_tokens_delta.+")
    return patterns


def continued_patterns(stack: DecoderStack, *, first_trainable: int) -> list[str]:
    """The same for a continued adapter (`lora_model_dir`), whose own file says where it sits."""
    return [
        *adapter_patterns(stack, first_trainable=first_trainable, token_rows=True),
        f"{_PREFIX}(?!{stack.layers_name}.).+lora_.+",
        f"{_PREFIX}(?!{stack.layers_name}.).+modules_to_save.+",
    ]


def _named_one_by_one(
    targets: str, adapters: Adapters, stack: DecoderStack, kept: Sequence[int | None]
) -> tuple[dict[str, Any], list[str]]:
    """For a regex or "all-linear": the updates with full names, and modules outside of the decoder layers."""
    chosen = [name for name in adapters.modules if layer_of(name, stack) in kept]
    if targets.lower() == "all-linear" and any(_in_other_tower(name, stack) for name in chosen):
        chosen = [name for name in chosen if layer_of(name, stack) is not None]  # the decoder's, as for lists
    if not any(layer_of(name, stack) is not None for name in chosen):
        raise ValueError(
            f"lora_target_modules {targets!r} matches {len(adapters.modules)} modules, none of them in the decoder "
            f"layers {kept[0]} to {stack.num_layers - 1} that are to be trained: check the pattern"
        )
    return {"lora_target_modules": chosen}, [name for name in chosen if layer_of(name, stack) is None]


def _listed(
    adapters: Adapters,
    stack: DecoderStack,
    names: Sequence[str],
    kept: Sequence[int | None],
    *,
    named: Sequence[str],
    target_linear: bool,
) -> tuple[dict[str, Any], list[str]]:
    """For a list: the updates with `peft_layers_to_transform`, and modules outside of the decoder layers."""
    updates: dict[str, Any] = {}
    targets = adapters.config.target_modules or set()
    mine = sorted(targets) if adapters.converted else list(named)
    outside = _outside(mine, stack, names)
    chosen = [t for t in mine if layer_of(t, stack) in kept and t not in outside]
    chosen += [name for name in outside if name not in chosen]
    if chosen != list(named):
        updates["lora_target_modules"] = chosen
    if adapters.converted and target_linear:
        updates["lora_target_linear"] = False  # the modules that it found are in the list, the experts' in another
    if mine and not chosen and not adapters.config.target_parameters:
        raise ValueError(
            f"lora_target_modules {mine} lists no module of the decoder layers {kept[0]} to "
            f"{stack.num_layers - 1} that are to be trained: list modules of these layers, or set "
            "`lora_target_linear: true`"
        )
    outside += [name for name in targets if name in names and layer_of(name, stack) is None and name not in outside]
    updates["peft_layers_to_transform"] = [index for index in kept if index is not None]
    if any(layer_of(name, stack) is None and re.search(r"[.]\d+[.]", name) for name in names):
        updates["peft_layers_pattern"] = _layers_pattern(stack)
    return updates, outside


def _outside(targets: Sequence[str], stack: DecoderStack, names: Sequence[str]) -> list[str]:
    """Full names of the listed modules outside of the decoder layers, which PEFT finds by their full names only.

    Numbered modules of other towers are left out: `lora_target_modules` means the decoder there.
    """
    return [
        name
        for name in names
        if layer_of(name, stack) is None
        and not _in_other_tower(name, stack)
        and any(name == target or name.endswith(f".{target}") for target in targets)
    ]


def _in_other_tower(name: str, stack: DecoderStack) -> bool:
    """Whether a module is numbered as layers are, and not of the decoder: a vision tower's, for example."""
    return layer_of(name, stack) is None and re.search(r"[.]\d+([.]|$)", name) is not None


def _modules_to_save(
    wanted: Sequence[str], stack: DecoderStack, names: Sequence[str], kept: Sequence[int | None]
) -> list[str]:
    """The user's list, with full names in place of those that would save a module of every decoder layer."""
    saved: list[str] = []
    for name in wanted:
        inside = [n for n in names if n.endswith(name) and layer_of(n, stack) is not None]
        saved += [n for n in inside if layer_of(n, stack) in kept] if inside else [name]
    return saved


def _parameters(adapters: Adapters, stack: DecoderStack, kept: Sequence[int | None]) -> Iterator[str]:
    """Full names of the targeted parameters in the layers to be trained."""
    for target in sorted(adapters.config.target_parameters or ()):
        matched = [name for name in adapters.parameters if name == target or name.endswith(f".{target}")]
        inside = [name for name in matched if layer_of(name, stack) in kept]
        if not inside:
            raise ValueError(
                f"lora_target_parameters {target!r} matches {len(matched)} parameters, none of them in the decoder "
                f"layers {kept[0]} to {stack.num_layers - 1} that are to be trained: check the name"
            )
        yield from inside


def _layers_pattern(stack: DecoderStack) -> str:
    """PEFT wants a "." before the pattern, so the first part of the name is left out."""
    return stack.layers_name.partition(".")[2] or stack.layers_name
