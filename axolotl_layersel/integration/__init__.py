"""Where axolotl comes in; no other subpackage knows it."""
