"""Which parameters a plan trains, by name, and what says so in a config for full fine-tuning.

Full fine-tuning: `unfrozen_parameters`, patterns for the layers and, where that does not reach the embeddings, for
final norm and head. Adapters: `adapter_targets.py`.

axolotl's pattern dialect: `re.match`, every "." that no "+" follows is literal, and a name must not merely start like
another layer's, hence `[.]` behind the number.
"""

from __future__ import annotations

from collections.abc import Iterable

from axolotl_layersel.model.decoder_stack import DecoderStack
from axolotl_layersel.model.parameter_names import layer_of

# In the names of what PEFT trains: adapters, and what the user adds, whole modules and single embedding rows.
_TRAINED = ("lora_", ".modules_to_save.", ".trainable_tokens_delta.")


def full_patterns(stack: DecoderStack, *, first_trainable: int, train_norm_and_head: bool) -> list[str]:
    """`unfrozen_parameters` of full fine-tuning: layers k..L-1 and, with `train_norm_and_head`, norm and head."""
    patterns = [f"^{stack.layers_name}.({layer_numbers(stack, first_trainable)})[.].+"]
    if train_norm_and_head:
        patterns += [f"^{stack.final_norm_name}[.].+", f"^{stack.head_name}[.].+"]
    return patterns


def layer_numbers(stack: DecoderStack, first_trainable: int) -> str:
    """`k|k+1|...|L-1`, for a pattern."""
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


def expected_trainable(
    names: Iterable[str],
    stack: DecoderStack,
    *,
    first_trainable: int,
    adapter: str | None,
    train_norm_and_head: bool,
) -> list[str]:
    """Which of a model's parameters the plan trains, by name.

    Args:
        names: all parameter names, PEFT's wrapper included.
        stack: found in the same model.
        train_norm_and_head: full fine-tuning also trains final norm and head.

    Raises:
        ValueError: a layer that is to be trained has no parameter to train, because no adapter target matches there.
    """
    expected, reached = [], set()
    for name in names:
        layer = layer_of(name, stack)
        if adapter:
            chosen = (layer is None or layer >= first_trainable) and any(part in name for part in _TRAINED)
        else:
            chosen = (
                layer >= first_trainable if layer is not None else train_norm_and_head and _in_read_out(name, stack)
            )
        if chosen:
            expected.append(name)
            reached.add(layer)
    if missing := sorted(set(range(first_trainable, stack.num_layers)) - reached):
        raise ValueError(
            f"decoder layers {missing} are to be trained, but no parameter there is trainable in this mode: check that "
            "`lora_target_modules` lists modules of every layer, or set `lora_target_linear: true`"
        )
    return expected


def _in_read_out(name: str, stack: DecoderStack) -> bool:
    return any(name.startswith(f"{part}.") for part in (stack.final_norm_name, stack.head_name))
