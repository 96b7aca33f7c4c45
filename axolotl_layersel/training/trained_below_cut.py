"""What is trained on the input side of the cut, so that the backward pass of `backward_cut.py` cannot stop there."""

from __future__ import annotations

from torch import nn

from axolotl_layersel.model.decoder_stack import DecoderStack, unwrap
from axolotl_layersel.model.parameter_names import normalise, shorten, within
from axolotl_layersel.training.backward_cut import BackwardCutError

_REPLACED_PARTS = (".base_layer", ".original_module")  # where PEFT keeps the module that it replaces


def obstacles(model: nn.Module, *, stack: DecoderStack, first_trainable: int) -> list[str]:
    """Why the backward pass cannot stop at the cut: one sentence for each place that is trained and must not be.

    Args:
        model: with its adapters loaded and its trainable parameters set.
        stack: found in this model, before or after PEFT wrapped it.
        first_trainable: k; for 0 there is nothing to stop.

    Raises:
        BackwardCutError: the stack is not part of `model`.
    """
    if first_trainable == 0:
        return []
    names = {id(module): normalise(name) for name, module in model.named_modules()}

    def place(module: nn.Module) -> str:
        if id(unwrap(module)) not in names:
            raise BackwardCutError(f"a {type(module).__name__} of the decoder stack is not part of the model")
        name = names[id(unwrap(module))]
        while name.endswith(_REPLACED_PARTS):
            name = name.rpartition(".")[0]
        return name

    free = [place(module) for module in (*stack.layers[first_trainable:], stack.final_norm, stack.head)]
    frozen = [place(layer) for layer in stack.layers[:first_trainable]]
    tied_weight = getattr(stack.embeddings, "weight", None) if stack.tied else None
    embeddings = place(stack.embeddings)
    found: dict[str, list[str]] = {}
    for full_name, parameter in model.named_parameters():
        name = normalise(full_name)
        if not parameter.requires_grad:
            continue
        if parameter is tied_weight:
            what = f"the unembedding shares its weight with the input embeddings {embeddings!r}, and that is trained"
        elif within(name, [embeddings]):
            what = f"the input embeddings {embeddings!r} are trained"
        elif within(name, free):
            continue
        elif layer := within(name, frozen):
            what = f"the frozen decoder layer {layer!r} holds trained parameters"
        elif "prompt_encoder" in name.split("."):
            what = "a prompt in front of the first decoder layer is trained"
        else:
            what = "parameters outside the decoder layers, the final norm and the unembedding are trained"
        found.setdefault(what, []).append(name)
    return [f"{what} ({shorten(at)}), so gradients must pass through every layer." for what, at in found.items()]
