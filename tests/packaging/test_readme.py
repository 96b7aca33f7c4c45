"""The READMEs say what the code does: options, configs, modules, commands; and their links lead somewhere."""

import ast
import re
from pathlib import Path
from typing import get_args

import yaml

from axolotl_layersel.config import options as args
from axolotl_layersel.config.options import LayerSelArgs, LayerSelOptions

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE_MAP = (ROOT / "axolotl_layersel" / "README.md").read_text(encoding="utf-8")
EXAMPLE = "example_configs/llama-3.1-8b-qlora-24gb.yml"


def _section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_readme_is_read_to_the_end() -> None:
    assert len(README.splitlines()) <= 160


def test_the_option_table_is_the_option_block() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \|$", _section("Choosing the cut: options"), flags=re.MULTILINE)
    fields = LayerSelOptions.model_fields
    assert len(rows) == len(fields) > 15
    for (name, default, meaning), (field_name, field) in zip(rows, fields.items(), strict=True):
        assert name == field_name
        value = yaml.safe_load(default.strip("`")) if default != "none" else None
        read = getattr(LayerSelOptions(**{name: value}), name)  # YAML reads `off` as false
        assert (read, meaning) == (field.default, field.description)


def test_the_named_choices_are_all_there_are() -> None:
    for kind in (args.DeviationName, args.PolicyName):
        for name in get_args(kind):
            assert f"`{name}`" in _section("Choosing the cut: options")


def test_every_yaml_block_is_valid_and_the_quick_start_is_an_example() -> None:
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)]
    assert blocks == [yaml.safe_load((ROOT / EXAMPLE).read_text(encoding="utf-8"))]
    for block in blocks:
        LayerSelArgs(**block)
    assert f"axolotl train {EXAMPLE}" in README


def test_every_module_named_exists() -> None:
    package = {path.name for path in (ROOT / "axolotl_layersel").rglob("*.py")}
    named = set(re.findall(r"`(?!tests/)(?:\w+/)*(\w+\.py)`", CODE_MAP))
    assert len(named) >= 15
    assert named <= package


def test_the_code_map_has_every_room_and_says_what_it_may_import() -> None:
    rows = dict(re.findall(r"^\| `([\w.]+?)(?:\.py|/)` \|.*\| ([^|]+) \|$", CODE_MAP, flags=re.MULTILINE))
    layout = ast.parse((ROOT / "tests" / "packaging" / "test_layout.py").read_text(encoding="utf-8"))
    (table,) = (n.value for n in layout.body if isinstance(n, ast.AnnAssign) and ast.unparse(n.target) == "MAY_IMPORT")
    assert table is not None
    may_import = {room: allowed - {"__init__"} for room, allowed in ast.literal_eval(table).items()}
    assert set(rows) == set(may_import) - {"plugin", "_startup", "__init__", "__main__"}
    words = {"nothing": set(), "all of them": set(rows) - {"cli", "integration"}}
    for room, imported in rows.items():
        assert words.get(imported, set(imported.split(", "))) == may_import[room], room


def test_every_make_target_named_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    named = set(re.findall(r"\bmake ([\w-]+)", README))
    assert "demo" in named and named <= targets


def test_every_command_of_ours_named_exists() -> None:
    from axolotl_layersel.cli import main

    named = set(re.findall(r"axolotl layersel (\w+)", README))
    assert named == set(main.commands)


def test_every_relative_link_of_a_readme_leads_to_a_file() -> None:
    here = [p for p in ROOT.rglob("README.md") if not {".venv", "work"} & set(p.relative_to(ROOT).parts)]
    readmes = [path for path in here if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)]
    links = [(path, link) for path in readmes for link in re.findall(r"\]\(([^)#:]+)\)", path.read_text("utf-8"))]
    assert len(links) >= 20
    assert [(str(path), link) for path, link in links if not (path.parent / link).exists()] == []
