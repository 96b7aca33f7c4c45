"""The commands as a shell sees them: results on standard output, one paragraph on standard error, exit status."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from axolotl_runs import BIN, environment, write_config
from click.testing import CliRunner, Result
from plans import scored_plan

from axolotl_layersel.cli import main
from axolotl_layersel.config.options import LayerSelOptions
from axolotl_layersel.plan import Plan, read_plan

COMMANDS = ("score", "show", "compare", "recipe", "cache")


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


@pytest.fixture
def plan_folder(tmp_path: Path) -> Path:
    """A run's output folder with a plan and its recipe."""
    folder = tmp_path / "run" / "layersel"
    folder.mkdir(parents=True)
    plan = scored_plan(num_layers=6, first_trainable=4, config_updates={"peft_layers_to_transform": [4, 5]})
    (folder / "plan.json").write_text(plan.to_json(), encoding="utf-8")
    (folder / "recipe.yml").write_text("", encoding="utf-8")
    return folder.parent


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yml"
    values = {"base_model": "HuggingFaceTB/SmolLM2-135M", "plugins": ["layersel"], "adapter": "lora", "lora_r": 8}
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


# ---- help and usage ------------------------------------------------------------------------------------------------


def test_there_are_five_commands_and_each_helps_with_examples() -> None:
    assert isinstance(main, click.Group)
    assert sorted(main.commands) == sorted(COMMANDS)
    for name in COMMANDS:
        result = run(name, "--help")
        assert result.exit_code == 0
        assert f"layersel {name} " in result.stdout
        assert all(len(line) <= 90 for line in result.stdout.splitlines())


def test_every_option_in_the_help_s_examples_exists() -> None:
    for name, command in main.commands.items():
        assert command.help
        known = {option for parameter in command.params for option in parameter.opts}
        used = {o for line in command.help.splitlines() for o in re.findall(r" (-{1,2}[a-z]+)", line.partition("|")[0])}
        assert used and used - {"-m"} <= known, name


@pytest.mark.parametrize("args", [("show",), ("show", "/no/such/plan"), ("recipe", "."), ("nonsense",)])
def test_wrong_usage_exits_with_2_and_says_so_on_standard_error(args: tuple[str, ...]) -> None:
    result = run(*args)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Usage:" in result.stderr


# ---- show ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["", "layersel", "layersel/plan.json"])
def test_show_finds_the_plan_and_names_the_files_beside_it(plan_folder: Path, part: str) -> None:
    result = run("show", plan_folder / part)
    assert result.exit_code == 0, result.stderr
    assert "first trainable layer 4 of 0 to 5" in result.stdout
    assert f"see also {plan_folder / 'layersel' / 'recipe.yml'}" in result.stdout
    assert not re.search(r"\x1b|[ \t]$", result.stdout, flags=re.M)


