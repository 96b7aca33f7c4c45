"""The most that a training step holds on its device: weights, gradients, optimizer state, activations, logits.

What autograd saves is measured (`layer_costs.py`); the rest is counted from shapes and dtypes. Not counted: what a
layer holds for a moment while it is computed or differentiated, the optimizer's own temporaries, the allocator's waste.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from axolotl_layersel.cost.cut_cost import CutCost, Mode, StepCost, StepShape
from axolotl_layersel.model.decoder_stack import DecoderStack
from axolotl_layersel.plan_parts import PeakMemory

_ADAPTER_BYTES = 4  # PEFT keeps adapters in float32
_LOGIT_BYTES = 8  # two float32 gradients of the log-probabilities, which are saved and counted there, pass through


@dataclass(frozen=True)
class Holds:
    """What a run holds beside weights and activations."""

    optimizer: str  # axolotl's name
    accumulates: bool  # gradients of earlier micro batches are there while the next one runs
    fused_loss: bool  # logits are never whole in memory
    offloads: bool  # frozen weights leave the device


def peak_memory(
    model: nn.Module, stack: DecoderStack, *, cut: CutCost, mode: Mode, shape: StepShape, holds: Holds
) -> PeakMemory:
    """Predict it for a cut, and for all layers beside it.

    Args:
        model: as it is loaded, before adapters.
        stack: of the model.
        cut: its cost.
        mode: of training.
        shape: of a micro batch.
        holds: of the run.
    """
    held, frozen = held_bytes([model]), offloaded_bytes(stack, first_trainable=cut.first_trainable)
    offloaded = frozen if holds.offloads else 0
    itemsize = _ADAPTER_BYTES if mode.adapters else next(stack.layers[-1].parameters()).itemsize
    logits = 0 if holds.fused_loss else _LOGIT_BYTES * shape.batch * shape.positions * _vocabulary(stack)

    def parts(cost: StepCost, weights: int) -> dict[str, int]:
        trained = cost.trainable_parameters
        return {
            "weights": weights + (trained * itemsize if mode.adapters else 0),
            "gradients": trained * itemsize,
            "optimizer": round(trained * optimizer_bytes(holds.optimizer, itemsize=itemsize)),
            "activations": round(cost.saved_activation_bytes),
            "passing": max(logits, round(cost.recomputed_bytes)),
        }

    def total(of: dict[str, int]) -> int:
        passing = of["activations"] + of["passing"]  # gone by the time when all gradients are there
        moving = passing + of["gradients"] if holds.accumulates else max(passing, of["gradients"])
        return of["weights"] + of["optimizer"] + moving

    own = parts(cut.cut, held - offloaded)
    return PeakMemory(**own, offloaded=offloaded, total=total(own), all_layers=total(parts(cut.all_layers, held)))


def offloaded_bytes(stack: DecoderStack, *, first_trainable: int) -> int:
    """Weights of layers 0..k-1 and of the embeddings, unless the head shares them; 0 for k = 0."""
    if not first_trainable:
        return 0
    kept = {id(tensor) for tensor in stack.head.parameters()}
    return held_bytes([*stack.layers[:first_trainable], stack.embeddings], kept=kept)


def held_bytes(modules: Sequence[nn.Module], *, kept: Iterable[int] = ()) -> int:
    """Parameters and buffers of modules with the scales of quantised ones, each once, without those of these ids."""
    seen, total = set(kept), 0
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            total += tensor.nbytes
            state = getattr(tensor, "quant_state", None)
            if state is not None:
                total += sum(v.nbytes for v in state.as_dict(packed=True).values() if isinstance(v, Tensor))
    return total


def optimizer_bytes(name: str, *, itemsize: int) -> float:
    """Bytes of state for each trained parameter; an unknown optimizer is taken for Adam.

    Args:
        name: as axolotl spells it, such as `adamw_torch` or `paged_adamw_8bit`.
        itemsize: of a trained parameter.
    """
    name = name.lower()
    moments = 0 if "sgd" in name or "adafactor" in name else 1 if "lion" in name or "muon" in name else 2
    if "8bit" in name or "fp8" in name:
        return moments
    return moments * (0.5 if "4bit" in name else itemsize)


def _vocabulary(stack: DecoderStack) -> int:
    size = getattr(stack.head, "out_features", None)
    return size if isinstance(size, int) else len(next(stack.head.parameters()))
