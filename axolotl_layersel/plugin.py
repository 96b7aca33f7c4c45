"""The plugin under its older dotted spelling, `axolotl_layersel.plugin.LayerSelPlugin`."""

from axolotl_layersel.integration.plugin import LayerSelPlugin as LayerSelPlugin
