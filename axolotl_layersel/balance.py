"""The balance of a machine: how many FLOPs it computes in the time in which it moves a byte.

Two operations are timed at a model's own sizes: the product of N x D numbers with a D x D matrix, which is nearly all
arithmetic, and the sum of two N x D arrays, which is nearly all traffic. `cost.py` weighs bytes against FLOPs with it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

REPEATS = 25
WARM_UP = 5


def measure_balance(*, rows: int, width: int, device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per byte of `device`, a median of some milliseconds; on a CPU in processor time of the current threads.

    Args:
        rows: N, positions of a micro batch.
        width: D, of the hidden states.
        dtype: that products are computed in.
    """
    one_ND = torch.ones(rows, width, device=device, dtype=dtype)
    weight_DD = torch.ones(width, width, device=device, dtype=dtype)
    product = _seconds(lambda: one_ND @ weight_DD, device)
    total = _seconds(lambda: one_ND + one_ND, device)
    flops_per_second = 2.0 * rows * width * width / product
    bytes_per_second = 3.0 * rows * width * one_ND.element_size() / total
    return flops_per_second / bytes_per_second


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    taken: list[float] = []
    for _ in range(REPEATS):
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
