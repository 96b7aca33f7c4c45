"""The core never knows the framework, and imports point one way."""

import ast
import subprocess
import sys
from pathlib import Path

import axolotl_layersel

PACKAGE = Path(axolotl_layersel.__file__).parent
KNOWS_AXOLOTL = {"plugin", "run", "apply", "readiness", "standalone", "cli", "_startup"}
METHOD = {"calibration", "gain", "measurement", "selection", "semantics", "stack", "stack_check", "trace", "transition"}


def _modules() -> dict[str, ast.Module]:
    return {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.glob("*.py")}


def _imports(tree: ast.Module) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_only_the_glue_knows_axolotl() -> None:
    knowing = {n for n, tree in _modules().items() if any(i.split(".")[0] == "axolotl" for i in _imports(tree))}
    assert knowing <= KNOWS_AXOLOTL
    assert "plugin" in knowing


def _needs() -> dict[str, set[str]]:
    """Which modules of the package each one imports."""
    modules = _modules()
    needs = {
        name: {i.split(".")[1] for i in _imports(tree) if i.startswith("axolotl_layersel.")} & set(modules)
        for name, tree in modules.items()
    }
    needs["__init__"] -= {"plugin"}  # resolved on first use, and for type checkers
    return needs


def test_imports_point_one_way() -> None:
    """No cycle: the modules can be ordered so that each imports only earlier ones."""
    needs = _needs()
    placed: set[str] = set()
    while ready := {n for n, wanted in needs.items() if n not in placed and wanted <= placed}:
        placed |= ready
    assert placed == set(needs), f"in a cycle: {sorted(set(needs) - placed)}"


def test_the_method_needs_nothing_but_itself() -> None:
    """What `pipeline.py` reaches, over any number of imports, is the method: no plan, no report, no glue."""
    needs, reached = _needs(), {"pipeline"}
    while further := set().union(*(needs[n] for n in reached)) - reached:
        reached |= further
    assert reached - {"pipeline"} == METHOD


def test_the_core_imports_with_axolotl_blocked() -> None:
    core = sorted(set(_modules()) - KNOWS_AXOLOTL - {"__main__"})
    code = "import sys\nsys.modules['axolotl'] = None\n" + "".join(f"import axolotl_layersel.{n}\n" for n in core)
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_importing_the_package_imports_neither_torch_nor_axolotl() -> None:
    code = "import axolotl_layersel, sys; assert not {'torch', 'axolotl', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
