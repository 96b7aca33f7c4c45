"""What may go wrong around a run, each with real processes: killed, interrupted, no room, no memory, two at once."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import psutil
import pytest
from axolotl_runs import (
    UNINTERRUPTED,
    Finished,
    environment,
    logged_losses,
    make_dataset,
    make_model,
    make_tokenizer,
    on_several,
    plan_of,
    start,
    train,
    train_command,
    write_config,
)
from plans import scored_plan

from axolotl_layersel.integration.output_folder import LOCK_FILE, ClaimError, claim_folder, release_folders
from axolotl_layersel.plan import Plan, PlanError, read_plan, write_text

pytestmark = pytest.mark.slow

HERE = Path(__file__).parents[1] / "helpers"


# ---- one run that is hit again and again, in a folder with an awkward name -----------------------------------------


@pytest.fixture(scope="module")
def battered(tmp_path_factory: pytest.TempPathFactory, run_inputs: dict[str, Path]) -> dict[str, Any]:
    """Interrupted while it scores, killed while it scores, killed while it trains, resumed: all into one folder.

    Spaces, umlauts and Japanese in its path, the model behind a symbolic link, and the C locale. The two that end while
    they score have over a thousand rows to score, so that there is time to hit them.
    """
    folder = tmp_path_factory.mktemp("battered") / "Läufe, 実験 1"
    folder.mkdir()
    out = folder / "out"
    (folder / "the model").symlink_to(run_inputs["model"])
    inputs = {"model": folder / "the model", "data": run_inputs["data"]}
    slow = {
        "layersel": {"num_samples": 1500, "report": False},
        "data": make_dataset(folder / "many rows", rows=1500),
        "micro_batch_size": 1,
    }
    env = {"LC_ALL": "C", "LANG": "C"}
    seen: dict[str, Any] = {"out": out}
    slow_config = write_config(folder, **{**inputs, **slow}, name="slow.yml")
    for name, number in (("interrupted", signal.SIGINT), ("killed", signal.SIGKILL)):
        hit = start(train_command(slow_config), folder / f"{name}.log", env=env)
        hit.wait_for("layersel: scoring ")
        hit.signal(number)
        seen[name] = hit.finish(timeout=90)
        seen[f"left by {name}"] = sorted(path.name for path in (out / "layersel").glob("*"))
    options = {**UNINTERRUPTED, "auto_resume_from_checkpoints": True}
    config = write_config(folder, **inputs, **options)
    trained = start(train_command(config), folder / "first.log", env=env)
    trained.wait_for("checkpoint-4")
    with pytest.raises(ClaimError) as refused:
        claim_folder(out / "layersel")
    seen["second run"] = str(refused.value)
    trained.wait_for("5/8")
    trained.signal(signal.SIGKILL)
    trained.finish()
    seen["plan of the killed run"] = plan_of(out)
    seen["checkpoints of the killed run"] = sorted(p.name for p in out.glob("checkpoint-*"))
    seen["resumed"] = start(train_command(config), folder / "resumed.log", env=env).finish().check()
    return seen


def _without(plan: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in plan.items() if name not in names}


def test_an_interrupted_scoring_ends_at_once_and_leaves_nothing(battered: dict[str, Any]) -> None:
    assert "KeyboardInterrupt" in battered["interrupted"].log
    assert battered["interrupted"].returncode != 0
    assert set(battered["left by interrupted"]) <= {LOCK_FILE}  # newer versions of filelock remove it


def test_a_killed_scoring_leaves_nothing_that_could_be_read(battered: dict[str, Any]) -> None:
    assert set(battered["left by killed"]) <= {LOCK_FILE}


def test_after_all_this_the_plan_is_that_of_an_undisturbed_run(battered: dict[str, Any], uninterrupted: Path) -> None:
    ours, theirs = battered["plan of the killed run"], plan_of(uninterrupted)
    assert _without(ours, "base_model", "seconds") == _without(theirs, "base_model", "seconds")


def test_a_killed_training_resumes_with_its_plan_and_its_losses(battered: dict[str, Any], uninterrupted: Path) -> None:
    """Killed after the checkpoint of step 4; the eight losses are those of a run that nothing disturbed."""
    assert "checkpoint-4" in battered["checkpoints of the killed run"]
    assert "checkpoint-8" not in battered["checkpoints of the killed run"]
    assert "the plan of the checkpoint is used, nothing is scored" in battered["resumed"].log
    assert len(battered["resumed"].losses) < 8
    assert plan_of(battered["out"]) == battered["plan of the killed run"]
    assert logged_losses(battered["out"]) == logged_losses(uninterrupted)
    assert len(logged_losses(uninterrupted)) == 8


def test_a_second_run_into_the_folder_is_refused(battered: dict[str, Any]) -> None:
    assert "another process trains or scores into" in battered["second run"]
    assert "output_dir of its own" in battered["second run"]


# ---- several processes that are hit --------------------------------------------------------------------------------


@pytest.mark.parametrize("hit", ["all are interrupted", "one is killed"])
def test_two_processes_that_are_hit_in_scoring_end_together(
    tmp_path: Path, run_inputs: dict[str, Path], hit: str
) -> None:
    """Ctrl-C reaches every process; a kill, as by lack of memory, one. Nobody is left waiting, no file is left."""
    options = on_several({"layersel": {"num_samples": 1500, "report": False}, "micro_batch_size": 1})
    options["data"] = make_dataset(tmp_path / "many rows", rows=1500)
    config = write_config(tmp_path, **{**run_inputs, **options})
    command = train_command(config, launcher="torchrun", processes=2)
    run = start(command, tmp_path / "log", env={"ACCELERATE_USE_CPU": "true"})
    run.wait_for("layersel: scoring ")
    workers = [child for child in psutil.Process(run.process.pid).children() if "axolotl.cli.train" in child.cmdline()]
    assert len(workers) == 2
    if hit == "one is killed":
        workers[1].kill()
    else:
        run.signal(signal.SIGINT)
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert alive == []
    assert run.finish(timeout=120).returncode != 0
    assert {path.name for path in (tmp_path / "out" / "layersel").glob("*")} <= {LOCK_FILE}
    claim_folder(tmp_path / "out" / "layersel")  # nobody holds it
    release_folders()


# ---- a rank that fails ---------------------------------------------------------------------------------------------


def test_a_row_that_gives_nan_stops_all_processes_and_is_named(tmp_path: Path) -> None:
    """One word of one row has a broken embedding; only one of two processes meets it, and neither hangs."""
    tokenizer = make_tokenizer()
    (token,) = tokenizer("^", add_special_tokens=False)["input_ids"]

    def break_embedding(model: Any) -> None:
        model.get_input_embeddings().weight[token] = float("nan")

    model = make_model(tmp_path / "model", change=break_embedding)
    data = make_dataset(tmp_path)
    lines = data.read_text().splitlines()
    lines[5] = lines[5].replace("The sum", "^ sum")
    data.write_text("\n".join(lines))
    options = on_several({"layersel": {"num_samples": 64}})
    run = train(write_config(tmp_path, model=model, data=data, **options), processes=2, timeout=300)
    assert run.returncode != 0
    (folder,) = {path.parent for path in (tmp_path / "prepared").rglob("dataset_info.json")}
    rows = datasets.load_from_disk(str(folder))["input_ids"]
    (index,) = [i for i, ids in enumerate(rows) if token in ids]
    assert re.search(
        rf"ScoringError: training rows give latent states that are not finite: {index} \(\d+ of the", run.log
    )
    assert "'model.embed_tokens.weight' holds NaN or Inf" in run.log
    assert "checkpoint" not in "".join(path.name for path in (tmp_path / "out").iterdir())
    assert not (tmp_path / "out" / "layersel" / "plan.json").exists()


# ---- no room, no memory --------------------------------------------------------------------------------------------


def _limited(limit: str, body: str, folder: Path) -> Finished:
    """Run Python code in a process of its own, under a limit that the system enforces."""
    code = f"import resource, signal, sys\nsys.path.insert(0, {str(HERE)!r})\n{body}"
    command = [sys.executable, "-c", code.replace("LIMIT", limit), str(folder)]
    return start(command, folder / "limited.log", cwd=folder).finish(timeout=120)


def test_a_file_that_does_not_fit_leaves_the_old_plan_whole(tmp_path: Path) -> None:
    """The limit of file size stands in for a full disk: the same write fails, in the same place."""
    write_text(tmp_path / "plan.json", "old\n")
    run = _limited(
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))",
        "from pathlib import Path\nfrom axolotl_layersel.plan import write_text\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "LIMIT\nwrite_text(Path(sys.argv[1]) / 'plan.json', 'new\\n' * 1000)\n",
        tmp_path,
    )
    assert run.returncode == 1
    assert "OSError" in run.log
    assert (tmp_path / "plan.json").read_text() == "old\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["limited.log", "plan.json"]


def test_a_folder_that_cannot_be_written_is_refused_before_scoring(tmp_path: Path) -> None:
    """A file stands where the plan's folder must be; a read-only or full file system fails in the same call."""
    (tmp_path / "layersel").write_text("in the way")
    with pytest.raises(PlanError, match=r"the plan cannot be written to .*Nothing was scored or trained.*output_dir"):
        claim_folder(tmp_path / "layersel")
    release_folders()


