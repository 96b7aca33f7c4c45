"""The same logger as axolotl wraps it: of several processes only the main one is heard."""

from axolotl.utils.logging import get_logger

from axolotl_layersel import log

LOG = get_logger(log.LOG.name)
