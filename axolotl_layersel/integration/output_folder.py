"""One run to an output folder: two at once would mix their checkpoints, and a plan with layers that it did not choose.

The claim is a lock on a file beside the plan. The system releases it when the process ends, however it ends, and an
empty file that a killed process leaves behind means nothing. Called by `plugin.py` on the main process.
"""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from filelock import FileLock, Timeout

from axolotl_layersel.log import LOG
from axolotl_layersel.plan import PLAN_FILE, PlanError

LOCK_FILE = ".lock"
_ROOM = 1 << 20  # bytes, more than plan, recipe and report take

_held: dict[Path, FileLock] = {}  # by the folder's real path, for the life of this process


class ClaimError(RuntimeError):
    """Another process trains or scores into the folder."""


def claim_folder(folder: Path) -> None:
    """Claim a folder for this process until it ends or releases it; repeating the call is harmless.

    Args:
        folder: of the plan, in the run's output folder; created if it does not exist.

    Raises:
        ClaimError: another process holds it.
        PlanError: nothing can be written there, which is better known before anything is scored.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.resolve() / LOCK_FILE, blocking=False)
        if folder.resolve() in _held:
            return
        if shutil.disk_usage(folder).free < _ROOM:
            raise OSError(f"less than {_ROOM} bytes are free")
        lock.acquire()
    except Timeout as error:
        raise ClaimError(
            f"another process trains or scores into {str(folder.parent)!r}: wait until it ends, or give this run an "
            "output_dir of its own"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
            raise PlanError(
                f"the plan cannot be written to {str(folder / PLAN_FILE)!r}: {error}. Nothing was scored or trained; "
                "free some space, or choose another output_dir"
            ) from error
        LOG.warning("%s cannot be locked (%s), so a second run into it would not be noticed", folder, error.strerror)
    _held[folder.resolve()] = lock


def release_folders() -> None:
    """Give up all claims of this process, and remove their files."""
    while _held:
        folder, lock = _held.popitem()
        (folder / LOCK_FILE).unlink(missing_ok=True)
        lock.release()
