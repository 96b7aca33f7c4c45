"""Layers below the cut do not run where their output is known, and the layers above cannot tell the difference."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from frozen_layers import CUT, count_calls, full, lora, step
from tiny import tiny_llama, token_batch
from torch import Tensor

from axolotl_layersel.model.decoder_stack import find_stack
from axolotl_layersel.prefix_cache.bypass import PrefixBypass, TokenInputs, compute_states
from axolotl_layersel.training.backward_cut import stop_backward


@pytest.mark.parametrize("checkpointing", ["none", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("prepare", [lora, full])
def test_a_step_on_cached_states_is_the_step_of_the_whole_model(
    prepare: Callable[[Any], Any], checkpointing: str
) -> None:
    model = prepare(tiny_llama())
    stack = find_stack(model)
    reentrant = checkpointing == "reentrant"
    stop_backward(model, layers=stack.layers, first_trainable=CUT, reentrant=reentrant)
    if checkpointing != "none":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    calls = count_calls(model)
    batch = token_batch(rows=3)
    loss, gradients = step(model, batch)
    assert all(calls[i] > 0 for i in range(6)) and gradients

    inputs = TokenInputs(batch["input_ids"], batch["attention_mask"])
    cached = compute_states(stack, first_trainable=CUT, inputs=inputs)
    bypass = PrefixBypass(stack, first_trainable=CUT, states_of=lambda _: cached)
    bypass.install()
    calls.clear()
    cached_loss, cached_gradients = step(model, batch)
    assert {i for i, n in calls.items() if n} == {3, 4, 5}
    # The same states in the same batch: the same operations on the same numbers.
    assert torch.equal(loss, cached_loss)
    assert cached_gradients.keys() == gradients.keys()
    assert all(torch.equal(gradients[name], cached_gradients[name]) for name in gradients)

    bypass.remove()
    calls.clear()
    assert torch.equal(step(model, batch)[0], loss) and {i for i, n in calls.items() if n} == set(range(6))


def test_what_is_not_known_runs_through_the_layers() -> None:
    model = lora(tiny_llama())
    batch = token_batch()
    whole = step(model, batch)[0]
    asked: list[TokenInputs] = []

    def nothing(inputs: TokenInputs | None) -> None:
        assert inputs is not None
        asked.append(inputs)

    bypass = PrefixBypass(find_stack(model), first_trainable=CUT, states_of=nothing)
    bypass.install()
    assert torch.equal(step(model, batch)[0], whole)
    assert len(asked) == 1 and torch.equal(asked[0].input_ids, batch["input_ids"])


def test_generation_and_hidden_states_are_never_answered_from_the_cache() -> None:
    model = lora(tiny_llama()).eval()
    ids = token_batch()["input_ids"][1:]
    whole = model(input_ids=ids, output_hidden_states=True).hidden_states
    written = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)

    def wrong(inputs: TokenInputs | None) -> Tensor | None:
        return None if inputs is None else torch.full((*inputs.input_ids.shape, 32), float("nan"))

    bypass = PrefixBypass(find_stack(model), first_trainable=CUT, states_of=wrong)
    bypass.install()
    assert all(map(torch.equal, whole, model(input_ids=ids, output_hidden_states=True).hidden_states))
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=3, do_sample=False), written)
    assert model(input_ids=ids).logits.isnan().all(), "an ordinary call is answered"


def test_an_error_in_the_model_leaves_no_states_behind() -> None:
    model = lora(tiny_llama())
    batch = token_batch()
    states = [torch.zeros(2, 9, 31)]  # one dimension short
    bypass = PrefixBypass(find_stack(model), first_trainable=CUT, states_of=lambda _: states.pop() if states else None)
    bypass.install()
    with pytest.raises(RuntimeError):
        model(**batch)
    assert bypass.states is None
    assert model(**batch).loss.isfinite()
