"""Look at the caches in a folder, and remove them: nothing is loaded, and nothing outside of them is touched."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from axolotl_layersel.prefix_cache.indexes import ABOUT_FILE, LOCK_FILE, read_index
from axolotl_layersel.prefix_cache.state_store import PrefixCacheError

_OURS = re.compile(r"[0-9a-f]{32}\.(safetensors|json)(\.tmp)?|about\.json(\.tmp)?|\.lock")


@dataclass(frozen=True)
class CacheFolder:
    """One cache: of one model, cut and precision."""

    path: Path
    about: dict[str, Any]  # what its fingerprint was made of; empty if nobody wrote it
    samples: int
    tokens: int
    bytes: int

    def as_json(self) -> dict[str, Any]:
        """For `--info --json`."""
        told = {
            name: self.about.get(name) for name in ("base_model", "cut", "states", "autocast", "attention", "versions")
        }
        counts = {"samples": self.samples, "tokens": self.tokens, "bytes": self.bytes}
        return {"path": str(self.path), **counts, **told}


def list_caches(folder: Path) -> list[CacheFolder]:
    """The caches in `folder`, by name; what their indexes say, unchecked."""
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.is_symlink() or not path.is_dir() or not re.fullmatch(r"[0-9a-f]{32}", path.name):
            continue
        try:
            about = json.loads((path / ABOUT_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            about = {}
        indexes = [read_index(p) for p in sorted(path.glob("*.json")) if p.name != ABOUT_FILE]
        whole = [index for index in indexes if index is not None]
        samples, tokens, size = (sum(index[name] for index in whole) for name in ("samples", "tokens", "bytes"))
        found.append(CacheFolder(path, about if isinstance(about, dict) else {}, samples, tokens, size))
    return found


def clear_cache(cache: CacheFolder) -> None:
    """Remove a cache's own files, and its folder if nothing else is in it.

    Raises:
        PrefixCacheError: a run is filling it.
    """
    lock = FileLock(cache.path / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise PrefixCacheError(f"a run fills {str(cache.path)!r} now: wait until it trains, or end it") from error
    try:
        for path in list(cache.path.iterdir()):
            if _OURS.fullmatch(path.name) and path.name != LOCK_FILE:
                path.unlink()
    finally:
        lock.release()
    (cache.path / LOCK_FILE).unlink(missing_ok=True)
    if not any(cache.path.iterdir()):
        cache.path.rmdir()
