"""One run to an output folder: two at once would mix their checkpoints, and a plan with layers that it did not choose.

The claim is a lock on the folder itself. It leaves no file, and the system gives it up when the process ends, however
it ends. Called by `plugin.py` on the main process.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path

_ROOM = 1 << 20  # bytes, more than plan, recipe and report take

_held: dict[tuple[int, int], int] = {}  # (device, inode) of a folder -> descriptor, for the life of this process


class ClaimError(RuntimeError):
    """Another process trains or scores into the folder."""


def claim_folder(folder: Path) -> str | None:
    """Claim a folder for this process until it ends or releases it; repeating the call is harmless.

    Args:
        folder: created if it does not exist.

    Returns:
        None, or why the file system cannot lock it, so that a second run would go unnoticed.

    Raises:
        ClaimError: another process holds it.
        OSError: the folder cannot be created or opened.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    status = os.fstat(descriptor)
    key = (status.st_dev, status.st_ino)
    if key in _held:
        os.close(descriptor)
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise ClaimError(
            f"another process trains or scores into {str(folder)!r}: wait until it ends, or give this run an "
            "output_dir of its own"
        ) from error
    except OSError as error:  # network file systems without locks
        os.close(descriptor)
        return f"{str(folder)!r} cannot be locked ({error.strerror}), so a second run into it would not be noticed"
    _held[key] = descriptor
    return None


def check_writable(folder: Path) -> None:
    """Write and remove a file of the size that a run's plan and report take; a folder made for it goes too.

    Raises:
        OSError: the disk is full, the folder is read-only, or a file stands in its place.
    """
    existed = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_ROOM))
            file.flush()
            os.fsync(file.fileno())
    finally:
        if not existed:
            folder.rmdir()


def release_folders() -> None:
    """Give up all claims of this process."""
    while _held:
        os.close(_held.popitem()[1])
