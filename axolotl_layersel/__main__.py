"""`python -m axolotl_layersel`: the same commands as `axolotl layersel`."""

from axolotl_layersel.cli import main

if __name__ == "__main__":
    main(prog_name="python -m axolotl_layersel")