def test_show_as_json_is_the_plan_file(plan_folder: Path) -> None:
    result = run("show", plan_folder, "--json")
    assert result.stdout == (plan_folder / "layersel" / "plan.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("text", ["", "{}", "not json", '{"schema_version": 99}'])
def test_a_file_that_is_no_plan_is_one_paragraph_and_exit_status_1(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text, encoding="utf-8")
    result = run("show", path)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith(f"Error: {path} ")
    assert result.stderr.count("\n") == 1


def test_show_and_recipe_import_neither_torch_nor_axolotl(plan_folder: Path, config: Path) -> None:
    code = (
        "import sys; from axolotl_layersel.cli import main\n"
        f"main(['show', {str(plan_folder)!r}], standalone_mode=False)\n"
        f"main(['recipe', {str(plan_folder)!r}, {str(config)!r}], standalone_mode=False)\n"
        "assert not {'torch', 'axolotl', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, stdout=subprocess.DEVNULL)


# ---- recipe --------------------------------------------------------------------------------------------------------


def test_recipe_prints_the_config_with_the_cut(plan_folder: Path, config: Path) -> None:
    result = run("recipe", plan_folder, config)
    assert result.exit_code == 0, result.stderr
    assert yaml.safe_load(result.stdout)["layersel"] == {"first_layer": 4}


def test_recipe_writes_a_plain_config_and_prints_where(plan_folder: Path, config: Path, tmp_path: Path) -> None:
    target = tmp_path / "new" / "stock.yml"
    result = run("recipe", plan_folder, config, "--plain", "-o", target)
    assert result.stdout == f"{target}\n"
    written = yaml.safe_load(target.read_text(encoding="utf-8"))
    assert written["peft_layers_to_transform"] == [4, 5]
    assert "layersel" not in written and "plugins" not in written


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base_model: other", "made for base_model 'HuggingFaceTB/SmolLM2-135M', this run has 'other'"),
        ("- a list", "is not an axolotl config"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_config_that_does_not_fit_is_one_paragraph(
    plan_folder: Path, tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "other.yml"
    path.write_text(text, encoding="utf-8")
    result = run("recipe", plan_folder, path)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


# ---- score and compare, with axolotl: one process for all ----------------------------------------------------------

SCRIPT = """
import os, sys
from axolotl_layersel.cli import main
for line in sys.argv[1:]:
    try:
        main(line.split(), standalone_mode=False)
        status = 0
    except SystemExit as end:
        status = end.code
    print("=====", status, flush=True)
    sys.stderr.flush()
    os.write(2, b"=====\\n")
"""


@pytest.fixture(scope="module")
def spoken(run_inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `score`, `score --json`, `compare --json`, and three wrong configs print: (stdout, status, stderr) each."""
    folder = tmp_path_factory.mktemp("cli")
    good = write_config(folder / "good", **run_inputs, layersel={"num_samples": 4, "first_layer": 2})
    bare = write_config(folder / "bare", **run_inputs, plugins=None, layersel=None)
    typo = write_config(folder / "typo", **run_inputs, layersel={"coverge": 0.9})
    grpo = write_config(folder / "grpo", **run_inputs, rl="grpo")
    sharded = {
        "fsdp_version": 2,
        "fsdp_config": {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "state_dict_type": "FULL_STATE_DICT"},
        "layersel": {"num_samples": 4, "plan": "not/written/yet.json"},
    }
    fsdp = write_config(folder / "fsdp", **run_inputs, **sharded)
    lines = {
        "score": f"score {good}",
        "again": f"score {good} --json --set layersel.num_samples=4 --set layersel.coverage=1.0",
        "fsdp": f"score {fsdp}",
        "bare": f"score {bare} --set layersel.num_samples=4",
        "compare": f"compare {good} --json",
        "typo": f"score {typo}",
        "grpo": f"score {grpo}",
        "pair": f"score {good} --set coverage",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *lines.values()],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=folder,
        timeout=300,
        check=False,
    )
    parts = re.split(r"===== (\d)\n", done.stdout)
    errors = done.stderr.split("=====\n")
    assert len(errors) == len(lines) + 1, done.stderr[-3000:]
    said = {name: (parts[2 * i], int(parts[2 * i + 1]), errors[i]) for i, name in enumerate(lines)}
    return {**said, "folder": folder}


@pytest.mark.slow
def test_score_writes_plan_and_recipe_and_prints_the_path_alone(spoken: dict[str, Any]) -> None:
    out, status, log = spoken["score"]
    path = spoken["folder"] / "good" / "out" / "layersel" / "plan.json"
    assert (out, status) == (f"{path}\n", 0), log[-3000:]
    assert path.with_name("recipe.yml").exists()
    assert "layersel: scoring layers: 4/4 rows" in log


@pytest.mark.slow
def test_score_leaves_a_given_cut_aside_and_takes_changed_keys(spoken: dict[str, Any]) -> None:
    out, status, log = spoken["again"]
    assert status == 0, log[-3000:]
    plan = Plan.from_json(out, source="standard output")
    assert plan.scores is not None and plan.first_trainable == 0
    assert plan.options["coverage"] == 1.0
    assert plan == read_plan(spoken["folder"] / "good" / "out")


@pytest.mark.slow
def test_score_trains_nothing(spoken: dict[str, Any]) -> None:
    left = sorted(path.name for path in (spoken["folder"] / "good" / "out").iterdir())
    assert set(left) <= {"layersel", "debug.log"}


@pytest.mark.slow
def test_score_runs_a_sharded_config_on_one_process_and_its_recipe_is_sharded_again(spoken: dict[str, Any]) -> None:
    out, status, log = spoken["fsdp"]
    assert status == 0, log[-3000:]
    recipe = yaml.safe_load(Path(out.strip()).with_name("recipe.yml").read_text(encoding="utf-8"))
    assert recipe["fsdp_version"] == 2
    assert recipe["fsdp_config"]["auto_wrap_policy"] == "TRANSFORMER_BASED_WRAP"
    assert list(recipe["layersel"]) == ["first_layer"]


@pytest.mark.slow
def test_score_takes_a_config_without_the_plugin(spoken: dict[str, Any]) -> None:
    out, status, log = spoken["bare"]
    assert status == 0, log[-3000:]
    recipe = yaml.safe_load(Path(out.strip()).with_name("recipe.yml").read_text(encoding="utf-8"))
    assert recipe["plugins"] == ["axolotl_layersel.LayerSelPlugin"]


@pytest.mark.slow
def test_compare_prints_json_alone_with_every_method_on_one_sample(spoken: dict[str, Any]) -> None:
    out, status, log = spoken["compare"]
    assert status == 0, log[-3000:]
    values = json.loads(out)
    assert values["num_layers"] == 6
    assert values["sample"]["rows"] == 4
    methods = {method["method"]: method for method in values["methods"]}
    assert len(methods) == 13
    defaults = LayerSelOptions()
    own = f"{defaults.deviation}, descent"
    assert values["methods"][0]["method"] == own
    for method in methods.values():
        assert 0 <= method["first_trainable"] < 6
        assert 0 < method["step"] <= 1
    again = Plan.from_json(spoken["again"][0], source="standard output")
    assert again.scores is not None
    assert methods[own]["weight"] == pytest.approx(again.scores.descent)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [("typo", "coverge"), ("grpo", "`rl: grpo` cannot be scored"), ("pair", "'coverage' is not KEY=VALUE")],
)
def test_what_cannot_be_scored_is_one_paragraph_and_exit_status_1(
    name: str, message: str, spoken: dict[str, Any]
) -> None:
    out, status, log = spoken[name]
    assert (out, status) == ("", 1)
    last = log.strip().splitlines()[-1]
    assert last.startswith("Error: ") and message in last
    assert "Traceback" not in log


@pytest.mark.slow
def test_axolotl_lists_the_command_and_runs_it(plan_folder: Path) -> None:
    listed = subprocess.run(
        [str(BIN / "axolotl"), "--help"], capture_output=True, text=True, env=environment(), timeout=120, check=True
    )
    assert re.search(r"^ +layersel +[Cc]hoose which decoder layers", listed.stdout, flags=re.M)
    shown = subprocess.run(
        [str(BIN / "axolotl"), "layersel", "show", str(plan_folder)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=120,
        check=True,
    )
    assert "first trainable layer 4 of 0 to 5" in shown.stdout
