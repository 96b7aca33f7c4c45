"""What `pip install` leaves: the files, the short plugin name, the start-up cost, and dependencies that are declared.

Wheel and editable install go into two fresh environments that see the packages of this one, but not its start-up files.
"""

from __future__ import annotations

import ast
import email
import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from axolotl_layersel.integration import axolotl_api

ROOT = Path(__file__).resolve().parents[2]
ALIAS = "axolotl_layersel.pth"
# Imported only inside functions, when the user's config reports to that tracker; axolotl brings all but MLflow.
TRACKERS = {"mlflow", "trackio", "wandb"}


@dataclass(frozen=True)
class Environment:
    """A virtual environment that sees the packages of the one that runs the tests."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def site(self) -> Path:
        version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
        return self.folder / "lib" / version / "site-packages"

    def run(self, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run this environment's Python in its own folder, with nothing of the caller's path."""
        env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        env |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1"}
        command = [str(self.python), *args]
        done = subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True, timeout=180)
        assert not check or done.returncode == 0, done.stderr[-4000:]
        return done

    def pip(self, *args: str) -> None:
        pip("--python", str(self.python), *args)


def pip(*args: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def make_environment(folder: Path) -> Environment:
    venv.create(folder, with_pip=False, symlinks=True)
    environment = Environment(folder)
    (environment.site / "parent.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return environment


OFFLINE = ("--no-index", "--no-deps", "--quiet")
INSTALL = ("install", *OFFLINE, "--ignore-installed", "--no-build-isolation")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", *OFFLINE, "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT))
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment without this package."""
    return make_environment(tmp_path_factory.mktemp("bare"))


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Environment:
    environment = make_environment(tmp_path_factory.mktemp(request.param))
    environment.pip(*INSTALL, *([str(wheel)] if request.param == "wheel" else ["-e", str(ROOT)]))
    return environment


# ---- the files -----------------------------------------------------------------------------------------------------


def test_wheel_holds_the_package_the_alias_the_licence_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        alias = archive.read(ALIAS).decode()
        info = f"{wheel.name.removesuffix('-py3-none-any.whl')}.dist-info"
        about = archive.read(f"{info}/METADATA").decode()
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    tree = (ROOT / "axolotl_layersel").rglob("*")
    sources = {str(p.relative_to(ROOT)) for p in tree if p.is_file() and "__pycache__" not in p.parts}
    packaged = {name for name in names if name.startswith("axolotl_layersel/")}
    assert packaged == sources - {f"axolotl_layersel/{ALIAS}"}
    about_it = {f"{info}/{name}" for name in ("METADATA", "WHEEL", "entry_points.txt", "RECORD", "licenses/LICENSE")}
    assert names - packaged == {ALIAS} | about_it
    assert alias == (ROOT / "axolotl_layersel" / ALIAS).read_text()
    assert "License-Expression: Apache-2.0" in about
    assert "Requires-Python: <3.13,>=3.10" in about
    assert "[axolotl.cli_commands]\nlayersel = axolotl_layersel.cli:main" in entry_points


def test_uninstalling_takes_the_alias_away(tmp_path: Path, wheel: Path) -> None:
    environment = make_environment(tmp_path / "env")
    environment.pip(*INSTALL, str(wheel))
    assert (environment.site / ALIAS).exists()
    environment.pip("uninstall", "--yes", "--quiet", "axolotl-layersel")
    assert [p.name for p in environment.site.iterdir() if "layersel" in p.name] == []


def test_an_alias_whose_package_is_gone_stays_silent(tmp_path: Path) -> None:
    environment = make_environment(tmp_path / "env")
    (environment.site / ALIAS).write_text((ROOT / "axolotl_layersel" / ALIAS).read_text())
    done = environment.run("-c", "print('ran')")
    assert (done.stdout, done.stderr) == ("ran\n", "")


# ---- start-up ------------------------------------------------------------------------------------------------------

MODULES = "import sys; print(*sorted(sys.modules))"


def test_other_programs_import_two_small_modules_at_start_and_nothing_heavy(
    bare: Environment, installed: Environment
) -> None:
    before, after = (set(e.run("-c", MODULES).stdout.split()) for e in (bare, installed))
    assert after - before == {"axolotl_layersel", "axolotl_layersel._startup"}


def test_importing_the_package_imports_neither_torch_nor_axolotl(installed: Environment) -> None:
    loaded = installed.run("-c", f"import axolotl_layersel; {MODULES}").stdout.split()
    assert "axolotl_layersel" in loaded
    assert {"torch", "axolotl", "transformers", "numpy", "typing"}.isdisjoint(loaded)


def test_the_alias_is_active_in_isolated_mode_and_in_spawned_processes(installed: Environment) -> None:
    program = installed.folder / "spawned.py"
    program.write_text(
        "import multiprocessing, sys\n"
        "def finders(): print([type(f).__name__ for f in sys.meta_path].count('AliasFinder'), flush=True)\n"
        "if __name__ == '__main__':\n"
        "    finders()\n"
        "    for method in ('spawn', 'forkserver'):\n"
        "        child = multiprocessing.get_context(method).Process(target=finders)\n"
        "        child.start(); child.join()\n"
    )
    assert installed.run("-I", str(program)).stdout.split() == ["1", "1", "1"]


# ---- the names -----------------------------------------------------------------------------------------------------

SPELLINGS = (
    "layersel",
    "axolotl_layersel.LayerSelPlugin",
    "axolotl_layersel.plugin.LayerSelPlugin",
    "axolotl_layersel:LayerSelPlugin",
    "axolotl_layersel.plugin:LayerSelPlugin",
    "axolotl_layersel.integration.plugin.LayerSelPlugin",
)
NEARLY = ("layersel.LayerSelPlugin", "axolotl-layersel.LayerSelPlugin", "Layersel", "axolotl_layersel.LayerSel")

ASK = """
import importlib, inspect, json, sys
import axolotl.integrations.base as base
import axolotl.cli.config as cli
import axolotl.utils.config as utils
from axolotl.utils.dict import DictDefault

