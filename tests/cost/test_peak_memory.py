"""The predicted peak of memory beside what torch's profiler saw allocated in real training steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from allocated import allocated_at_most
from peft import LoraConfig, get_peft_model
from tiny import PROJECTIONS, tiny_llama, tiny_llama_4bit

from axolotl_layersel.cost.cut_cost import CutCost, Mode, StepShape, cut_costs
from axolotl_layersel.cost.peak_memory import Holds, held_bytes, offloaded_bytes, optimizer_bytes, peak_memory
from axolotl_layersel.model.adapted_modules import adapted_modules
from axolotl_layersel.model.decoder_stack import find_stack
from axolotl_layersel.plan_parts import PeakMemory
from axolotl_layersel.training.backward_cut import stop_backward

LAYERS = 4
SHAPE = StepShape(batch=2, positions=96)
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "max_position_embeddings": 96,
    "use_cache": False,
}
LORA = LoraConfig(r=4, target_modules=PROJECTIONS, task_type="CAUSAL_LM")


def holds(**changes: Any) -> Holds:
    return Holds(
        **{"optimizer": "adamw_torch", "accumulates": False, "fused_loss": False, "offloads": False, **changes}
    )


def predicted(model: Any, mode: Mode, *, cut: int, **changes: Any) -> tuple[PeakMemory, CutCost]:
    stack = find_stack(model)
    cost = cut_costs(stack, mode=mode, shape=SHAPE)[cut]
    return peak_memory(model, stack, cut=cost, mode=mode, shape=SHAPE, holds=holds(**changes)), cost


@pytest.mark.parametrize("vocabulary", [61, 4096])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("cut", [0, 2])
@pytest.mark.parametrize("adapter", ["lora", None])
def test_the_peak_is_what_a_training_step_allocates(
    adapter: str | None, cut: int, checkpointing: bool, vocabulary: int
) -> None:
    model: Any = tiny_llama(num_layers=LAYERS, vocab_size=vocabulary, **SIZES)
    adapters = adapted_modules(model, LORA) if adapter else None
    memory = predicted(model, Mode(adapters=adapters, checkpointing=checkpointing), cut=cut, accumulates=True)[0]
    stack = find_stack(model)
    if adapter:
        chosen = LoraConfig(r=4, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
        chosen.layers_to_transform = list(range(cut, LAYERS))
        model = get_peft_model(model, chosen)
    else:
        model.requires_grad_(False)
        for layer in stack.layers[cut:]:
            layer.requires_grad_(True)
    if cut:
        stop_backward(model, layers=stack.layers, first_trainable=cut)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.enable_input_require_grads()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=False)
    ids = torch.randint(3, vocabulary, (SHAPE.batch, SHAPE.positions))

    def micro_step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()

    micro_step()
    optimizer.step()  # its state, and the gradients of a first micro batch, are there
    before = held_bytes([model]) + sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    before += sum(v.nbytes for state in optimizer.state.values() for v in state.values() if v.dim())
    measured = before + allocated_at_most(micro_step)
    # What a layer holds for a moment is not predicted: the gradients of its three widest products, two of a state.
    tokens = SHAPE.batch * SHAPE.positions
    for_a_moment = 4 * tokens * (3 * SIZES["intermediate_size"] + 2 * SIZES["hidden_size"])
    assert -0.001 * memory.total <= measured - memory.total <= for_a_moment
    if vocabulary == 4096:  # the peak is at the loss, where no layer computes
        assert measured == pytest.approx(memory.total, rel=0.005)
    assert (memory.total < memory.all_layers) == (cut > 0)


def test_parts_add_up_as_they_follow_each_other() -> None:
    model = tiny_llama(num_layers=LAYERS, **SIZES)
    mode = Mode(adapters=None, checkpointing=True)
    memory, _ = predicted(model, mode, cut=2)
    held = memory.weights + memory.optimizer
    assert memory.total == held + max(memory.activations + memory.passing, memory.gradients)
    accumulated, _ = predicted(model, mode, cut=2, accumulates=True)
    assert accumulated.total == held + memory.activations + memory.passing + memory.gradients
    fused, cost = predicted(model, mode, cut=2, fused_loss=True)
    assert fused.passing == round(cost.cut.recomputed_bytes)
    away, _ = predicted(model, mode, cut=2, offloads=True)
    assert away.offloaded == offloaded_bytes(find_stack(model), first_trainable=2)
    assert away.total == memory.total - away.offloaded and away.all_layers == memory.all_layers


def test_a_head_that_shares_the_embeddings_keeps_them_on_the_device() -> None:
    tied, untied = (tiny_llama(num_layers=LAYERS, tie_word_embeddings=tie, **SIZES) for tie in (True, False))
    difference = offloaded_bytes(find_stack(untied), first_trainable=1) - offloaded_bytes(
        find_stack(tied), first_trainable=1
    )
    assert difference == untied.get_input_embeddings().weight.nbytes
    assert offloaded_bytes(find_stack(untied), first_trainable=0) == 0


def test_packed_weights_count_with_their_scales(tmp_path: Path) -> None:
    model = tiny_llama_4bit(tmp_path, num_layers=1, **SIZES)
    layer = find_stack(model).layers[0]
    packed = [p for p in layer.parameters() if hasattr(p, "quant_state")]
    assert len(packed) == 7
    numbers = sum(p.quant_state.shape.numel() for p in packed)
    rest = sum(p.nbytes for p in layer.parameters() if not hasattr(p, "quant_state"))
    # Four bits, one float32 scale for 64 numbers, and for each matrix its table of 16 and a few facts as bytes.
    assert 0 <= held_bytes([layer]) - rest - numbers * (1 / 2 + 4 / 64) <= len(packed) * 1024


@pytest.mark.parametrize(
    ("name", "itemsize", "expected"),
    [
        ("adamw_torch_fused", 4, 8),
        ("adamw_torch", 2, 4),
        ("adamw_bnb_8bit", 2, 2),
        ("paged_adamw_8bit", 4, 2),
        ("adamw_torch_4bit", 4, 1),
        ("lion_pytorch", 4, 4),
        ("muon", 2, 2),
        ("adafactor", 4, 0),
        ("sgd", 4, 0),
        ("some_new_one", 4, 8),
    ],
)
def test_the_state_of_optimizers(name: str, itemsize: int, expected: float) -> None:
    assert optimizer_bytes(name, itemsize=itemsize) == expected
