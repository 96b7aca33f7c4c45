"""Run batches through a model one decoder layer at a time, each layer brought to the device once for all batches.

    embeddings here      every batch enters; what the model gives to each layer (masks, positions) is recorded
    layer 0 here         every batch passes it; its output is what layer 1 is given
    ...                  to the last layer

The model's own forward pass makes what layers are given: it runs with layers that compute nothing. States and masks of
the batches wait on the device as long as all of them together are smaller than a decoder layer, else in main memory.
Where they are more than may be kept, batches go through the layers in groups, and layers come once for each group.

A decoder layer that takes more from the layer before it than the hidden state cannot be run like this:
`verify_layers.py` sends one batch along that was run in a whole forward pass before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from axolotl_layersel.model.decoder_stack import DecoderStack, given_state, unwrap
from axolotl_layersel.model.memory import halved, noting_lack
from axolotl_layersel.model.passing_batch import STATE, B, Passing, R
from axolotl_layersel.model.replaced_forward import replaced_forward
from axolotl_layersel.model.weights_ahead import weights_in_turn
from axolotl_layersel.model.weights_here import weights_here, whole_bytes


@dataclass(frozen=True)
class LayerByLayer:
    """How batches are run through the layers.

    `anyone` is called before every group of batches and every layer: whether some process says so. Where weights are
    gathered by all processes, all call it equally often, and an error of one of them reaches the others here.
    """

    device: torch.device  # that computes
    keep_bytes: int  # most that waits between two layers, on this process; one batch always may
    ahead: bool = True  # bring the next layer while one computes, so that two are there
    anyone: Callable[[bool], bool] = lambda mine: mine
    passed: Callable[[float], None] = lambda share: None  # told after each layer what share of the work is done


def run_layers(
    stack: DecoderStack, batches: Sequence[B], *, way: LayerByLayer, enter: Callable[[B], R], as_tuple: bool
) -> Iterator[tuple[B, R]]:
    """Run batches through embeddings and layers; final norm and unembedding are left to the readers.

    Args:
        stack: what is neither in its layers nor in its embeddings is on the device.
        batches: on any device.
        enter: makes the reader of a batch, on the device that computes.
        as_tuple: this model's layers return a tuple, the hidden state first; `verify_layers.py` finds out.

    Yields:
        Each batch with its reader when its group has passed all layers. Where memory ran out on some process, all have
        halved theirs.

    Raises:
        TooLargeError: memory does not suffice for one row.
    """
    pending, done = list(batches), 0
    total = sum(batch.input_ids.numel() for batch in pending)
    while way.anyone(bool(pending)):
        with weights_here([stack.embeddings], way.device):
            group, ran_out = _entering(stack, pending, way=way, enter=enter, as_tuple=as_tuple)
        size = sum(one.batch.input_ids.numel() for one in group)

        def passed(layers: int, done: int = done, size: int = size) -> None:
            way.passed((done + size * layers / stack.num_layers) / max(total, 1))

        if _through_all(stack, group, way=way, ran_out=ran_out, passed=passed):
            done += size
            yield from ((one.batch, one.reader) for one in group)
        else:
            pending = halved([*(one.batch for one in group), *pending], _halves)
        group.clear()  # before the next one fills memory


class _AllSeen(Exception):
    """Ends a forward pass early; no error."""


def _entering(
    stack: DecoderStack, pending: list[B], *, way: LayerByLayer, enter: Callable[[B], R], as_tuple: bool
) -> tuple[list[Passing[B, R]], bool]:
    """Take batches from `pending` as long as they may wait together; and whether memory ran out for the next."""
    group: list[Passing[B, R]] = []
    kept, a_layer = 0, max(whole_bytes(layer) for layer in stack.layers)
    while pending:
        with noting_lack(pending[0], _halves) as lack:
            one = _enter(stack, pending[0], way=way, enter=enter, as_tuple=as_tuple)
        if lack.memory:
            return group, True
        kept += one.nbytes
        if group and kept > way.keep_bytes:
            break
        group.append(one)
        del pending[0]
        for other in group if kept > a_layer else []:
            other.wait_in(torch.device("cpu"))
    return group, False


def _enter(
    stack: DecoderStack, batch: B, *, way: LayerByLayer, enter: Callable[[B], R], as_tuple: bool
) -> Passing[B, R]:
    """Run the embeddings, and record what the model gives to each layer: they compute nothing meanwhile."""
    states: list[Tensor] = []
    calls: list[Any] = []

    def hollow(_own: Any) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            state_BTD = given_state(args, kwargs)
            states.append(state_BTD)
            calls.append(
                (
                    tuple(STATE if value is state_BTD else value for value in args),
                    {name: STATE if value is state_BTD else value for name, value in kwargs.items()},
                )
            )
            if len(calls) == stack.num_layers:
                raise _AllSeen
            alias_BTD = state_BTD.view_as(state_BTD)  # another object: a layer may be given the first state as well
            return (alias_BTD, None) if as_tuple else alias_BTD

        return forward

    with replaced_forward([unwrap(layer) for layer in stack.layers], hollow), suppress(_AllSeen):
        mask = {} if batch.attention_mask is None else {"attention_mask": batch.attention_mask.to(way.device)}
        stack.backbone(input_ids=batch.input_ids.to(way.device), **mask, use_cache=False)
    reader = enter(batch)
    reader.read(0, states[0])
    return Passing(batch, reader, states[0], calls, home=way.device)


def _through_all(
    stack: DecoderStack,
    group: Sequence[Passing[B, R]],
    *,
    way: LayerByLayer,
    ran_out: bool,
    passed: Callable[[int], None],
) -> bool:
    """Let a group pass all layers; False where memory ran out on some process."""
    with closing(weights_in_turn(stack.layers, way.device, ahead=way.ahead)) as turns:
        for index in range(stack.num_layers):
            if way.anyone(ran_out):
                return False
            layer = next(turns)
            for one in group:
                with noting_lack(one.batch, _halves) as lack:
                    one.through(index, layer, way.device)
                if ran_out := lack.memory:
                    break
            passed(index + 1)
    return not way.anyone(ran_out)


def _halves(batch: B) -> list[B]:
    return batch.halves()
