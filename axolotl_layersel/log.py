"""The one logger of this package: below axolotl's own, so that axolotl's handlers and levels serve it too."""

import logging

LOG = logging.getLogger("axolotl.integrations.layersel")
