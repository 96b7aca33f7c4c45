"""Which axolotl this is, and every name of it that we use although it is private, or not promised to stay.

Each name says with which versions it was read and run. What the other modules import from axolotl is public: hooks,
loaders, `load_cfg`, the data sets of a config. axolotl's modules are imported in the functions, because the version is
checked before the first of them is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import MethodType
from typing import Any

from packaging.specifiers import SpecifierSet
from torch import Tensor, nn

SUPPORTED = SpecifierSet(">=0.19,<0.22")
CHECKED_ON = ("0.19.0", "0.20.0", "0.21.0")  # every name below, read in each of them


def check_version() -> None:
    """Leave the program with one sentence where axolotl is not a supported version.

    Not an error: axolotl 0.21 skips a plugin that raises one unless the config lists it, 0.19 and 0.20 skip it for some
    kinds, and all show a traceback that says less.

    Raises:
        SystemExit: with the sentence.
    """
    if (found := version("axolotl")) not in SUPPORTED:
        raise SystemExit(
            f"axolotl-layersel works with axolotl {SUPPORTED}, and {found} is installed: install one of these, or a "
            "release of axolotl-layersel that knows this axolotl"
        )


def stock_lora_config(model: nn.Module, cfg: Any) -> Any:
    """The LoraConfig that axolotl itself would use, without loading an adapter.

    Public, in 0.19 to 0.21: `axolotl.loaders.load_lora` with `config_only`.
    """
    from axolotl.loaders import load_lora

    return load_lora(model, cfg, config_only=True)[1]


def accept_dropout_beside_experts() -> None:
    """Let PEFT take `lora_dropout` where adapters sit on fused experts, as axolotl does if PEFT finds those by itself.

    Private: `axolotl.loaders.adapter._patch_peft_param_wrapper_dropout`, 0.19, 0.20, 0.21; it may be called again.
    """
    from axolotl.loaders.adapter import _patch_peft_param_wrapper_dropout

    _patch_peft_param_wrapper_dropout()


def attentions_without_kernels(layer: nn.Module) -> Iterator[tuple[nn.Module, dict[str, MethodType]]]:
    """The attention modules of a layer whose class axolotl rewrote for LoRA kernels, before they have any.

    Private: `axolotl.monkeypatch.lora_kernels`; 0.19, 0.20, 0.21.

    Yields:
        Each attention, with the methods that let it run without adapters.
    """
    from axolotl.monkeypatch import lora_kernels

    for attention in lora_kernels.find_self_attn_in_layer(layer):
        if not hasattr(attention, "apply_qkv"):
            yield (
                attention,
                {
                    "apply_qkv": MethodType(lora_kernels.original_apply_qkv, attention),
                    "apply_o": MethodType(lora_kernels.original_apply_o, attention),
                },
            )


class _Whole:
    """Stands in for axolotl's tiling of an MLP: one tile, without an autograd function of its own."""

    @staticmethod
    def apply(forward: Callable[..., Any], mlp: nn.Module, states: Tensor, _tiles: int, _trained: object) -> Any:
        return forward(mlp, states)


@contextmanager
def tiled_mlps_whole(model: nn.Module) -> Iterator[None]:
    """Run tiled MLPs whole, and let them look again afterwards for what they train.

    Private: `_tiled_mlp_dist_impl` and `_compute_params` of `axolotl.monkeypatch.tiled_mlp.patch`, 0.19, 0.20, 0.21.
    """
    tiled = [module for module in model.modules() if hasattr(module, "_tiled_mlp_dist_impl")]
    for module in tiled:
        vars(module)["_tiled_mlp_dist_impl"] = _Whole
    try:
        yield
    finally:
        for module in tiled:
            for name in ("_compute_params", "_tiled_mlp_dist_impl"):
                vars(module).pop(name, None)


def checkpoint_to_resume(cfg: Any) -> str | None:
    """The checkpoint that training will find by itself, `cfg` left as it is.

    Public by name: `axolotl.utils.train.determine_last_checkpoint`; `update=False` in 0.19, 0.20, 0.21.
    """
    from axolotl.utils.train import determine_last_checkpoint

    found: str | None = determine_last_checkpoint(cfg, update=False)
    return found


def saves_part_of_adapters() -> bool:
    """Whether FSDP2 checkpoints with FULL_STATE_DICT hold the first process's shards of the adapters alone.

    accelerate 1.13, which axolotl 0.19 pins, and 1.14 write them so, and on resuming leave the shards of the others as
    they were initialised. Read and run: `accelerate.utils.fsdp_utils`, 1.13; read: 1.14, and 1.15, which gathers.
    """
    return version("accelerate") in SpecifierSet("<1.15")


def lost_adapters(checkpoint: Path) -> str | None:
    """Why the adapters of an FSDP2 checkpoint would be resumed in part only, or None."""
    if not saves_part_of_adapters() or not (checkpoint / "pytorch_model_fsdp.bin").is_file():
        return None
    return (
        f"the checkpoint {str(checkpoint)!r} holds the first process's share of the adapters alone, as accelerate "
        f"{version('accelerate')} writes it with `state_dict_type: FULL_STATE_DICT`: resumed, the rest would start "
        f"afresh. Start anew from all of its adapters with `lora_model_dir: {checkpoint}` and `layersel: {{plan: "
        f"{checkpoint}/layersel/plan.json}}` (the optimizer starts afresh), and set `fsdp_config: {{state_dict_type: "
        "SHARDED_STATE_DICT}`, whose checkpoints are whole"
    )
