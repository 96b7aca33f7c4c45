"""Small stores of states on the disk, in several files."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from axolotl_layersel.prefix_cache.samples import Key
from axolotl_layersel.prefix_cache.state_files import FileStore
from axolotl_layersel.prefix_cache.state_store import StateStore, StoredAs

PRINT = "0" * 32
STATES: dict[Key, Tensor] = {
    bytes([n] * 16): torch.randn(n, 8, generator=torch.Generator().manual_seed(n)) for n in range(1, 12)
}


def store(folder: Path, *, fingerprint: str = PRINT, stored_as: StoredAs = "model", width: int = 8) -> FileStore:
    return FileStore(
        folder / fingerprint,
        fingerprint=fingerprint,
        width=width,
        dtype=torch.float32,
        stored_as=stored_as,
        file_bytes=400,  # several files
    )


def filled(folder: Path) -> FileStore:
    made = store(folder)
    for key, states in STATES.items():
        made.add(key, states)
    made.flush()
    return made


def opened(folder: Path) -> FileStore:
    other = store(folder)
    with other.locked():
        other.load(clean=True)
    return other


def read(source: StateStore, key: Key) -> Tensor:
    out = torch.empty(len(STATES[key]), 8)
    source.copy_into(key, out)
    return out
