"""Bring modules to the device one after the other, the next one while the present one computes."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, nullcontext
from typing import Any

import torch
from torch import nn

from axolotl_layersel.model.weights_here import places, weights_here


def weights_in_turn(
    modules: Sequence[nn.Module], device: torch.device, *, ahead: bool
) -> Generator[nn.Module, None, None]:
    """Yield each module with its weights on the device, until the next one is asked for.

    Args:
        ahead: bring the next one while one computes, so that two are there. Weights that all processes gather come
            when it is their turn all the same: a thread of its own would gather them in another order on every process.
    """
    if not ahead or any("partitioned" in places(module, device) for module in modules):
        for module in modules:
            with weights_here([module], device):
                yield module
        return
    with _Fetcher(device) as fetcher:
        coming = [fetcher.fetch(module) for module in modules[:1]]
        for module, following in zip(modules, [*modules[1:], None], strict=True):
            with closing(fetcher.wait_for(coming.pop())):
                if following is not None:
                    coming.append(fetcher.fetch(following))
                yield module
                # The next one has its memory before this one's is free: the GPU may still be computing with it.
                wait(coming)


class _Fetcher:
    """A thread that brings weights, on a GPU in a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._asked: list[Future[ExitStack]] = []

    def __enter__(self) -> _Fetcher:
        return self

    def __exit__(self, *_error: Any) -> None:
        self._pool.shutdown()
        for asked in self._asked:  # where the one who iterates stopped early
            if not asked.exception():
                asked.result().close()

    def fetch(self, module: nn.Module) -> Future[ExitStack]:
        """Begin to bring a module, when the GPU is done with the modules that left before."""
        done = torch.cuda.current_stream(self._device).record_event() if self._stream else None

        def bring() -> ExitStack:
            block = ExitStack()
            with torch.no_grad(), torch.cuda.stream(self._stream) if self._stream else nullcontext():
                if self._stream and done:
                    self._stream.wait_event(done)
                block.enter_context(weights_here([module], self._device))
            return block

        self._asked.append(self._pool.submit(bring))
        return self._asked[-1]

    def wait_for(self, coming: Future[ExitStack]) -> ExitStack:
        """Let what follows on the GPU wait until a module is there; closing the result takes it away."""
        block = coming.result()
        if self._stream:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return block