def test_real_lack_of_memory_is_answered_with_smaller_batches(tmp_path: Path) -> None:
    """64 rows at once need ten times the memory that the process may still take; torch's CPU allocator refuses."""
    run = _limited(
        "resource.setrlimit(resource.RLIMIT_AS, (now + (96 << 20), now + (96 << 20)))",
        "import logging, torch\n"
        "from tiny import tiny_llama\n"
        "from axolotl_layersel.method.calibration import Row\n"
        "from axolotl_layersel.method.score_layers import score_layers\n"
        "logging.basicConfig(level=logging.WARNING)\n"
        "torch.set_num_threads(1)\n"
        "model = tiny_llama(num_layers=2, intermediate_size=8192)\n"
        "rows = [Row(ids, ids) for ids in (tuple(1 + (i * j) % 60 for j in range(60)) for i in range(1, 65))]\n"
        "whole = score_layers(model, rows[:2], batch_tokens=120)\n"
        "kib = next(line for line in open('/proc/self/status') if line.startswith('VmSize')).split()[1]\n"
        "now = int(kib) << 10\n"
        "LIMIT\n"
        "print('cut', score_layers(model, rows, batch_tokens=10**6).first_trainable)\n",
        tmp_path,
    ).check()
    assert "out of memory: this batch and all after it are halved" in run.log
    assert "cut " in run.log


