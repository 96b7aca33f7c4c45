"""States on the disk: files that hold some samples each, and beside each an index, written last.

    <folder>/<fingerprint>/about.json              what the fingerprint was made of, for people and for `--info`
                           <name>.safetensors      states, keys, lengths of some samples
                           <name>.json             fingerprint, size and checksum of that file
                           .lock                   held while a run checks and fills the folder

A file counts when its index is there and right; anything else is removed by the next run that holds the lock, and its
samples are computed again. Files are never changed once they have their name, so a run may read while others add.
Nothing in a file or an index is a path, and nothing is executed: safetensors and JSON are data.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from axolotl_layersel.log import LOG
from axolotl_layersel.prefix_cache.indexes import (
    ABOUT_FILE,
    LOCK_FILE,
    SCHEMA,
    disk_free,
    find_fault,
    write_whole,
)
from axolotl_layersel.prefix_cache.samples import KEY_BYTES, Key
from axolotl_layersel.prefix_cache.state_store import GROUP, PrefixCacheError, StateStore, StoredAs

FILE_BYTES = 256 << 20  # a file is written when it has this many bytes of states,
FILE_SECONDS = 60.0  # or when the last one is this old: what a kill may cost


class FileStore(StateStore):
    """States in the files of one folder, memory-mapped.

    Args:
        folder: of one fingerprint; made if it does not exist, for the user alone.
        fingerprint: which every index must repeat.
        width: D.
        dtype: in which states are read.
        stored_as: in the files.
        file_bytes: states in a file, about.
    """

    def __init__(
        self,
        folder: Path,
        *,
        fingerprint: str,
        width: int,
        dtype: torch.dtype,
        stored_as: StoredAs = "model",
        file_bytes: int = FILE_BYTES,
    ) -> None:
        super().__init__(width=width, dtype=dtype, stored_as=stored_as)
        self.folder = folder
        self.fingerprint = fingerprint
        self._file_bytes = file_bytes
        self._open: set[str] = set()  # names of files that are mapped
        self._places: dict[Key, tuple[Tensor, Tensor | None, int, int]] = {}  # states, scales, first token, tokens
        self._waiting: dict[Key, tuple[Tensor, Tensor | None]] = {}
        self._waiting_bytes = 0
        self._written = time.monotonic()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def describe(self, about: dict[str, Any]) -> None:
        """Write what the fingerprint was made of, once."""
        if not (self.folder / ABOUT_FILE).exists():
            write_whole(self.folder / ABOUT_FILE, (json.dumps(about, indent=2) + "\n").encode())

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Alone among all runs that fill this folder; waits for the one that does, and says so."""
        lock = FileLock(self.folder / LOCK_FILE, mode=0o600)
        try:
            lock.acquire(timeout=1)
        except Timeout:
            LOG.info("layersel: another run fills the prefix cache %s; waiting for it", self.folder)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def load(self, *, clean: bool = False) -> None:
        """Map the files that are new here.

        Args:
            clean: check every byte, and remove what is not right; only for a process that holds the lock.
        """
        names = [path.stem for path in sorted(self.folder.glob("*.json")) if path.name != ABOUT_FILE]
        new = [name for name in names if name not in self._open]
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            faults = list(pool.map(self._fault_of, new)) if clean else [None] * len(new)
        for name, fault in zip(new, faults, strict=True):
            fault = fault or self._map(name)
            if fault is not None and not clean:
                raise PrefixCacheError(f"{self._path(name)}: {fault}")
            if fault is not None:
                LOG.warning("layersel: prefix cache: %s is removed and its samples are computed again: %s", name, fault)
                self._remove(name)
        if clean:
            for path in self.folder.glob("*.safetensors"):
                if path.stem not in self._open:  # a run was killed between the two
                    self._remove(path.stem)
            for path in self.folder.glob("*.tmp"):
                path.unlink(missing_ok=True)

    def __contains__(self, key: Key) -> bool:
        return key in self._places or key in self._waiting

    def __len__(self) -> int:
        return len(self._places) + len(self._waiting)

    def add(self, key: Key, states_nD: Tensor) -> None:
        """Keep a copy, and write a file when enough came together or the last one is old."""
        states, scales = self.encode(states_nD)
        self._waiting[key] = (states.clone(), scales)
        self._waiting_bytes += states.nbytes
        if self._waiting_bytes >= self._file_bytes or time.monotonic() - self._written > FILE_SECONDS:
            self.flush()

    def find(self, key: Key) -> tuple[Tensor, Tensor | None]:
        """Views of the mapped file."""
        if key in self._waiting:
            return self._waiting[key]
        states, scales, start, tokens = self._places[key]
        return states[start : start + tokens], None if scales is None else scales[start : start + tokens]

    def bytes_left(self) -> int:
        """Of the folder's disk."""
        return disk_free(self.folder)

    def flush(self) -> None:
        """Write what waits, the index last, and map it.

        Raises:
            PrefixCacheError: the disk is full, or the folder cannot be written; nothing half-written is left.
        """
        if not self._waiting:
            return
        parts = list(self._waiting.values())
        tensors = {
            "states": torch.cat([states for states, _ in parts]),
            "keys": torch.tensor([list(key) for key in self._waiting], dtype=torch.uint8),
            "lengths": torch.tensor([len(states) for states, _ in parts], dtype=torch.int64),
        }
        if self.stored_as == "int8":
            tensors["scales"] = torch.cat([scales for _, scales in parts if scales is not None])
        content = save(tensors)
        index = {
            "schema": SCHEMA,
            "fingerprint": self.fingerprint,
            "samples": len(parts),
            "tokens": len(tensors["states"]),
            "bytes": len(content),
            "checksum": xxhash.xxh3_128_hexdigest(content),
        }
        name = uuid.uuid4().hex
        try:
            write_whole(self._path(name), content)
            write_whole(self._path(name, ".json"), (json.dumps(index) + "\n").encode())
        except OSError as error:
            self._remove(name)
            raise PrefixCacheError(
                f"the prefix cache {str(self.folder)!r} cannot be written: {error}. What was written before is whole "
                "and will be used; free some space and start again, name another place with `prefix_cache_dir`, or "
                "train with `prefix_cache: off`"
            ) from error
        del content, tensors, parts
        if (fault := self._map(name)) is not None:
            raise PrefixCacheError(f"{self._path(name)} was just written, and now {fault}")
        self._waiting, self._waiting_bytes, self._written = {}, 0, time.monotonic()

    def _path(self, name: str, suffix: str = ".safetensors") -> Path:
        return self.folder / f"{name}{suffix}"

    def _remove(self, name: str) -> None:
        for suffix in (".json", ".safetensors"):
            self._path(name, suffix).unlink(missing_ok=True)

    def _fault_of(self, name: str) -> str | None:
        return find_fault(self.folder, name, fingerprint=self.fingerprint)

    def _map(self, name: str) -> str | None:
        """Map a file and enter its samples; what is wrong with its content, or None."""
        try:
            file: Any = safe_open(str(self._path(name)), framework="pt", device="cpu")
            names = set(file.keys())
            tensors = {n: file.get_tensor(n) for n in names & {"states", "scales", "keys", "lengths"}}
        except (OSError, SafetensorError) as error:
            return f"it is no safetensors file: {error}"
        wanted = {"states", "keys", "lengths"} | ({"scales"} if self.stored_as == "int8" else set())
        if names != wanted:
            return f"it holds {sorted(names)}, not {sorted(wanted)}"
        states, keys, lengths = tensors["states"], tensors["keys"], tensors["lengths"]
        dtype = torch.int8 if self.stored_as == "int8" else self.dtype
        if states.dtype != dtype or states.dim() != 2 or states.shape[1] != self.width:
            return f"its states are {tuple(states.shape)} in {states.dtype}, not (tokens, {self.width}) in {dtype}"
        if keys.shape != (len(lengths), KEY_BYTES) or int(lengths.sum()) != len(states) or bool((lengths < 1).any()):
            return "its lengths and its states do not belong together"
        scales = tensors.get("scales")
        if scales is not None and scales.shape != (len(states), -(-self.width // GROUP)):
            return "its scales and its states do not belong together"
        start = 0
        for key, length in zip(keys.numpy(), lengths.tolist(), strict=True):
            self._places[key.tobytes()] = (states, scales, start, length)
            start += length
        self._open.add(name)
        return None
