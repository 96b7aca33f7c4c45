"""Move the weights of frozen layers out of the device's memory and back.

A weight keeps its name, shape and place in the model; only its data lie elsewhere. So saving, counting and hashing see
the same numbers, and nothing has to come back for them; running the layers does need them back. From a GPU weights go
to the host's memory, from the host's memory to a file that is mapped, so that the system may drop them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from axolotl_layersel.model.weights_here import move_scales


class OffloadedWeights:
    """The weights of some modules, here or away.

    Args:
        modules: whose own parameters and buffers move.
        kept: tensors that others use as well and that stay, such as an unembedding tied to the embeddings.
        folder: for the mapped files of weights that lie in the host's memory; they have no name there.
    """

    def __init__(self, modules: Sequence[nn.Module], *, kept: Sequence[Tensor], folder: Path) -> None:
        self._modules = modules
        self._kept = {id(tensor) for tensor in kept}
        self._folder = folder
        self._homes: dict[int, torch.device] = {}

    @property
    def are_away(self) -> bool:
        """Whether the layers cannot run now."""
        return bool(self._homes)

    @property
    def bytes(self) -> int:
        """What leaves the device."""
        return sum(tensor.nbytes for tensor in self._tensors())

    def leave(self) -> None:
        """Move all of them away."""
        for tensor in self._tensors():
            if id(tensor) in self._homes:
                continue
            self._homes[id(tensor)] = tensor.device
            if tensor.device.type == "cpu":
                tensor.data = _mapped(tensor.data, self._folder)
                continue
            tensor.data = tensor.data.to("cpu")
            move_scales(tensor, torch.device("cpu"))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def come_back(self) -> None:
        """Move all of them home."""
        for tensor in self._tensors():
            home = self._homes.pop(id(tensor), None)
            if home is None:
                continue
            tensor.data = tensor.data.to(home, copy=True)
            if home.type != "cpu":
                move_scales(tensor, home)

    def _tensors(self) -> Iterator[Tensor]:
        seen = set(self._kept)
        for module in self._modules:
            for tensor in [*module._parameters.values(), *module._buffers.values()]:
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield tensor


def _mapped(tensor: Tensor, folder: Path) -> Tensor:
    """The same numbers in a file without a name, mapped."""
    if not tensor.numel():
        return tensor
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        mapped = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        mapped.copy_(tensor.reshape(-1))
    return mapped.view(tensor.shape)
