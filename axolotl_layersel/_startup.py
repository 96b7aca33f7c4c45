"""Teach axolotl the short name, `plugins: [layersel]`; stop a run that mentions this plugin and would go on without.

axolotl loads a plugin by splitting its name at the last dot, so a name without a dot fails. `axolotl_layersel.pth`
therefore imports this module at the start of every interpreter of the environment. It only places a finder on
`sys.meta_path`; when somebody imports one of the modules of `STEPS`, one function in it is wrapped, once. Every other
program pays for a class and an attribute lookup, so this module and the package's `__init__` import nothing but `sys`
(`benchmarks/startup.py` measures it).

axolotl 0.21 has an entry point for plugins, `axolotl.plugins`. It is left alone: a plugin that enters there is loaded
in every run, merge and inference of the environment, named or not. `integration/README.md` says what acts where.
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
STEPS = {  # a module of axolotl -> the function of this one that is called with it, once it is executed
    "axolotl.integrations.base": "add_alias",
    "axolotl.cli.config": "refuse_unlisted_blocks",
    "axolotl.utils.config": "refuse_unlisted_blocks",
}
_MARK = "_axolotl_layersel_alias"


class AliasLoader:
    """The loader that a module of axolotl would have had, with one step after it."""

    def __init__(self, loader: "Any") -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> "Any":
        return getattr(self.loader, name)

    def exec_module(self, module: "ModuleType") -> None:
        """Execute the module with its own loader, leave that loader in its attributes, then wrap its function."""
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        globals()[STEPS[module.__name__]](module)


class AliasFinder:
    """Finds the modules whose functions are to be wrapped, by asking the finders after it."""

    def find_spec(
        self, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """The spec of a module of `STEPS` with a loader that takes the step; None for every other module."""
        if name not in STEPS:
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
    """Wrap `module.load_plugin` so that it knows every spelling; a second call changes nothing.

    axolotl 0.19 and 0.20 log an ImportError of a plugin and train without it. For this plugin, however its name is
    written, that would be a run in which every layer is trained although nobody chose that; the wrapper turns it into
    an error that stops.
    """
    load: Any = getattr(module, "load_plugin", None)
    if load is None:
        import warnings

        warnings.warn(
            f"{module.__name__} has no load_plugin, so the plugin name {SHORT_NAME!r} is unknown to this axolotl; "
            f"write {DOTTED_NAME!r} in `plugins:`",
            stacklevel=2,
        )
        return

    def load_plugin(plugin_name: str) -> "Any":
        if SHORT_NAME not in str(plugin_name).lower():
            return load(plugin_name)
        name = plugin_name.replace(":", ".")  # the spelling of entry points, which 0.21 takes too
        try:
            return load(DOTTED_NAME if name == SHORT_NAME else name)
        except ImportError as error:
            raise RuntimeError(
                f"the plugin {plugin_name!r} in `plugins:` cannot be imported: {error}. The run stops here, because "
                f"axolotl would go on without it and train every layer. `python -c 'from axolotl_layersel import "
                f"LayerSelPlugin'` shows the whole error; the full name of the plugin is {DOTTED_NAME!r}"
            ) from error

    _replace(module, "load_plugin", load_plugin)


def refuse_unlisted_blocks(module: "ModuleType") -> None:
    """Wrap `module.prepare_plugins` so that a `layersel:` block is refused where `plugins:` lists no plugin for it.

    axolotl drops keys that no plugin claims, so such a run would train every layer.
    """
    prepare: Any = getattr(module, "prepare_plugins", None)
    if prepare is None:
        return

    def prepare_plugins(cfg: "Any") -> "Any":
        if SHORT_NAME in cfg:
            from axolotl_layersel.config.conflicts import names_plugin

            if not names_plugin(cfg):
                raise ValueError(
                    f"the config has a `{SHORT_NAME}:` block, but `plugins:` is {cfg.get('plugins')!r}, so axolotl "
                    f"would drop the block and train every layer: add `plugins: [{SHORT_NAME}]`, or remove the block"
                )
        return prepare(cfg)

    _replace(module, "prepare_plugins", prepare_plugins)


def _replace(module: "ModuleType", name: str, wrapper: "Any") -> None:
    import functools

    original = getattr(module, name)
    if not getattr(original, _MARK, False):
        functools.update_wrapper(wrapper, original)
        setattr(wrapper, _MARK, True)
        setattr(module, name, wrapper)


def install() -> None:
    """Place the finder first on `sys.meta_path`, once, and serve the parts of axolotl that are already imported."""
    if not any(type(finder).__name__ == "AliasFinder" for finder in sys.meta_path):
        sys.meta_path.insert(0, AliasFinder())
    for name, step in STEPS.items():
        if name in sys.modules:
            globals()[step](sys.modules[name])


install()