def answer(ask, *about):
    try:
        return ask(*about)
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}"

def listed(name):  # the way that `axolotl train` goes, and the one that a Ray worker goes is the same
    cfg = DictDefault(base_model="none", plugins=[name])
    cli.prepare_plugins(cfg)
    from axolotl_layersel.config.conflicts import names_plugin
    kinds = {type(plugin).__module__ for plugin in base.PluginManager.get_instance().plugins.values()}
    return "acts" if names_plugin(cfg) and "axolotl_layersel.integration.plugin" in kinds else "is ignored"

def unlisted(module):
    module.prepare_plugins(DictDefault(base_model="none", layersel={}))
    return "is dropped"

names = json.loads(sys.argv[1])
said = {}
sys.modules["axolotl_layersel.integration.plugin"] = None  # an import that fails
said["broken"] = {name: answer(listed, name) for name in names}
del sys.modules["axolotl_layersel.integration.plugin"]
said["block"] = {module.__name__: answer(unlisted, module) for module in (cli, utils)}
said["listed"] = {name: answer(listed, name) for name in names}
said["unknown"] = answer(base.load_plugin, "nodot")
"""
LOAD = (
    ASK
    + """
import axolotl_layersel._startup as startup
once = base.load_plugin, cli.prepare_plugins
startup.install(); startup.add_alias(base); startup.refuse_unlisted_blocks(cli)
said["once"] = [
    (base.load_plugin, cli.prepare_plugins) == once, sum(type(f).__name__ == "AliasFinder" for f in sys.meta_path)
]
said["loader"] = [type(base.__spec__.loader).__name__, type(base.__loader__).__name__]
said["source"] = "def load_plugin" in inspect.getsource(base)
said["reloaded"] = hasattr(importlib.reload(base).load_plugin, "__wrapped__")
print("SAID", json.dumps(said))
"""
)


def ask(environment: Environment, program: str) -> dict[str, Any]:
    """One import of axolotl, many questions; what axolotl itself prints is left out."""
    done = environment.run("-c", program, json.dumps([*SPELLINGS, *NEARLY]))
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("SAID "))
    said: dict[str, Any] = json.loads(line.removeprefix("SAID "))
    return said


@pytest.fixture(scope="module")
def answers(installed: Environment) -> dict[str, Any]:
    return ask(installed, LOAD)


@pytest.mark.slow
def test_under_every_spelling_the_plugin_acts(answers: dict[str, Any]) -> None:
    assert {name: answers["listed"][name] for name in SPELLINGS} == dict.fromkeys(SPELLINGS, "acts")


@pytest.mark.slow
def test_a_name_that_is_nearly_right_stops_the_run(answers: dict[str, Any]) -> None:
    for name in NEARLY:
        assert re.match(r"(RuntimeError|ValueError|AttributeError): ", answers["listed"][name]), name


@pytest.mark.slow
def test_a_plugin_that_cannot_be_imported_stops_the_run_under_every_spelling(answers: dict[str, Any]) -> None:
    """Without the alias axolotl 0.19 would print the ImportError and train every layer without the plugin."""
    for name in SPELLINGS:
        answer = answers["broken"][name]
        given = {name, name.replace(":", ".")}  # axolotl 0.21 writes it with a dot before it asks
        assert answer.startswith(
            tuple(f"RuntimeError: the plugin {n!r} in `plugins:` cannot be imported: " for n in given)
        )
        assert "import of axolotl_layersel.integration.plugin halted" in answer
        assert answer.endswith("the full name of the plugin is 'axolotl_layersel.LayerSelPlugin'")


@pytest.mark.slow
def test_a_block_without_the_plugin_is_refused(answers: dict[str, Any]) -> None:
    """Such a block would be dropped: axolotl keeps no key that no plugin claims."""
    assert set(answers["block"]) == {"axolotl.cli.config", "axolotl.utils.config"}
    for answer in answers["block"].values():
        assert answer.startswith("ValueError: the config has a `layersel:` block, but `plugins:` is None, so axolotl ")


@pytest.mark.slow
def test_without_the_alias_a_spelling_acts_or_stops(bare: Environment) -> None:
    """As from a folder on `PYTHONPATH`; a block without the plugin cannot be refused there."""
    answers = ask(bare, f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{ASK}\nprint('SAID', json.dumps(said))")
    dotted = [name for name in SPELLINGS if "." in name and ":" not in name]
    assert {answers["listed"][name] for name in dotted} == {"acts"}
    for name in set(SPELLINGS) - set(dotted):
        assert answers["listed"][name] == "acts" or answers["listed"][name].startswith(("ValueError", "AttributeError"))
    assert set(answers["block"].values()) == {"is dropped"}


@pytest.mark.slow
def test_other_plugin_names_are_left_to_axolotl(answers: dict[str, Any]) -> None:
    assert answers["unknown"] == "ValueError: not enough values to unpack (expected 2, got 1)"


@pytest.mark.slow
def test_the_alias_is_added_once_and_axolotls_module_keeps_its_loader(answers: dict[str, Any]) -> None:
    assert answers["once"] == [True, 1]
    assert answers["loader"] == ["SourceFileLoader"] * 2
    assert answers["source"] and answers["reloaded"]


def test_an_axolotl_without_load_plugin_is_reported_with_the_dotted_spelling() -> None:
    import types

    from axolotl_layersel._startup import add_alias

    with pytest.warns(UserWarning, match=r"unknown to this axolotl; write 'axolotl_layersel\.LayerSelPlugin'"):
        add_alias(types.ModuleType("some_axolotl"))


# ---- dependencies --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def requirements(wheel: Path) -> dict[str, Requirement]:
    """What the wheel asks for on this machine, without extras, by normalised name."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        about = email.message_from_bytes(archive.read(name))
    found = [Requirement(text) for text in about.get_all("Requires-Dist", [])]
    return {normalised(r.name): r for r in found if r.marker is None or r.marker.evaluate({"extra": ""})}


