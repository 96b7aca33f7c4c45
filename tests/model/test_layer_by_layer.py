"""How much device memory layer-by-layer scoring takes: counted by torch's profiler, the CPU standing in for the GPU."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from accelerate import disk_offload
from allocated import allocated_at_most
from model_outcomes import rows
from tiny import tiny_llama
from torch import nn

from axolotl_layersel.method.scoring_pass import measure, scoring_bytes
from axolotl_layersel.method.streamed_pass import measure_streamed
from axolotl_layersel.model.decoder_stack import find_stack
from axolotl_layersel.model.latent_states import left_as_found
from axolotl_layersel.model.layer_by_layer import LayerByLayer
from axolotl_layersel.model.weights_here import whole_bytes

CPU = torch.device("cpu")
BATCH_TOKENS = 24
HIDDEN = 128
ROWS = rows()
STATES = (
    sum(len(row.input_ids) for row in ROWS) * HIDDEN * 4 * 3
)  # padded; with the bases and the masks of their labels


def _model(layers: int) -> nn.Module:
    """A Llama whose weights are far larger than its states: 1 MB a layer."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 512, "vocab_size": 128, "num_key_value_heads": 4}
    return tiny_llama(num_layers=layers, **sizes).eval()


def _offloaded(layers: int, folder: Path) -> nn.Module:
    model = _model(layers)
    disk_offload(model, folder, execution_device=CPU)
    return model


def _stream(model: nn.Module, *, ahead: bool) -> None:
    way = LayerByLayer(CPU, 10**9, ahead=ahead)
    with left_as_found(model, device=CPU):
        stack = find_stack(model)
        measure_streamed(model, stack, ROWS, range(6), way=way, deviation="cosine", batch_tokens=BATCH_TOKENS)


def test_a_layer_the_unembedding_and_a_batch_are_on_the_device_whatever_the_depth(tmp_path: Path) -> None:
    stack = find_stack(_model(4))
    layer, head = whole_bytes(stack.layers[0]), whole_bytes(stack.head)
    assert layer > 10 * head, "this model says nothing about layers"
    of_a_batch = scoring_bytes(stack, batch_tokens=BATCH_TOKENS) - 2**27  # the unembedding's logits are few here
    models = [_offloaded(layers, tmp_path / str(layers)) for layers in (4, 16)]
    few, many = (allocated_at_most(partial(_stream, model, ahead=False)) for model in models)
    assert layer < few < layer + head + of_a_batch + STATES
    assert abs(many - few) < layer / 4


def test_whole_passes_need_all_layers() -> None:
    """The meter itself: what it says of a model that is made and scored as a whole."""

    def work() -> None:
        model = _model(16)
        with left_as_found(model):
            measure(model, find_stack(model), ROWS, range(6), deviation="cosine", batch_tokens=BATCH_TOKENS)

    assert allocated_at_most(work) > 16 * whole_bytes(find_stack(_model(4)).layers[0])


def test_two_layers_are_on_the_device_where_the_next_one_comes_ahead(tmp_path: Path) -> None:
    """The profiler does not see the thread that brings it, so weights are counted wherever a layer runs."""
    model = _offloaded(16, tmp_path)
    layers = find_stack(model).layers
    here: list[int] = []

    def count(*_args: object) -> None:
        here.append(sum(p.nbytes for layer in layers for p in layer.parameters() if not p.is_meta))

    for layer in layers:
        layer.mlp.act_fn.register_forward_hook(count)
    _stream(model, ahead=True)
    assert whole_bytes(layers[0]) <= min(here) and max(here) <= 2 * whole_bytes(layers[0])
