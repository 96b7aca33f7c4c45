"""Where axolotl comes in; no other subpackage knows it. Another axolotl than the supported ones ends here."""

from axolotl_layersel.integration.axolotl_api import check_version

check_version()
