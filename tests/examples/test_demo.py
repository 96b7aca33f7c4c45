"""The demo without its slow part: its data, its tokenizer, its training loop on a toy, and its configs.

`make demo` runs all of it.
"""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "example_configs").glob("demo-*.yml"))


def load_demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", ROOT / "example_configs" / "demo.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


demo = load_demo()


@pytest.fixture(scope="module")
def modules() -> list[Any]:
    found: list[Any] = demo.library_modules()
    return found


@pytest.fixture(scope="module")
def data(modules: list[Any]) -> tuple[list[Any], list[Any]]:
    """Rows for training and held-out rows."""
    rows: tuple[list[Any], list[Any]] = demo.instruction_data(modules)
    return rows


# ---- data ----------------------------------------------------------------------------------------------------------


def test_the_library_gives_thousands_of_rows_and_hundreds_held_out(
    modules: list[Any], data: tuple[list[Any], list[Any]]
) -> None:
    train, held_out = data
    assert len(modules) > 300
    assert len(train) > 2500
    assert len(held_out) > 200


def test_no_signature_no_answer_and_no_module_is_on_both_sides(data: tuple[list[Any], list[Any]]) -> None:
    train, held_out = data
    rows = train + held_out
    assert len({row.instruction for row in rows}) == len(rows)
    assert len({row.output for row in rows}) == len(rows)
    tops = [{row.instruction.partition(".")[0] for row in side} for side in (train, held_out)]
    assert tops[0].isdisjoint(tops[1])


def test_data_depends_on_the_library_alone(data: tuple[list[Any], list[Any]]) -> None:
    assert data == demo.instruction_data(demo.library_modules())


def test_a_row_is_a_signature_and_the_first_paragraph_of_its_docstring() -> None:
    source = '''
def plain(a, *, b=1):
    """Add b to a, where
    b is one.

    More text.
    """
def terse(): "No."
def silent(): pass
class Box:
    """Not a function."""
    async def open(self, timeout: float = 2.0):
        """Open the box or give up."""
if True:
    def inner(*args): """Take what comes."""
'''
    (module,) = [m for m in [demo.Module("pkg.mod", source)] if not m.held_out]
    train, held_out = demo.instruction_data([module])
    assert held_out == []
    assert {(row.instruction, row.input, row.output) for row in train} == {
        ("pkg.mod.plain(a, *, b=1)", "", "Add b to a, where b is one."),
        ("pkg.mod.Box.open(self, timeout: float=2.0)", "", "Open the box or give up."),
        ("pkg.mod.inner(*args)", "", "Take what comes."),
    }


def test_tests_and_bundled_copies_are_left_out(tmp_path: Path) -> None:
    for name in (
        "one.py",
        "pkg/__init__.py",
        "pkg/two.py",
        "test/three.py",
        "site-packages/four.py",
        "config-3/five.py",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("pass\n")
    assert [m.name for m in demo.library_modules(tmp_path)] == ["one", "pkg", "pkg.two"]


def test_rows_are_written_as_alpaca_json_lines(tmp_path: Path) -> None:
    demo.write_rows(tmp_path / "deep" / "rows.jsonl", [demo.Row("f(x)", "", "Näher."), demo.Row("g()", "", "Two.")])
    lines = (tmp_path / "deep" / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"instruction": "f(x)", "input": "", "output": "Näher."},
        {"instruction": "g()", "input": "", "output": "Two."},
    ]


# ---- tokenizer and model -------------------------------------------------------------------------------------------


