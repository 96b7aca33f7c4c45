"""States on the disk: what was written comes back, and what was not written whole, or was changed, never does."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import file_stores
import pytest
import torch
from file_stores import PRINT, STATES, filled, opened, read, store

from axolotl_layersel.prefix_cache.folders import clear_cache, list_caches
from axolotl_layersel.prefix_cache.samples import Segment
from axolotl_layersel.prefix_cache.state_store import MemoryStore, PrefixCacheError, StateStore, assemble


def test_a_later_run_reads_what_was_written(tmp_path: Path) -> None:
    filled(tmp_path)
    assert len(list((tmp_path / PRINT).glob("*.safetensors"))) > 1
    again = opened(tmp_path)
    assert all(torch.equal(read(again, key), states) for key, states in STATES.items())
    assert bytes(16) not in again


def test_states_are_mapped_not_read(tmp_path: Path) -> None:
    filled(tmp_path)
    again = opened(tmp_path)
    states, _ = again.find(next(iter(STATES)))
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    inside = [
        line
        for line in maps.splitlines()
        if int(line.split("-")[0], 16) <= states.data_ptr() < int(line.split("-")[1].split()[0], 16)
    ]
    assert len(inside) == 1 and inside[0].endswith(".safetensors")


def test_files_are_for_the_user_alone(tmp_path: Path) -> None:
    filled(tmp_path)
    folder = tmp_path / PRINT
    assert folder.stat().st_mode & 0o077 == 0
    assert all(path.stat().st_mode & 0o077 == 0 for path in folder.iterdir() if path.suffix != ".lock")


def first(folder: Path, suffix: str) -> Path:
    return sorted((folder / PRINT).glob(f"*{suffix}"))[0]


def truncate(folder: Path) -> None:
    path = first(folder, ".safetensors")
    path.write_bytes(path.read_bytes()[:-3])


def flip_a_bit(folder: Path) -> None:
    path = first(folder, ".safetensors")
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def forget_the_index(folder: Path) -> None:
    first(folder, ".json").unlink()


def forget_the_states(folder: Path) -> None:
    first(folder, ".safetensors").unlink()


def break_the_index(folder: Path) -> None:
    first(folder, ".json").write_text("{", encoding="utf-8")


def lie_in_the_index(folder: Path) -> None:
    path = first(folder, ".json")
    index = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**index, "bytes": "../../../etc/passwd"}), encoding="utf-8")


def another_fingerprint(folder: Path) -> None:
    path = first(folder, ".json")
    index = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**index, "fingerprint": "1" * 32}), encoding="utf-8")


def link_elsewhere(folder: Path) -> None:
    path = first(folder, ".safetensors")
    outside = folder / "outside"
    path.rename(outside)
    path.symlink_to(outside)


def swap_two_files(folder: Path) -> None:
    one, other, *_ = sorted((folder / PRINT).glob("*.safetensors"))
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def foreign_file(folder: Path) -> None:
    """A whole file with a right checksum, of another width."""
    wide = store(folder, width=9)
    wide.add(bytes([99] * 16), torch.zeros(3, 9))
    wide.flush()


FAULTS = [
    *(truncate, flip_a_bit, forget_the_index, forget_the_states, break_the_index, lie_in_the_index),
    *(another_fingerprint, link_elsewhere, swap_two_files, foreign_file),
]


@pytest.mark.parametrize("damage", FAULTS, ids=lambda f: f.__name__)
def test_what_is_wrong_is_found_removed_and_computed_again(damage: Callable[[Path], None], tmp_path: Path) -> None:
    filled(tmp_path)
    damage(tmp_path)
    again = opened(tmp_path)
    missing = [key for key in STATES if key not in again]
    assert bytes([99] * 16) not in again
    assert (not missing) == (damage is foreign_file)
    assert all(torch.equal(read(again, key), STATES[key]) for key in STATES if key not in missing)
    for key in missing:
        again.add(key, STATES[key])
    again.flush()
    last = opened(tmp_path)
    assert all(torch.equal(read(last, key), states) for key, states in STATES.items())


def test_a_full_disk_is_an_error_and_leaves_what_was_whole(tmp_path: Path) -> None:
    """A file size limit stands in for the disk: writing ends in the middle of a file."""
    code = """
import resource, signal, sys
from pathlib import Path
sys.path.append(sys.argv[2])
from file_stores import filled
from axolotl_layersel.prefix_cache.state_store import PrefixCacheError
made = filled(Path(sys.argv[1]))
import torch
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    made.add(bytes([50] * 16), torch.zeros(200, 8))
except PrefixCacheError as error:
    print(error)