# ---- plan files ----------------------------------------------------------------------------------------------------


def test_a_plan_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    text = scored_plan(num_layers=6).to_json()
    for length in range(0, len(text) - 2, 7):
        with pytest.raises(PlanError):
            Plan.from_json(text[:length], source="plan.json")


def test_a_reader_never_sees_a_part_of_a_plan_even_if_its_writer_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plans = [scored_plan(num_layers=200, first_trainable=cut) for cut in (10, 20)]
    texts = [plan.to_json() for plan in plans]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    write_text(path, texts[0])
    code = (
        "import json, sys\nfrom pathlib import Path\nfrom axolotl_layersel.plan import write_text\n"
        "folder = Path(sys.argv[1])\ntexts = json.loads((folder / 'texts.json').read_text())\nprint('go', flush=True)\n"
        "while True:\n    for text in texts:\n        write_text(folder / 'plan.json', text)\n"
    )
    for _ in range(3):
        writer = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, env=environment()
        )
        assert writer.stdout is not None
        writer.stdout.readline()
        cuts = {read_plan(path).first_trainable for _ in range(40)}
        writer.kill()
        writer.communicate()
        assert read_plan(path).first_trainable in (10, 20)
        assert cuts <= {10, 20}


# ---- two at once ---------------------------------------------------------------------------------------------------


def test_a_claim_ends_with_its_process_however_it_ends(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from axolotl_layersel.integration.output_folder import claim_folder\n"
        "claim_folder(Path(sys.argv[1]))\nprint('claimed', flush=True)\ntime.sleep(60)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, env=environment())
    assert other.stdout is not None
    other.stdout.readline()
    with pytest.raises(ClaimError, match="another process trains or scores into"):
        claim_folder(tmp_path)
    other.kill()
    other.communicate()
    claim_folder(tmp_path)
    claim_folder(tmp_path)  # again in this process: a second run after a first
    release_folders()
    assert list(tmp_path.iterdir()) == []
