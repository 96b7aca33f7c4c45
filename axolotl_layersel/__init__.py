"""Choose *where* to fine-tune: layer selection by semantic transition, as an axolotl plugin.

Importing this package imports neither torch nor axolotl; `LayerSelPlugin` is resolved on first use.
Read `method/score_layers.py` first: it is the method on one page.
"""

__version__ = "0.1.0"
__all__ = ["LayerSelPlugin", "__version__"]

# Every Python program of the environment executes this file (see `_startup.py`), and `typing` would be its main cost.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from axolotl_layersel.integration.plugin import LayerSelPlugin


def __getattr__(name: str) -> object:
    if name == "LayerSelPlugin":
        from axolotl_layersel.integration.plugin import LayerSelPlugin

        return LayerSelPlugin
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