def test_the_tokenizer_round_trips_any_text_and_survives_saving(modules: list[Any], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    made = demo.train_tokenizer([m.source for m in modules[:20]], vocab_size=512)
    made.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("def f(a, b=1):\n\treturn a", "Größe ≤ 3 🙂", "\r\n  \x00", modules[30].source[:5000]):
        assert made.decode(made(text).input_ids) == text
        assert loaded(text).input_ids == made(text).input_ids
    assert (loaded.eos_token, loaded.pad_token) == ("<|endoftext|>", "<|pad|>")
    assert len({loaded.eos_token_id, loaded.pad_token_id}) == 2


def test_the_bigram_loss_is_the_bigrams_and_not_the_unigrams() -> None:
    """0 1 0 1 ...: a bigram knows the next token, a unigram is one bit off."""
    import torch

    windows_NT = torch.tensor([0, 1] * 33)[:65].unfold(0, 9, 8)
    loss = demo.bigram_loss(windows_NT, windows_NT, vocab_size=2)
    assert loss < 0.1 < math.log(2)


@pytest.fixture
def toy() -> tuple[list[Any], Any]:
    """Each letter follows from the two before it, which a small model learns in seconds and a bigram cannot know."""
    modules = []
    for i in range(40):
        letters = [i % 7, i % 5]
        while len(letters) < 400:
            letters.append((letters[-1] + letters[-2]) % 7)
        modules.append(demo.Module(f"m{i}", "".join("abcdefg"[n] for n in letters)))
    assert 0 < sum(m.held_out for m in modules) < len(modules)
    recipe = demo.Recipe(
        vocab_size=258, hidden_size=32, intermediate_size=64, layers=2, heads=2, window=32, batch=8, steps=150
    )
    return modules, recipe


def test_a_model_is_saved_once_it_beats_the_bigram(toy: tuple[list[Any], Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    modules, recipe = toy
    facts = demo.build_model(modules, tmp_path, recipe)
    assert facts["after"] < min(facts["bigram"], facts["before"])
    assert facts["before"] == pytest.approx(math.log(258), abs=0.2)  # an untrained model guesses
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.num_hidden_layers == 2


def test_a_model_that_has_not_learned_is_refused(toy: tuple[list[Any], Any], tmp_path: Path) -> None:
    modules, recipe = toy
    with pytest.raises(SystemExit, match=r"has not learned: .* a bigram has .* more than 1 steps"):
        demo.build_model(modules, tmp_path, replace(recipe, steps=1))
    assert list(tmp_path.iterdir()) == []


def test_summary_of_a_run_that_did_not_finish_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="holds no checkpoint; train first"):
        demo.summary(tmp_path)


# ---- configs -------------------------------------------------------------------------------------------------------

VALIDATE = """
import json, sys, yaml
from axolotl.utils.config import prepare_plugins, validate_config
from axolotl.utils.dict import DictDefault

valid = {}
for path in sys.argv[1:]:
    written = yaml.safe_load(open(path))
    cfg = DictDefault(written)
    prepare_plugins(cfg)
    cfg = validate_config(cfg)
    valid[path] = {"dropped": sorted(set(written) - set(cfg)), "layersel": cfg.layersel, "adapter": cfg.adapter}
print("valid", json.dumps(valid))
"""


def test_axolotls_own_schema_accepts_every_example_config_and_knows_every_key() -> None:
    assert [path.name for path in CONFIGS] == ["demo-lora.yml", "demo-qlora.yml"]
    command = [sys.executable, "-c", VALIDATE, *map(str, CONFIGS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("valid "))
    valid = json.loads(line.removeprefix("valid "))
    assert [entry["adapter"] for entry in valid.values()] == ["lora", "qlora"]
    for path, entry in valid.items():
        assert entry["dropped"] == [], path
        assert entry["layersel"]["num_samples"] == 128


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_config_opens_with_purpose_prerequisite_command_time_and_output(path: Path) -> None:
    head = path.read_text(encoding="utf-8").split("\n\n")[0]
    for word in ("Purpose:", "Prerequisite:", "Command:", "Time:", "Output:"):
        assert f"# {word} " in head
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert config["plugins"] == ["layersel"]
    assert f"axolotl.cli.train example_configs/{path.name}" in head
    assert config["output_dir"] in head


def test_the_two_configs_differ_in_the_four_bits_and_the_folder_alone() -> None:
    one, other = (yaml.safe_load(path.read_text(encoding="utf-8")) for path in CONFIGS)
    assert {key for key in one | other if one.get(key) != other.get(key)} == {"adapter", "load_in_4bit", "output_dir"}


def test_the_configs_read_what_prepare_writes() -> None:
    work = demo.WORK.relative_to(ROOT).as_posix()
    for path in CONFIGS:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert config["base_model"] == f"{work}/model"
        assert config["datasets"][0]["path"] == f"{work}/train.jsonl"
        assert config["test_datasets"][0]["path"] == f"{work}/eval.jsonl"
        assert config["output_dir"].startswith(f"{work}/")
