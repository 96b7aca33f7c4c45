"""Why the states of this model cannot be cached: found in its modules, and proved by running it both ways."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from axolotl_layersel.model.decoder_stack import DecoderStack, StackError
from axolotl_layersel.prefix_cache.bypass import PrefixBypass, TokenInputs, compute_states
from axolotl_layersel.prefix_cache.cached_prefix import relative_error
from axolotl_layersel.prefix_cache.fill import Sample, padded
from axolotl_layersel.prefix_cache.fingerprint import below_the_cut
from axolotl_layersel.prefix_cache.state_store import PrefixCacheError

_NOISE = ("dropout", "jitter", "drop_path", "layerdrop")
_LENGTH_DEPENDENT = ("dynamic", "longrope")  # rotary frequencies that follow the longest row of a batch
PROBE_TOKENS = 64  # of each of the samples that are run both ways


def find_obstacles(stack: DecoderStack, *, first_trainable: int, preference: bool, max_tokens: int) -> list[str]:
    """Sentences for what in the modules forbids a cache.

    Args:
        stack: of the model in training.
        first_trainable: k.
        preference: a reference pass with adapters switched off shares the model.
        max_tokens: of the longest row of a batch.
    """
    return list(_obstacles(stack, first_trainable, preference, max_tokens))


def _obstacles(stack: DecoderStack, k: int, preference: bool, max_tokens: int) -> Iterator[str]:
    modules = list(below_the_cut(stack, first_trainable=k))
    if any(parameter.is_meta for _, module in modules for parameter in module.parameters(recurse=False)):
        yield "weights below the cut are offloaded (`device_map`, `max_memory`), and a cache moves them itself."
    noisy = [found for name, module in modules for found in _noise(name, module)]
    if noisy:
        yield (
            f"below the cut training is random ({', '.join(noisy[:3])}{', ...' if len(noisy) > 3 else ''}), so a "
            "sample has other states each time: set it to 0 in the model's config (`overrides_of_model_config`)."
        )
    if any("neftune" in getattr(hook, "__name__", "") for hook in stack.embeddings._forward_hooks.values()):
        yield "NEFTune adds noise to the embeddings: remove `neftune_noise_alpha`."
    trained = [name for name, module in modules for p in module.parameters(recurse=False) if p.requires_grad]
    if trained:
        yield f"{trained[0] or 'the backbone'} lies below the cut and is trained, so states change with every step."
    config = getattr(stack.backbone, "config", None)
    if getattr(config, "output_router_logits", False):
        yield "the loss has a part for the routers of all layers (`output_router_logits`), which frozen ones belong to."
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = {str(r.get("rope_type")) for r in (rope, *(v for v in rope.values() if isinstance(v, dict)))}
    longest = int(rope.get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", 0) or 0)
    if kinds & set(_LENGTH_DEPENDENT) and max_tokens > longest:
        yield (
            f"its rotary embeddings ({', '.join(sorted(kinds & set(_LENGTH_DEPENDENT)))}) depend on the longest row of "
            f"a batch above {longest} tokens: use `sequence_len: {longest}`."
        )
    if preference and any("lora" in name for name, _ in modules):
        yield "frozen adapters lie below the cut, and the reference pass switches them off."


def _noise(name: str, module: nn.Module) -> Iterator[str]:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        if module.p > 0:
            yield f"{name} drops {module.p:g}"
        return
    for attribute, value in vars(module).items():
        if isinstance(value, float) and value > 0 and any(word in attribute for word in _NOISE):
            yield f"{name}.{attribute} is {value:g}"


def probe(
    model: nn.Module, stack: DecoderStack, samples: Sequence[Sample], *, first_trainable: int, tolerance: float
) -> Tensor:
    """Run a few samples with and without the frozen layers; returns their states, (B, T, D).

    Args:
        model: in the mode and precision that the cache is filled in.
        samples: at least one.
        tolerance: largest mean relative error that rounding explains.

    Raises:
        PrefixCacheError: layers above the cut read more from below than the hidden state, or the states of a sample
            depend on the other samples or on what follows.
    """
    device = next(stack.layers[0].parameters()).device
    few = [Sample(s.key, s.ids[:PROBE_TOKENS], s.where) for s in (samples[0], samples[len(samples) // 2])]
    inputs = padded(few, device)
    states = compute_states(stack, first_trainable=first_trainable, inputs=inputs)
    if states.dim() != 3 or states.shape[:2] != inputs.input_ids.shape:
        raise PrefixCacheError(
            f"the layers hand on {tuple(states.shape)}, several streams or another order; a cache holds (batch, "
            "position, hidden)"
        )
    named = {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask, "use_cache": False}
    asked: list[bool] = []

    def answer(asked_for: TokenInputs | None) -> Tensor | None:
        asked.append(asked_for is not None)
        return states if asked_for is not None else None

    bypass = PrefixBypass(stack, first_trainable=first_trainable, states_of=answer)
    bypass.install()
    try:
        bypass.enabled = False
        whole = model(**named).logits
        bypass.enabled = True
        upper = model(**named).logits
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, StackError, TypeError, ValueError) as error:
        raise PrefixCacheError(
            f"the layers above the cut do not run without those below ({type(error).__name__}: {error})"
        ) from error
    finally:
        bypass.remove()
    if asked != [True]:
        raise PrefixCacheError(
            f"{type(stack.backbone).__name__} is not given token ids, so its samples cannot be told apart; multimodal "
            "models embed tokens outside of it"
        )
    for row, sample in enumerate(few):
        n = len(sample.ids)
        off = float(relative_error(upper[row, :n].float(), whole[row, :n].float()))
        if not off <= tolerance:
            raise PrefixCacheError(
                f"without the layers below the cut the logits are {off:.2g} off where rounding explains "
                f"{tolerance:.2g}: the layers above read more from below than the hidden state, such as shared keys "
                "and values, or inputs for each layer"
            )
        alone = Sample(sample.key, sample.ids[: max(1, n // 2)], sample.where)
        half = compute_states(stack, first_trainable=first_trainable, inputs=padded([alone], device))[0]
        off = float(relative_error(half.float(), states[row, : len(half)].float()))
        if not off <= tolerance:
            raise PrefixCacheError(
                f"the states of a sample change with the tokens after it or with other samples of the batch, by "
                f"{off:.2g} where rounding explains {tolerance:.2g}, so they cannot be cached by sample"
            )
    return states


def rounding_tolerance(stack: DecoderStack, *, first_trainable: int, autocast: torch.dtype | None) -> float:
    """The largest mean relative error of a token's state that another batch shape can give.

    A layer rounds its residual stream and its two branches some ten times, each time by at most half of the machine's
    epsilon relative to what is rounded. As independent errors these add up like a random walk over the layers. A factor
    of 16 covers what is larger than the stream that it is added to; wrong states are off by about 1.
    """
    modules = [module for _, module in below_the_cut(stack, first_trainable=first_trainable)]
    used = {autocast, *(getattr(module, "compute_dtype", None) for module in modules)}  # the second: of 4-bit weights
    used |= {p.dtype for module in modules for p in module.parameters(recurse=False)}
    epsilon = max(torch.finfo(d).eps for d in used if isinstance(d, torch.dtype) and d.is_floating_point)
    if torch.backends.cuda.matmul.allow_tf32 or torch.get_float32_matmul_precision() != "highest":
        epsilon = max(epsilon, 2.0**-10)
    return min(0.5, 16 * 0.5 * epsilon * math.sqrt(10 * first_trainable))
