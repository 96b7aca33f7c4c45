"""The balance of a machine: how many FLOPs it computes in the time in which it moves a byte.

A step is mostly wide products, which are nearly all arithmetic. What is left is much the same everywhere: arrays are
read, a little is computed, arrays are written. An adapter is the typical case, and in LoRA the most frequent one, with
products too narrow to run at full speed. So both are timed at a model's own sizes: the product of N x D numbers with a
D x D matrix, and an adapter's forward and backward pass. `cut_cost.py` weighs bytes against FLOPs with the result.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from axolotl_layersel.cost.layer_run import Moved

WARM_UP = 3
REPEATS = 12


def measure_balance(*, rows: int, width: int, rank: int, device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per byte of `device`; takes some milliseconds, on a CPU those of the processor in this process.

    Args:
        rows: N, positions of a micro batch.
        width: D, of the hidden states.
        rank: of the adapters; a usual one for full fine-tuning.
        dtype: that products are computed in.
    """
    states_ND = torch.ones(rows, width, device=device, dtype=dtype, requires_grad=True)
    weight_DD = torch.ones(width, width, device=device, dtype=dtype)
    down_RD = torch.ones(rank, width, device=device, dtype=dtype, requires_grad=True)
    up_DR = torch.ones(width, rank, device=device, dtype=dtype, requires_grad=True)
    base_ND = torch.ones(rows, width, device=device, dtype=dtype, requires_grad=True)

    def product() -> object:
        return states_ND.detach() @ weight_DD

    def adapter() -> object:
        adapted_ND = base_ND + (states_ND @ down_RD.T) @ up_DR.T * 2.0
        gradients = torch.autograd.grad(adapted_ND, (states_ND, down_RD, up_DR, base_ND), base_ND.detach())
        return gradients[0] + base_ND.detach()  # to the gradient that the module itself hands back

    with torch.enable_grad():
        moved = Moved()
        with moved:
            adapter()
        flops_per_second = 2.0 * rows * width * width / _seconds(product, device)
        return flops_per_second * _seconds(adapter, device) / moved.bytes


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    taken: list[float] = []
    for _ in range(WARM_UP + REPEATS):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            work()
            end.record()
            end.synchronize()
            taken.append(start.elapsed_time(end) / 1000)
        else:
            began = time.process_time()
            work()
            taken.append(time.process_time() - began)
    return statistics.median(taken[WARM_UP:])