def normalised(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def test_every_imported_package_is_a_declared_dependency(requirements: dict[str, Requirement]) -> None:
    imported: set[str] = set()
    for path in (ROOT / "axolotl_layersel").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(str(node.module).partition(".")[0])
    there = {"deepspeed"}  # imported where it has partitioned the weights, so it is installed
    imported -= sys.stdlib_module_names | {"axolotl_layersel"} | TRACKERS | there
    assert {"torch", "axolotl", "transformers"} <= imported
    distributions = metadata.packages_distributions()
    undeclared = {name for name in imported if set(requirements).isdisjoint(map(normalised, distributions[name]))}
    assert undeclared == set()


def test_the_installed_versions_lie_within_the_declared_bounds(requirements: dict[str, Requirement]) -> None:
    assert {"torch", "transformers", "axolotl", "peft", "bitsandbytes", "pyyaml"} <= set(requirements)
    outside = [str(r) for r in requirements.values() if not r.specifier.contains(metadata.version(r.name))]
    assert outside == []


def test_the_axolotl_that_is_installed_was_checked_for_its_private_names(requirements: dict[str, Requirement]) -> None:
    assert requirements["axolotl"].specifier == axolotl_api.SUPPORTED
    assert all(version in axolotl_api.SUPPORTED for version in axolotl_api.CHECKED_ON)
    assert metadata.version("axolotl") in axolotl_api.CHECKED_ON


@pytest.mark.slow
def test_another_axolotl_ends_in_one_sentence(tmp_path: Path, bare: Environment) -> None:
    """Whatever axolotl does with a plugin's errors, the run ends, and no traceback is shown."""
    info = tmp_path / "axolotl-0.22.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.4\nName: axolotl\nVersion: 0.22.0\n")
    paths = [str(tmp_path), str(ROOT)]
    load = (
        f"import sys; sys.path[:0] = {paths}; import axolotl.integrations.base as base\n"
        "base.PluginManager.get_instance().register('axolotl_layersel.LayerSelPlugin')"
    )
    done = bare.run("-c", load, check=False)
    assert done.returncode == 1
    assert "axolotl-layersel works with axolotl <0.22,>=0.19, and 0.22.0 is installed: install one of" in done.stderr
    assert "Traceback" not in done.stderr


def test_private_names_of_axolotl_stand_in_one_module() -> None:
    private = {}
    for path in (ROOT / "axolotl_layersel").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "axolotl":
                for name in (f"{node.module}.{alias.name}" for alias in node.names):
                    if "._" in name or "monkeypatch" in name:
                        private[name] = path.name
    assert len(private) >= 2 and set(private.values()) == {"axolotl_api.py"}


def test_every_dependency_has_an_upper_bound(requirements: dict[str, Requirement]) -> None:
    assert [r.name for r in requirements.values() if "<" not in str(r.specifier)] == []
