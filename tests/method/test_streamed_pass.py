"""Scoring layer by layer gives the scores of whole forward passes, to the bit, wherever the weights are."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from model_outcomes import rows
from models import CASES, Case
from tiny import tiny_llama, tiny_llama_4bit
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaModel

from axolotl_layersel.method.scoring_pass import ScoringError, measure
from axolotl_layersel.method.streamed_pass import measure_streamed
from axolotl_layersel.method.transition import RowStatistics
from axolotl_layersel.model.decoder_stack import StackError, find_stack
from axolotl_layersel.model.latent_states import left_as_found
from axolotl_layersel.model.layer_by_layer import LayerByLayer

CPU = torch.device("cpu")
SETTINGS: dict[str, Any] = {"deviation": "cosine", "batch_tokens": 24, "transitions": True}


def _whole(model: nn.Module, **settings: Any) -> RowStatistics:
    with left_as_found(model):
        return measure(model, find_stack(model), rows(), range(6), **{**SETTINGS, **settings})


def _streamed(model: nn.Module, *, keep_bytes: int = 10**9, **settings: Any) -> RowStatistics:
    way = settings.pop("way", LayerByLayer(CPU, keep_bytes))
    with left_as_found(model, device=CPU):
        return measure_streamed(model, find_stack(model), rows(), range(6), way=way, **{**SETTINGS, **settings})


def _assert_equal(one: RowStatistics, other: RowStatistics) -> None:
    for name in RowStatistics.__dataclass_fields__:
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
    assert np.isfinite(one.deviation_RS).all() and one.loss_R.all()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_architecture_has_equal_scores(case: Case) -> None:
    model = case.model()
    _assert_equal(_streamed(model), _whole(model))


def test_weights_in_four_bits_have_equal_scores(tmp_path: Path) -> None:
    model = tiny_llama_4bit(tmp_path, num_layers=4, vocab_size=128, hidden_size=64, intermediate_size=64).eval()
    _assert_equal(_streamed(model), _whole(model))


@pytest.mark.parametrize("place", ["main memory", "disk"])
@pytest.mark.parametrize(("tied", "ahead"), [(False, True), (True, False)])
def test_weights_that_accelerate_offloads_are_fetched(place: str, tied: bool, ahead: bool, tmp_path: Path) -> None:
    model = tiny_llama(num_layers=4, tie_word_embeddings=tied, vocab_size=128).eval()
    expected = _whole(model)
    if place == "disk":
        disk_offload(model, tmp_path, execution_device=CPU)
    else:
        cpu_offload(model, execution_device=CPU)
    hooks = {name: module._hf_hook for name, module in model.named_modules() if hasattr(module, "_hf_hook")}
    _assert_equal(_streamed(model, way=LayerByLayer(CPU, 10**9, ahead=ahead)), expected)
    assert all(p.is_meta for p in model.parameters()), "weights stayed"
    assert hooks == {n: module._hf_hook for n, module in model.named_modules() if hasattr(module, "_hf_hook")}
    with torch.no_grad():  # as accelerate left it
        assert model(input_ids=torch.tensor([[3, 4, 5]])).logits.isfinite().all()


@pytest.mark.parametrize("keep_bytes", [1, 20_000])
def test_batches_that_may_not_wait_together_go_in_groups(keep_bytes: int) -> None:
    model = tiny_llama(num_layers=4, vocab_size=128).eval()
    runs: list[int] = []
    model.model.layers[3].register_forward_hook(lambda _m, args, _o: runs.append(len(args[0])))
    shares: list[tuple[int, int]] = []
    streamed = _streamed(model, keep_bytes=keep_bytes, progress=lambda done, tokens: shares.append((done, tokens)))
    assert len(runs) > 4, "this was one batch"
    assert shares == sorted(shares) and shares[-1] == (6, sum(len(row.input_ids) for row in rows()))
    _assert_equal(streamed, _whole(model))


def test_every_layer_comes_once_for_all_batches_of_a_group(tmp_path: Path) -> None:
    model = tiny_llama(num_layers=4, vocab_size=128).eval()
    disk_offload(model, tmp_path, execution_device=CPU)
    fetched: list[str] = []
    hook = model.model.layers[2].mlp.up_proj._hf_hook
    own = hook.weights_map

    class Counting(dict):  # type: ignore[type-arg]
        def __getitem__(self, name: str) -> Any:
            fetched.append(name)
            return own[name]

        def keys(self) -> Any:
            return own.keys() if hasattr(own, "keys") else dict.keys(self)

    hook.weights_map = Counting()
    _streamed(model)
    assert fetched == ["weight"] * 2  # once to prove the stack, once for all batches
    fetched.clear()
    _streamed(model, keep_bytes=1)
    assert len(fetched) > 3


def test_batches_are_halved_where_memory_runs_out() -> None:
    model = tiny_llama(num_layers=4, vocab_size=128).eval()
    expected = _whole(copy.deepcopy(model), batch_tokens=24)

    def full(_module: nn.Module, args: tuple[Any, ...]) -> None:
        if len(args[0]) > 1:
            raise torch.OutOfMemoryError("out of memory")

    model.model.layers[1].register_forward_pre_hook(full)
    streamed = _streamed(model)
    for name in ("rows_R", "tokens_R"):
        assert np.array_equal(getattr(streamed, name), getattr(expected, name))
    np.testing.assert_allclose(streamed.deviation_RS, expected.deviation_RS, rtol=1e-5)


def test_a_row_that_is_too_much_is_named() -> None:
    model = tiny_llama(num_layers=4, vocab_size=128).eval()

    def full(_module: nn.Module, args: tuple[Any, ...]) -> None:
        if args[0].shape[1] == 12:
            raise torch.OutOfMemoryError("out of memory")

    model.model.layers[1].register_forward_pre_hook(full)
    with pytest.raises(ScoringError, match=r"one row of 12 tokens alone is too much for the memory of cpu"):
        _streamed(model)


class _Chained(LlamaModel):
    """Every layer is also given what the layer before it was given."""

    def forward(self, input_ids: Any, attention_mask: Any = None, **_: Any) -> BaseModelOutputWithPast:
        states, before = self.embed_tokens(input_ids), None
        positions = self.rotary_emb(states, torch.arange(input_ids.shape[1])[None])
        for layer in self.layers:
            states, before = layer(states, before, position_embeddings=positions)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(states))


class _ChainedLayer(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, states: torch.Tensor, before: torch.Tensor | None, **options: Any) -> tuple[Any, Any]:
        output = self.layer(states, **options)
        return output if before is None else output + before, states


def test_a_model_whose_layers_need_more_than_the_state_is_refused() -> None:
    model = tiny_llama(num_layers=4, vocab_size=128).eval()
    model.model.__class__ = _Chained
    model.model.layers = nn.ModuleList(_ChainedLayer(layer) for layer in model.model.layers)
    _whole(model)  # in whole forward passes it is scored
    with pytest.raises(StackError, match="they take more from each other than the hidden state"):
        _streamed(model)
