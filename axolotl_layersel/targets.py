"""What to write into an axolotl config so that exactly the chosen layers are trained, in each mode.

- Full fine-tuning: `unfrozen_parameters`, patterns for the layers and, where that does not reach the embeddings, for
  final norm and head.
- LoRA and QLoRA: adapters exist only on the chosen layers (`peft_layers_to_transform`; a regex or full module paths
  become the explicit list of modules; MoE parameters get layer-qualified names), and `unfrozen_parameters` names the
  adapter parameters of those layers.

axolotl's pattern dialect: `re.match`, every "." that no "+" follows is literal, and a name must not merely start like
another layer's, hence `[.]` behind the number.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from axolotl_layersel.stack import DecoderStack


def full_patterns(stack: DecoderStack, *, first_trainable: int, train_head: bool) -> list[str]:
    """`unfrozen_parameters` of full fine-tuning; matches layers k..L-1 and, with `train_head`, final norm and head."""
    patterns = [f"^{stack.layers_name}.({_numbers(stack, first_trainable)})[.].+"]
    if train_head:
        patterns += [f"^{stack.final_norm_name}.+", f"^{stack.head_name}.+"]
    return patterns


def adapter_patterns(
    stack: DecoderStack, *, first_trainable: int, target_modules: Any = (), modules_to_save: Iterable[str] = ()
) -> list[str]:
    """`unfrozen_parameters` of a PEFT-wrapped model: adapter parameters of layers k..L-1, and what the user adds.

    Args:
        target_modules: the config's `lora_target_modules`; a head in that list keeps its adapter.
        modules_to_save: the config's `lora_modules_to_save`, trained whole.
    """
    prefix = "^base_model.model."
    patterns = [f"{prefix}{stack.layers_name}.({_numbers(stack, first_trainable)})[.].+lora_.+"]
    if isinstance(target_modules, (list, tuple)) and stack.head_name.rpartition(".")[2] in target_modules:
        patterns.append(f"{prefix}{stack.head_name}.lora_.+")
    patterns += [f"{prefix}(.+[.])?{name}.modules_to_save.+" for name in modules_to_save]
    return patterns


def _numbers(stack: DecoderStack, first_trainable: int) -> str:
    return "|".join(str(i) for i in range(first_trainable, stack.num_layers))


def resolve_train_head(option: str | bool, *, tied: bool) -> bool:
    """Whether full fine-tuning also trains final norm and head.

    Raises:
        ValueError: asked for with a head that shares its weight with the embeddings, which would reach the input.
    """
    if option is True and tied:
        raise ValueError(
            "train_head is true, but the head shares its weight with the embeddings, so training it would "
            "back-propagate through every layer: use `train_head: auto` or `false`"
        )
    return not tied if option == "auto" else bool(option)


def adapter_updates(
    cfg: Mapping[str, Any], stack: DecoderStack, *, first_trainable: int, module_names: Sequence[str], numbered: int
) -> dict[str, Any]:
    """Config keys that place adapters on layers k..L-1 only.

    Args:
        cfg: the run's config.
        module_names: names of all modules of the base model.
        numbered: how many lists of numbered modules lie outside of the decoder layers (vision towers); with any, PEFT
            is told which list `layers_to_transform` counts.

    Raises:
        ValueError: `lora_target_modules` is a regex that matches nothing in layers k..L-1.
    """
    kept = range(first_trainable, stack.num_layers)
    targets = cfg.get("lora_target_modules")
    updates: dict[str, Any] = {}
    if isinstance(targets, str) and targets != "all-linear" and not cfg.get("lora_target_linear"):
        matched = [name for name in module_names if re.fullmatch(targets, name)]
        updates["lora_target_modules"] = [name for name in matched if layer_of(name, stack) in (*kept, None)]
        if not any(layer_of(name, stack) is not None for name in updates["lora_target_modules"]):
            raise ValueError(
                f"lora_target_modules {targets!r} matches {len(matched)} modules, none of them in the decoder layers "
                f"{kept.start} to {kept.stop - 1} that are to be trained: check the pattern"
            )
    else:
        if isinstance(targets, (list, tuple)):
            inside = [t for t in targets if layer_of(str(t), stack) in (*kept, None)]
            if len(inside) != len(targets):
                updates["lora_target_modules"] = inside
        updates["peft_layers_to_transform"] = list(kept)
        if numbered:
            updates["peft_layers_pattern"] = _layers_pattern(stack)
    if parameters := cfg.get("lora_target_parameters"):
        updates["lora_target_parameters"] = [
            f"{stack.layers_name}.{i}.{_inside_layer(str(name), stack)}"
            for name in ([parameters] if isinstance(parameters, str) else parameters)
            for i in kept
        ]
    return updates


def _layers_pattern(stack: DecoderStack) -> str:
    """PEFT wants a "." before the pattern, so the first part of the name is left out."""
    return stack.layers_name.partition(".")[2] or stack.layers_name


def _inside_layer(name: str, stack: DecoderStack) -> str:
    """`mlp.experts.gate_up_proj` from the same name with or without the layer before it."""
    return re.sub(rf"^(.*[.])?{re.escape(stack.layers_name)}[.]\d+[.]", "", name)


def layer_of(name: str, stack: DecoderStack) -> int | None:
    """Index of the decoder layer that a module or parameter belongs to, or None; wrapper prefixes do not matter."""
    found = re.search(rf"(?:^|[.]){re.escape(stack.layers_name)}[.](\d+)(?:[.]|$)", name)
    return int(found.group(1)) if found else None


def expected_trainable(
    names: Iterable[str], stack: DecoderStack, *, first_trainable: int, adapter: str | None, train_head: bool
) -> list[str]:
    """Which of a model's parameters the plan trains, by name.

    Args:
        names: all parameter names, PEFT's wrapper included.
        stack: found in the same model.
        train_head: full fine-tuning also trains final norm and head.

    Raises:
        ValueError: a layer that is to be trained has no parameter to train, because no adapter target matches there.
    """
    expected, reached = [], set()
    for name in names:
        layer = layer_of(name, stack)
        if adapter:
            chosen = ("lora_" in name and (layer is None or layer >= first_trainable)) or ".modules_to_save." in name
        else:
            chosen = layer >= first_trainable if layer is not None else train_head and _in_read_out(name, stack)
        if chosen:
            expected.append(name)
            reached.add(layer)
    if missing := sorted(set(range(first_trainable, stack.num_layers)) - reached):
        raise ValueError(
            f"decoder layers {missing} are to be trained, but no parameter there is trainable in this mode: check that "
            "`lora_target_modules` names modules of every layer, or set `lora_target_linear: true`"
        )
    return expected


def _in_read_out(name: str, stack: DecoderStack) -> bool:
    return any(name.startswith(f"{part}.") for part in (stack.final_norm_name, stack.head_name))
