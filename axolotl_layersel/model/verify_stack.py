"""Prove on one batch that a model computes what `decoder_stack.py` found in it by structure.

The proposed states must be the ones that the model computes, and norm and unembedding must reproduce the model's own
logits; else `StackError` says which of it fails.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from axolotl_layersel.model.decoder_stack import DecoderStack, StackError, first_tensor, given_state


def prove_stack(model: nn.Module, stack: DecoderStack, *, input_ids: Tensor, alone: bool = True) -> Tensor:
    """Check on one batch that the model computes what `stack` says; gradients are not needed.

    The input of layer i+1 must be the output of layer i, the input of the final norm the output of the last layer,
    and head(norm(h_L)) must order the vocabulary as the model's own logits do: equal up to scale, soft-cap or bias,
    which are monotone.

    Args:
        model: in eval mode, under the precision that it will be scored in.
        input_ids: (B, T) int64, without padding.
        alone: check as well that the backbone alone computes the states of the whole model, in a second forward pass.

    Returns:
        The output of the last layer, (B, T, D).

    Raises:
        StackError: with the first check that failed and what the model did instead.
    """
    seen: dict[str, Tensor] = {}
    order: list[int] = []
    mismatch: list[str] = []

    def into(index: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            order.append(index)
            if "state" in seen and not _same(seen["state"], given_state(args, kwargs)):
                mismatch.append(f"the input of layer {index} is not the output of the layer before it")

        return hook

    def out_of(_module: nn.Module, _args: Any, output: Any) -> None:
        seen["state"] = first_tensor(output)

    def into_norm(_module: nn.Module, args: tuple[Any, ...]) -> None:
        if "state" in seen and not _same(seen["state"], args[0]):
            mismatch.append(f"the input of {stack.final_norm_name} is not the output of the last layer")

    def out_of_norm(_module: nn.Module, _args: Any, output: Any) -> None:
        seen["normed"] = first_tensor(output)

    with ExitStack() as hooks, torch.no_grad():
        for index, layer in enumerate(stack.layers):
            hooks.enter_context(layer.register_forward_pre_hook(into(index), with_kwargs=True))
            hooks.enter_context(layer.register_forward_hook(out_of))
        hooks.enter_context(stack.final_norm.register_forward_pre_hook(into_norm))
        hooks.enter_context(stack.final_norm.register_forward_hook(out_of_norm))
        logits = model(input_ids=input_ids, use_cache=False).logits
        whole, ran = dict(seen), list(order)
        if alone:
            seen.clear()
            stack.backbone(input_ids=input_ids, use_cache=False)
    if ran != list(range(stack.num_layers)):
        mismatch.append(f"its layers ran in the order {ran}")
    if "normed" not in whole:
        mismatch.append(f"{stack.final_norm_name} did not run")
    elif not torch.allclose(whole["state"].float(), seen["state"].float(), rtol=1e-3, atol=1e-3, equal_nan=True):
        mismatch.append(f"{stack.backbone_name or 'the backbone'} alone computes other states than the whole model")
    if mismatch:
        raise StackError(f"{type(model).__name__}: {mismatch[0]}; found were {_describe(stack)}")
    if seen["state"].dim() != 3:
        raise StackError(
            f"{type(model).__name__}: the layers return a tensor of shape {tuple(seen['state'].shape)}; "
            "allowed is (batch, position, hidden)"
        )
    with torch.no_grad():
        ours_BTV = stack.head(whole["normed"]).float()
    _check_monotone(ours_BTV.flatten(0, 1), logits.float().flatten(0, 1), type(model).__name__, stack)
    return seen["state"]


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True))


def _describe(stack: DecoderStack) -> str:
    return (
        f"{stack.num_layers} decoder layers at {stack.layers_name!r}, final norm {stack.final_norm_name!r}, "
        f"unembedding {stack.head_name!r}"
    )


def _check_monotone(ours_NV: Tensor, theirs_NV: Tensor, model_name: str, stack: DecoderStack) -> None:
    if ours_NV.shape[-1] != theirs_NV.shape[-1]:
        raise StackError(
            f"{model_name}: {stack.head_name!r} gives {ours_NV.shape[-1]} logits, the model {theirs_NV.shape[-1]}"
        )
    if not torch.isfinite(theirs_NV).all():
        return
    order = ours_NV.argsort(dim=-1)
    sorted_theirs = theirs_NV.gather(-1, order)
    drop = (sorted_theirs[:, :-1] - sorted_theirs[:, 1:]).clamp(min=0).amax(dim=-1)
    spread = (sorted_theirs.amax(dim=-1) - sorted_theirs.amin(dim=-1)).clamp(min=torch.finfo(torch.float32).tiny)
    # One part in 64 of the spread is the rounding of bfloat16 logits, taken twice.
    worst = float((drop / spread).max())
    if worst > 1 / 64:
        raise StackError(
            f"{model_name}: norm and unembedding do not reproduce the model's logits (order broken by {worst:.3f} of "
            f"their spread); found were {_describe(stack)}"
        )
