"""The semantics of a label: its basis vector in latent space.

The semantic basis of vocabulary entry v is row v of the pseudoinverse of the unembedding W (V x D), e_v W^+: the
least-squares representation whose logits are the one-hot of v (vocabulary-defined semantics, arXiv 2401.16184). It
is defined on the output side and read in every latent space. No V x D pseudoinverse is formed: with the Gram matrix
G = W'W the basis is G^-1 w_v, solved by one D x D Cholesky factor for the labels that occur.

A head bias, a logit scale and soft-capping change logits monotonically and leave the bases alone; a padded or
untrained vocabulary row adds its (near) zero outer product to G, which changes nothing either.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

# Relative to the mean eigenvalue of G: far above float64 rounding (1e-16 x condition), far below any real direction.
RIDGE = 1e-10
_CHUNK = 4_096  # vocabulary rows in one float64 product


@dataclass(frozen=True)
class SemanticBases:
    """Bases of a vocabulary, computed on demand."""

    weight_VD: Tensor  # the unembedding, in the dtype and on the device that it was given in
    factor_DD: Tensor  # lower Cholesky factor of G + ridge, float64

    def of(self, labels_N: Tensor) -> Tensor:
        """Bases of the given vocabulary entries.

        Args:
            labels_N: (N,) int64, entries in [0, V).

        Returns:
            (N, D) float32; repeated labels are solved once.
        """
        unique_U, back_N = labels_N.to(self.weight_VD.device).unique(return_inverse=True)
        rows_DU = self.weight_VD[unique_U].to(self.factor_DD).T
        bases_UD: Tensor = torch.cholesky_solve(rows_DU, self.factor_DD).T.float()
        return bases_UD[back_N.to(self.factor_DD.device)]


def unembedding_weight(head: nn.Module) -> Tensor:
    """The (V, D) weight of an unembedding, dequantised if it is stored in 8 or 4 bit.

    Raises:
        ValueError: the module has no two-dimensional weight.
    """
    weight: Tensor | None = dequantize_module_weight(head) if hasattr(head, "weight") else None
    if weight is None or weight.dim() != 2:
        raise ValueError(
            f"the unembedding is a {type(head).__name__} without a V x D weight; labels have no semantic basis in it. "
            "Choose the layers by hand with `layersel: {first_layer: ...}`"
        )
    return weight.detach()


def semantic_bases(weight_VD: Tensor, *, ridge: float = RIDGE) -> SemanticBases:
    """Factor G = W'W + ridge once for a model.

    Args:
        weight_VD: (V, D) unembedding, any float dtype.
        ridge: added to the diagonal of G, relative to its mean; it makes a rank-deficient W (V < D) solvable.

    Raises:
        ValueError: W holds NaN or Inf, or is all zero.
    """
    # Float64 is refused by MPS and slow nowhere else: 2 V D^2 operations, once for a run.
    device = torch.device("cpu") if weight_VD.device.type == "mps" else weight_VD.device
    hidden = weight_VD.shape[1]
    gram_DD = torch.zeros(hidden, hidden, dtype=torch.float64, device=device)
    for block_CD in weight_VD.split(_CHUNK):
        block_CD = block_CD.to(gram_DD)
        gram_DD.addmm_(block_CD.T, block_CD)
    scale = gram_DD.diagonal().mean()
    if not torch.isfinite(scale) or scale <= 0:
        raise ValueError(
            "the unembedding holds NaN, Inf or only zeros, so labels have no semantic basis: "
            "check the checkpoint that base_model names"
        )
    gram_DD.diagonal().add_(ridge * scale)
    factor_DD, failed = torch.linalg.cholesky_ex(gram_DD)
    if failed:
        raise ValueError(
            f"the unembedding's Gram matrix is singular at ridge {ridge:g} (relative); allowed is a larger ridge"
        )
    return SemanticBases(weight_VD=weight_VD, factor_DD=factor_DD)
