"""How a run's model is scored: in whole forward passes, or layer by layer where it does not fit the device."""

from __future__ import annotations

import os
import time

import psutil
import torch
from torch import nn

from axolotl_layersel.integration.log import LOG
from axolotl_layersel.integration.processes import Processes
from axolotl_layersel.integration.run_settings import RunSettings
from axolotl_layersel.method.scoring_pass import Progress, scoring_bytes
from axolotl_layersel.model.decoder_stack import DecoderStack
from axolotl_layersel.model.layer_by_layer import LayerByLayer
from axolotl_layersel.model.weights_here import Place, computing_device, places, whole_bytes

SHARE_OF_FREE = 0.5  # of main memory, for the states of all processes on this machine
_FULL = 0.95  # of the free device memory; the allocator wastes some
_SAYS_AFTER = 0.05  # of the work: then the rest of the time can be told


def scoring_way(
    settings: RunSettings, model: nn.Module, stack: DecoderStack, *, processes: Processes
) -> LayerByLayer | None:
    """How to run the model layer by layer, or None where whole forward passes do; the log says why.

    Args:
        settings: of the run.
        model: before adapters, wherever axolotl left it; not moved.
        stack: found in it.
        processes: of the run; where weights are partitioned, all go through the layers together.

    Raises:
        ValueError: weights are nowhere on this process, or the config forbids the only way there is.
    """
    device, found = _device_and_places(settings, model)
    wanted = settings.options.layer_by_layer
    why = _only_way(found)
    if why is not None and wanted is False:
        raise ValueError(f"`layer_by_layer: false`, but {why}: set `layer_by_layer: auto`")
    if why is None and wanted == "auto":
        why = _too_large(settings, model, stack, device, found)
    if why is None and wanted is not True:
        return None
    keep = keep_bytes(settings)
    if processes.is_main:
        layer, head = max(whole_bytes(layer) for layer in stack.layers), whole_bytes(stack.head)
        LOG.info(
            f"layersel: scoring layer by layer on {device}, because {why or 'the config asks for it'}: two layers "
            f"({_gb(2 * layer)}), the unembedding ({_gb(head)}) and a batch are on it at a time, and the states of the "
            f"other batches in at most {_gb(keep)} of main memory"
        )
    if "partitioned" not in found:
        return LayerByLayer(device, keep)
    return LayerByLayer(device, keep, anyone=lambda mine: any(processes.together(lambda: mine)))


def check_whole(settings: RunSettings, model: nn.Module, stack: DecoderStack, *, what: str) -> None:
    """Refuse what needs the whole model on the device where it does not fit.

    Args:
        what: is to be done with it.

    Raises:
        ValueError: with the reason and the command that scores such a model.
    """
    device, found = _device_and_places(settings, model)
    why = _only_way(found) or _too_large(settings, model, stack, device, found)
    if why is not None:
        raise ValueError(
            f"{what} needs the whole model on the device, and {why}: `axolotl layersel score` brings one layer after "
            "the other there"
        )


def keep_bytes(settings: RunSettings) -> int:
    """Most bytes of states that may wait between two layers, on this process."""
    if (given := settings.options.layer_by_layer_gb) is not None:
        return int(given * 1e9)
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return int(SHARE_OF_FREE * psutil.virtual_memory().available / beside)


def telling_time(progress: Progress, *, rows: int, enabled: bool) -> Progress:
    """The same progress, and once a line with the time that is left, measured on the first layers."""
    first: tuple[float, int] | None = None  # proving the model comes before it, and is not to count
    told = not enabled

    def advance(done: int, tokens: int) -> None:
        nonlocal first, told
        now = time.perf_counter()
        first = first or (now, done)
        if not told and _SAYS_AFTER * rows <= done - first[1] < rows:
            left = (now - first[0]) * (rows - done) / (done - first[1])
            LOG.info(f"layersel: the first layers are done, about {left:.0f} s are left")
            told = True
        progress(done, tokens)

    return advance


def _device_and_places(settings: RunSettings, model: nn.Module) -> tuple[torch.device, set[Place]]:
    device = torch.device("cpu") if settings.use_cpu else computing_device(model)
    return device, places(model, device)


def _too_large(
    settings: RunSettings, model: nn.Module, stack: DecoderStack, device: torch.device, found: set[Place]
) -> str | None:
    free = torch.cuda.mem_get_info(device)[0] if "host" in found else 0
    return does_not_fit(model, stack, found, free=free, batch_tokens=settings.batch_tokens)


def _only_way(found: set[Place]) -> str | None:
    """Why whole forward passes are impossible, whatever fits, or None."""
    if "missing" in found:
        raise ValueError(
            "weights of the model are not on this process, so it cannot be scored here: score once on one process with "
            "`axolotl layersel score CONFIG`, then give `layersel: {plan: ...}`"
        )
    if "partitioned" in found:
        return "DeepSpeed has partitioned the weights"
    return "weights are offloaded to main memory or to the disk" if "offloaded" in found else None


def does_not_fit(
    model: nn.Module, stack: DecoderStack, found: set[Place], *, free: int, batch_tokens: int
) -> str | None:
    """Why a model in main memory does not go onto the GPU as a whole, or None.

    Args:
        found: where its weights are.
        free: bytes on the GPU.
        batch_tokens: padded tokens in one forward pass.
    """
    if "host" not in found:
        return None
    waiting = sum(p.nbytes for p in model.parameters() if p.device.type == "cpu")
    needed = waiting + scoring_bytes(stack, batch_tokens=batch_tokens)
    if needed <= _FULL * free:
        return None
    return f"the model and what scoring needs take {_gb(needed)}, and {_gb(_FULL * free)} are free there"


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
