"""A batch on its way through the layers of a model, and where it waits between two of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from axolotl_layersel.model.decoder_stack import first_tensor

STATE = object()  # stands for the hidden state among a layer's arguments


class Rows(Protocol):
    """A batch of rows; its tensors are int64 and right-padded."""

    @property
    def input_ids(self) -> Tensor:
        """(B, T)."""

    @property
    def attention_mask(self) -> Tensor | None:
        """(B, T), 1 for real positions; None where all are."""

    def halves(self) -> list[Any]:
        """The batch in two, or alone where it is one row."""


class Reader(Protocol):
    """What is wanted of one batch. Its tensors wait where the states wait."""

    def read(self, state: int, hidden_BTD: Tensor) -> None:
        """Take latent state 0..L; they come in order."""

    def to(self, device: torch.device) -> None:
        """Move what is kept."""

    @property
    def nbytes(self) -> int:
        """Of what is kept."""


B = TypeVar("B", bound=Rows)
R = TypeVar("R", bound=Reader)


@dataclass
class Passing(Generic[B, R]):
    """A batch between two layers."""

    batch: B
    reader: R
    state_BTD: Tensor
    calls: list[Any]  # arguments and keyword arguments of each layer, as the model gives them
    home: torch.device  # where it waits
    room: Tensor | None = None  # for the state, where it waits in main memory

    @property
    def nbytes(self) -> int:
        """Of all that waits."""
        tensors = {id(self.state_BTD): self.state_BTD}
        _map_tensors(self.calls, lambda tensor: tensors.setdefault(id(tensor), tensor))
        return sum(tensor.nbytes for tensor in tensors.values()) + self.reader.nbytes

    def wait_in(self, home: torch.device) -> None:
        """Wait there from now on."""
        if home == self.home:
            return
        self.home, moved = home, dict[int, Tensor]()
        self.calls = _map_tensors(self.calls, lambda tensor: _moved(tensor, home, moved))
        self.reader.to(home)
        self._keep(self.state_BTD)

    def through(self, index: int, layer: nn.Module, device: torch.device) -> None:
        """Pass a layer whose weights are here."""
        here = next((p.device for p in layer.parameters()), device)
        moved: dict[int, Tensor] = {}
        args, kwargs = _map_tensors(self.calls[index], lambda tensor: _moved(tensor, here, moved))
        given = self.state_BTD.to(here, non_blocking=True)
        args = tuple(given if value is STATE else value for value in args)
        kwargs = {name: given if value is STATE else value for name, value in kwargs.items()}
        state_BTD = first_tensor(layer(*args, **kwargs))
        self.reader.to(device)
        self.reader.read(index + 1, state_BTD)
        self.reader.to(self.home)
        self.calls[index] = None
        self._keep(state_BTD)

    def _keep(self, state_BTD: Tensor) -> None:
        if self.home.type != "cpu" or state_BTD.device.type == "cpu":
            self.state_BTD = state_BTD
            return
        if self.room is None or self.room.shape != state_BTD.shape or self.room.dtype != state_BTD.dtype:
            self.room = torch.empty(state_BTD.shape, dtype=state_BTD.dtype, pin_memory=True)
        self.state_BTD = self.room.copy_(state_BTD, non_blocking=True)


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same tuples, lists and mappings with other tensors; what else is in them stays."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(_map_tensors(item, change) for item in value)
    if type(value) is dict:
        return {name: _map_tensors(item, change) for name, item in value.items()}
    return value


def _moved(tensor: Tensor, device: torch.device, moved: dict[int, Tensor]) -> Tensor:
    """The tensor on a device; one that many layers are given is moved once."""
    if id(tensor) not in moved:
        moved[id(tensor)] = tensor.to(device, non_blocking=device.type != "cpu")
    return moved[id(tensor)]
