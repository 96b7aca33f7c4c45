"""What torch's profiler sees allocated on the CPU, which stands in for a GPU's memory."""

from __future__ import annotations

import gc
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def allocated_at_most(work: Callable[[], object]) -> int:
    """The largest sum of bytes allocated and not yet freed while `work` runs, beside those from before.

    Garbage of an earlier profile would count as freed memory if it were collected meanwhile, so it is collected first.
    """
    gc.collect()
    gc.disable()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            work()
    finally:
        gc.enable()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events, "the profiler saw no memory"
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most
