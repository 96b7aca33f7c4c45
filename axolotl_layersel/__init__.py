"""Choose *where* to fine-tune: layer selection by semantic transition, as an axolotl plugin.

Importing this package imports neither torch nor axolotl; `LayerSelPlugin` is resolved on first use.
Read `pipeline.py` first: it is the method on one page.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LayerSelPlugin", "__version__"]

if TYPE_CHECKING:
    from axolotl_layersel.plugin import LayerSelPlugin


def __getattr__(name: str) -> Any:
    if name == "LayerSelPlugin":
        from axolotl_layersel.plugin import LayerSelPlugin

        return LayerSelPlugin
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
