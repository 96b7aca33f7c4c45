"""Teach axolotl the short name: `plugins: [layersel]` for `axolotl_layersel.LayerSelPlugin`.

axolotl loads a plugin by splitting its name at the last dot, so a name without a dot fails, and it has no registry
that a package could enter. `axolotl_layersel.pth` therefore imports this module at the start of every interpreter of
the environment. It only places a finder on `sys.meta_path`; when somebody imports `axolotl.integrations.base`, that
module's `load_plugin` is wrapped once. Every other program pays for a class and an attribute lookup, so this
module and the package's `__init__` import nothing but `sys` (`benchmarks/startup.py` measures it).
"""

import sys

TYPE_CHECKING = False  # type checkers read it as true; importing `typing` costs more than all the rest
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

SHORT_NAME = "layersel"
DOTTED_NAME = "axolotl_layersel.LayerSelPlugin"
AXOLOTL_MODULE = "axolotl.integrations.base"
_MARK = "_axolotl_layersel_alias"


class AliasLoader:
    """The loader that axolotl's module would have had, and one step after it; everything else is handed through."""

    def __init__(self, loader: "Any") -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> "Any":
        return getattr(self.loader, name)

    def exec_module(self, module: "ModuleType") -> None:
        """Execute the module with its own loader, leave that loader in its attributes, then add the short name."""
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        add_alias(module)


class AliasFinder:
    """Finds one module, the one whose `load_plugin` is to be wrapped, by asking the finders after it."""

    def find_spec(
        self, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """The spec of `axolotl.integrations.base` with a loader that adds the alias; None for every other module."""
        if name != AXOLOTL_MODULE:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = AliasLoader(spec.loader)  # type: ignore[assignment]  # a loader in all but its base
                return spec
        return None


def add_alias(module: "ModuleType") -> None:
    """Wrap `module.load_plugin` so that it knows the short name; a second call changes nothing.

    axolotl logs an ImportError of a plugin and trains without it. For this plugin, under either name, that would be
    a run in which every layer is trained although nobody chose that; the wrapper turns it into an error that stops.
    """
    import functools

    load: Any = getattr(module, "load_plugin", None)
    if load is None:
        import warnings

        warnings.warn(
            f"{module.__name__} has no load_plugin, so the plugin name {SHORT_NAME!r} is unknown to this axolotl; "
            f"write {DOTTED_NAME!r} in `plugins:`",
            stacklevel=2,
        )
        return
    if getattr(load, _MARK, False):
        return

    @functools.wraps(load)
    def load_plugin(plugin_name: str) -> "Any":
        if plugin_name not in (SHORT_NAME, DOTTED_NAME):
            return load(plugin_name)
        try:
            return load(DOTTED_NAME)
        except ImportError as error:
            raise RuntimeError(
                f"the plugin {plugin_name!r} in `plugins:` cannot be imported: {error}. The run stops here, because "
                f"axolotl would go on without it and train every layer. `python -c 'from axolotl_layersel import "
                f"LayerSelPlugin'` shows the whole error; the full name of the plugin is {DOTTED_NAME!r}"
            ) from error

    setattr(load_plugin, _MARK, True)
    module.load_plugin = load_plugin  # type: ignore[attr-defined]


def install() -> None:
    """Place the finder first on `sys.meta_path`, once, and serve an axolotl that is already imported."""
    if not any(type(finder).__name__ == "AliasFinder" for finder in sys.meta_path):
        sys.meta_path.insert(0, AliasFinder())
    if AXOLOTL_MODULE in sys.modules:
        add_alias(sys.modules[AXOLOTL_MODULE])


install()
