"""Who may import whom: one table. `integration` alone knows axolotl, and no arrow runs back."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

import axolotl_layersel

PACKAGE = Path(axolotl_layersel.__file__).parent

MAY_IMPORT: dict[str, set[str]] = {  # a subpackage, or a module at the top -> what of the package it may import
    "log": set(),
    "plan_parts": set(),
    "plan": {"plan_parts"},
    "config": set(),
    "model": {"log"},
    "method": {"log", "model", "plan_parts"},
    "cost": {"model", "plan_parts"},
    "prefix_cache": {"log", "model", "plan"},
    "training": {"log", "model", "plan"},
    "compare": {"method", "model", "plan"},
    "report": {"log", "plan", "plan_parts", "config"},
    "integration": {
        "log", "plan", "plan_parts", "config", "model", "method", "cost", "prefix_cache", "training", "compare",
        "report", "__init__",
    },
    "cli": {"plan", "report", "compare", "integration"},
    "plugin": {"integration"},
    "_startup": {"config"},  # in a run whose config has a `layersel:` block
    "__init__": {"integration"},  # resolved on first use, and for type checkers
    "__main__": {"cli"},
}  # fmt: skip
KNOW_AXOLOTL = {"integration", "_startup"}  # the alias wraps axolotl's loader, without importing it


@functools.cache
def _modules() -> dict[Path, ast.Module]:
    return {
        path.relative_to(PACKAGE): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))
    }


def _room(path: Path) -> str:
    return path.parts[0] if len(path.parts) > 1 else path.stem


def _imports(tree: ast.Module) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _rooms_needed(tree: ast.Module) -> set[str]:
    """Rooms of the package that a module imports; names of the package itself are its `__init__`."""
    parts = [name.split(".") for name in _imports(tree) if name.split(".")[0] == "axolotl_layersel"]
    rooms = {path.parts[0] if len(path.parts) > 1 else path.stem for path in _modules()}
    return {p[1] if len(p) > 1 and p[1] in rooms else "__init__" for p in parts}


def test_every_module_has_a_row_and_imports_what_its_row_allows() -> None:
    modules = _modules()
    rooms = {_room(path) for path in modules}
    assert rooms <= set(MAY_IMPORT), f"no row for {sorted(rooms - set(MAY_IMPORT))}"
    assert len(modules) > 50, "the walk missed the subpackages"
    for path, tree in modules.items():
        room = _room(path)
        back = _rooms_needed(tree) - {room} - MAY_IMPORT[room]
        assert not back, f"{path} imports {sorted(back)}; allowed are {sorted(MAY_IMPORT[room])}"


def test_the_table_itself_has_no_circle() -> None:
    rest = {room: allowed - {"__init__"} for room, allowed in MAY_IMPORT.items() if room != "__init__"}
    placed: set[str] = set()
    while ready := {room for room, allowed in rest.items() if room not in placed and allowed <= placed}:
        placed |= ready
    assert placed == set(rest), f"in a circle: {sorted(set(rest) - placed)}"


def test_modules_of_a_room_import_each_other_one_way() -> None:
    modules = {".".join(path.with_suffix("").parts): tree for path, tree in _modules().items()}
    needs = {}
    for name, tree in modules.items():
        wanted = {i.removeprefix("axolotl_layersel.") for i in _imports(tree) if i.startswith("axolotl_layersel.")}
        needs[name] = {m for m in modules for w in wanted if w == m or w.startswith(f"{m}.")} - {"__init__", name}
    needs["__init__"] = set()
    placed: set[str] = set()
    while ready := {n for n, wanted in needs.items() if n not in placed and wanted <= placed}:
        placed |= ready
    assert placed == set(needs), f"in a circle: {sorted(set(needs) - placed)}"


def test_integration_alone_knows_axolotl() -> None:
    knowing = {_room(p) for p, tree in _modules().items() if any(i.split(".")[0] == "axolotl" for i in _imports(tree))}
    assert knowing == KNOW_AXOLOTL - {"_startup"}


def test_the_config_is_asked_when_the_run_starts_and_never_again() -> None:
    """`run_settings.py` asks it; the hooks and commands pass it to axolotl, and asking is reading one of its keys."""
    asking = {}
    for path, tree in _modules().items():
        if _room(path) == "integration":
            keys = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and _is_config(node.value)}
            keys |= {
                ast.unparse(n.slice) for n in ast.walk(tree) if isinstance(n, ast.Subscript) and _is_config(n.value)
            }
            asking[path.name] = keys
    assert len(asking.pop("run_settings.py")) > 15, "the walk does not see what it looks for"
    for before_validation in ("plugin.py", "ray_workers.py"):
        asking[before_validation] -= {"get", "KEYS", "key", "'gradient_checkpointing_kwargs'", "'layersel'"}
    asking["commands.py"] -= {"num_epochs", "is_multimodal", "axolotl_config_path"}  # they load it, and are no runs
    assert not {name: keys for name, keys in asking.items() if keys}


def _is_config(node: ast.expr) -> bool:
    return ast.unparse(node) in ("cfg", "settings.cfg", "self.settings.cfg", "current.settings.cfg")


@pytest.mark.slow
def test_the_rest_imports_with_axolotl_blocked() -> None:
    core = [
        ".".join(path.with_suffix("").parts)
        for path in _modules()
        if _room(path) not in {*KNOW_AXOLOTL, "plugin", "__main__", "__init__"}
    ]
    assert len(core) > 35
    code = "import sys\nsys.modules['axolotl'] = None\n" + "".join(
        f"import axolotl_layersel.{n.removesuffix('.__init__')}\n" for n in core
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_importing_the_package_imports_neither_torch_nor_axolotl() -> None:
    code = "import axolotl_layersel, sys; assert not {'torch', 'axolotl', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_the_config_room_needs_no_torch() -> None:
    code = "import axolotl_layersel.config.options, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
