"""Let hybrid models run on a machine without a GPU: imported before transformers' models are.

transformers 5.20 takes the Triton kernels of flash-linear-attention wherever that can be imported, and they need a GPU;
axolotl 0.21 installs it.
"""

import sys

import torch

if not torch.cuda.is_available():
    sys.modules["fla"] = None  # type: ignore[assignment]
