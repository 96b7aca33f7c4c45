"""The README says what the code does: options, configs, modules, commands."""

import re
from pathlib import Path
from typing import get_args

import yaml

from axolotl_layersel.config import options as args
from axolotl_layersel.config.options import LayerSelArgs, LayerSelOptions

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_option_table_is_the_option_block() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \|$", _section("Options"), flags=re.MULTILINE)
    fields = LayerSelOptions.model_fields
    assert len(rows) == len(fields) > 15
    for (name, default, meaning), (field_name, field) in zip(rows, fields.items(), strict=True):
        assert name == field_name
        value = yaml.safe_load(default.strip("`")) if default != "none" else None
        read = getattr(LayerSelOptions(**{name: value}), name)  # YAML reads `off` as false
        assert (read, meaning) == (field.default, field.description)


def test_the_named_choices_are_all_there_are() -> None:
    for kind in (args.DeviationName, args.GainName, args.PolicyName):
        for name in get_args(kind):
            assert f"`{name}`" in _section("Options")


def test_every_yaml_block_is_valid() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 1
    for block in blocks:
        LayerSelArgs(**yaml.safe_load(block))


def test_every_module_named_exists() -> None:
    package = {path.name for path in (ROOT / "axolotl_layersel").rglob("*.py")}
    named = set(re.findall(r"`(\w+\.py)`", _section("How it works")))
    assert len(named) >= 10
    assert named <= package


def test_every_make_target_named_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    named = set(re.findall(r"\bmake ([\w-]+)", README))
    assert {"demo", "test"} <= named <= targets


def test_every_command_of_ours_named_exists() -> None:
    from axolotl_layersel.cli import main

    named = set(re.findall(r"axolotl layersel (\w+)", README))
    assert named == set(main.commands)