"""
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(Path(file_stores.__file__).parent)],
        check=True,
        capture_output=True,
        text=True,
    )
    assert "cannot be written" in ran.stdout and "free some space" in ran.stdout
    again = opened(tmp_path)
    assert bytes([50] * 16) not in again and all(key in again for key in STATES)
    assert not list((tmp_path / PRINT).glob("*.tmp"))


def test_two_runs_do_not_fill_at_once(tmp_path: Path) -> None:
    waiting = filled(tmp_path)
    code = (
        "import sys, time; from filelock import FileLock\n"
        "with FileLock(sys.argv[1]):\n print('held', flush=True); time.sleep(3)"
    )
    command = [sys.executable, "-c", code, str(waiting.folder / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        started = time.monotonic()
        with waiting.locked():
            assert time.monotonic() - started > 1.5, "it did not wait"


def test_whoever_reads_goes_on_while_files_are_added_and_removed(tmp_path: Path) -> None:
    reader = filled(tmp_path)
    other = opened(tmp_path)
    other.add(bytes([77] * 16), torch.ones(4, 8))
    other.flush()
    reader.load()
    assert bytes([77] * 16) in reader
    clear_cache(list_caches(tmp_path)[0])
    assert all(torch.equal(read(reader, key), states) for key, states in STATES.items())


def test_clear_removes_our_files_alone(tmp_path: Path) -> None:
    made = filled(tmp_path)
    made.describe({"base_model": "m", "cut": 2})
    (tmp_path / "notes").mkdir()
    (tmp_path / PRINT / "mine.txt").write_text("keep", encoding="utf-8")
    (tmp_path / ("a" * 32)).symlink_to(tmp_path / "notes")
    (found,) = list_caches(tmp_path)
    assert (found.samples, found.tokens, found.about["cut"]) == (11, 66, 2)
    clear_cache(found)
    assert [path.name for path in (tmp_path / PRINT).iterdir()] == ["mine.txt"]
    assert (tmp_path / "notes").is_dir()


def test_clear_leaves_a_cache_that_is_being_filled(tmp_path: Path) -> None:
    made = filled(tmp_path)
    code = (
        "import sys; from filelock import FileLock\n"
        "lock = FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(made.folder / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(PrefixCacheError, match="a run fills"):
            clear_cache(list_caches(tmp_path)[0])
        other.communicate("\n")
    assert len(opened(tmp_path)) == len(STATES)


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_eight_bits_keep_a_number_within_half_a_step_of_its_scale(kind: str, tmp_path: Path) -> None:
    eight: StateStore = (
        store(tmp_path, stored_as="int8")
        if kind == "files"
        else MemoryStore(width=8, dtype=torch.float32, stored_as="int8")
    )
    for key, states in STATES.items():
        eight.add(key, states * 10.0 ** (len(states) - 6))
    eight.flush()
    for key, states in STATES.items():
        scaled = states * 10.0 ** (len(states) - 6)
        step = scaled.abs().amax(dim=-1, keepdim=True) / 127
        assert ((read(eight, key) - scaled).abs() <= 0.501 * step).all()
    assert eight.bytes_per_token == 12 < MemoryStore(width=8, dtype=torch.float32).bytes_per_token == 32


@pytest.mark.parametrize("width", [8, 64, 70, 200])
def test_a_huge_entry_costs_its_own_group_alone(width: int) -> None:
    """Real models hold a few entries a thousand times the others; with one scale for a token these would be lost."""
    eight = MemoryStore(width=width, dtype=torch.float32, stored_as="int8")
    states = torch.randn(5, width, generator=torch.Generator().manual_seed(0))
    states[:, 3] *= 1000
    eight.add(bytes(16), states)
    found = torch.empty_like(states)
    eight.copy_into(bytes(16), found)
    assert ((found - states).norm(dim=-1) <= eight.storage_error * states.norm(dim=-1)).all()
    rest, off = states[:, 64:], (found - states)[:, 64:]
    assert (off.abs() <= 0.501 / 127 * rest.abs().amax(dim=-1, keepdim=True)).all() if width > 64 else not off.numel()
    codes, scales = eight.find(bytes(16))
    assert scales is not None and (codes.nbytes + scales.nbytes) == 5 * eight.bytes_per_token


def test_a_batch_is_put_together_as_it_lies() -> None:
    memory = MemoryStore(width=8, dtype=torch.float32)
    for key, states in STATES.items():
        memory.add(key, states)
    two, three = bytes([2] * 16), bytes([3] * 16)
    segments = [Segment(0, 1, 3, two), Segment(1, 0, 2, two), Segment(1, 2, 5, three)]
    batch = assemble(memory, segments, rows=2, length=6)
    assert batch is not None and batch.shape == (2, 6, 8)
    assert torch.equal(batch[0, 1:3], STATES[two]) and torch.equal(batch[1, 2:5], STATES[three])
    assert not batch[0, 0].any() and not batch[0, 3:].any() and not batch[1, 5].any()
    unknown = Segment(0, 3, 6, bytes(16))
    assert assemble(memory, [*segments, unknown], rows=2, length=6) is None
    padding = Segment(0, 3, 6, bytes(16), only_padding=True)
    assert assemble(memory, [*segments, padding], rows=2, length=6) is not None
