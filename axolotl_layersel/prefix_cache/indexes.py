"""The index beside each file of states, and what is wrong with a file by its index."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import xxhash

SCHEMA = 1
ABOUT_FILE, LOCK_FILE = "about.json", ".lock"
_CHUNK = 8 << 20


def find_fault(folder: Path, name: str, *, fingerprint: str) -> str | None:
    """What is wrong with the file of states `name` or its index, or None; reads every byte."""
    path, index_path = (folder / f"{name}{suffix}" for suffix in (".safetensors", ".json"))
    for one in (index_path, path):
        try:
            mode = os.lstat(one).st_mode
        except FileNotFoundError:
            return f"{one.name} is missing"
        if not stat.S_ISREG(mode):
            return f"{one.name} is no plain file"
    index = read_index(index_path)
    if index is None:
        return "its index cannot be read"
    if index["schema"] != SCHEMA or index["fingerprint"] != fingerprint:
        return "it was made for something else"
    if path.stat().st_size != index["bytes"]:
        return f"it has {path.stat().st_size} bytes, its index says {index['bytes']}"
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return None if digest.hexdigest() == index["checksum"] else "its checksum is wrong"


def read_index(path: Path) -> dict[str, Any] | None:
    """The index of a file, or None if it is not one."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    kinds = {"schema": int, "fingerprint": str, "samples": int, "tokens": int, "bytes": int, "checksum": str}
    if not isinstance(index, dict) or any(not isinstance(index.get(name), kind) for name, kind in kinds.items()):
        return None
    return index


def disk_free(folder: Path) -> int:
    """Bytes that are free where the folder is, or would be made."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def write_whole(path: Path, content: bytes) -> None:
    """Under its name only when all of it is on the disk."""
    temporary = path.with_name(f"{path.name}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
