"""What other tools and papers choose layers by, on the same sample: one weight for each decoder layer.

    gradient_norm, relative_gradient_norm   a backward pass over every row      AutoFreeze (2102.01386), 2210.11466
    weight_snr                              the weights alone, no data          Spectrum (2406.06623)
    block_influence, state_change           one forward pass over every row     ShortGPT (2403.03853), 2010.15327
    random_weights, equal_weights           neither: the controls

Every function returns L float64 numbers >= 0, input side first, larger = more to gain by training the layer in the
reading of its source. Those that run the model want it as `left_as_found` makes it: in eval mode, without gradients,
under the precision of the run. `methods.py` turns weights into cuts with the policy that our own go through, so that
only the signals differ. Written from the papers and from what the tools compute; no code is shared with them.

Suffixes: B rows of a batch, T positions, N tokens, D hidden size, L decoder layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from axolotl_layersel.method.calibration import IGNORED, Row, batches
from axolotl_layersel.model.decoder_stack import DecoderStack
from axolotl_layersel.model.latent_states import StateReader, read_states

Array = NDArray[np.float64]
_CKA_TOKENS = 512  # of a batch; kernels are tokens x tokens


class SignalError(ValueError):
    """A signal that cannot be had from this model."""


def equal_weights(num_layers: int) -> Array:
    """The data-blind control: every layer the same."""
    return np.ones(num_layers)


def random_weights(num_layers: int, *, seed: int) -> Array:
    """Uniform numbers in [0, 1): what a signal without information does."""
    return np.random.default_rng(seed).random(num_layers)


def gradient_norm(model: nn.Module, stack: DecoderStack, rows: Sequence[Row]) -> Array:
    """Mean over rows of the L2 norm of the loss gradient of a layer's weights (the signal of AutoFreeze).

    Gradients are of each row on its own and are let go parameter by parameter, so no more than one of them is held.

    Raises:
        SignalError: the weights are quantised, so they have no gradient.
    """
    device = next(stack.embeddings.parameters()).device
    squared_RL = torch.zeros(len(rows), stack.num_layers, dtype=torch.float64)
    row = 0

    def accumulate(index: int) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            squared_RL[row, index] += parameter.grad.double().square().sum().cpu()
            parameter.grad = None

        return hook

    with torch.enable_grad(), _layers_require_grad(model, stack) as trained, ExitStack() as hooks:
        for index, parameters in enumerate(trained):
            for parameter in parameters:
                hooks.enter_context(parameter.register_post_accumulate_grad_hook(accumulate(index)))
        for row in range(len(rows)):
            (batch,) = batches(rows, [row], batch_tokens=1)
            batch = batch.to(device)
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
            F.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=IGNORED).backward()
    return np.asarray(squared_RL.sqrt().mean(dim=0).numpy())


def relative_gradient_norm(stack: DecoderStack, gradient_L: Array) -> Array:
    """`gradient_norm`, which is given, over the L2 norm of the layer's weights: Auto-RGN of surgical fine-tuning."""
    squared_L = [sum(float(p.detach().double().square().sum()) for p in layer.parameters()) for layer in stack.layers]
    return np.asarray(gradient_L / np.maximum(np.sqrt(squared_L), 1e-12))


@contextmanager
def _layers_require_grad(model: nn.Module, stack: DecoderStack) -> Iterator[list[list[nn.Parameter]]]:
    """The weights of each layer, made to require grad while nothing else does; flags and gradients are restored."""
    trained = [list(layer.parameters()) for layer in stack.layers]
    if not all(p.is_floating_point() for parameters in trained for p in parameters):
        raise SignalError("the weights are quantised, so they have no gradient: compare without load_in_4bit/8bit")
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    inside = {id(p) for parameters in trained for p in parameters}
    try:
        for parameter, _, _ in before:
            parameter.grad = None
            parameter.requires_grad_(id(parameter) in inside)
        yield trained
    finally:
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient


def weight_snr(stack: DecoderStack) -> Array:
    """Signal-to-noise ratio of a layer's weight matrices, as Spectrum takes it; quantised weights are dequantised.

    A singular value is signal above sigma (1 + sqrt(n / m)), the Marchenko-Pastur edge, with sigma from the
    interquartile range of the singular values; the ratio of both sums is divided by the largest singular value.
    Spectrum ranks matrices within their kind (q_proj, up_proj, ...), so each kind is divided by its sum over layers
    before the kinds are averaged.

    Raises:
        SignalError: the layers have no weight matrices.
    """
    by_kind: dict[str, list[float]] = {}
    for index, layer in enumerate(stack.layers):
        for kind, weight in _matrices(layer):
            by_kind.setdefault(kind, [0.0] * stack.num_layers)[index] = _snr(weight)
    if not by_kind:
        raise SignalError("the decoder layers have no weight matrices, so there is no signal-to-noise ratio")
    shares = [np.asarray(values) / max(sum(values), 1e-12) for values in by_kind.values()]
    return np.asarray(np.mean(shares, axis=0))


def _matrices(layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weight matrices of a layer, (outputs, inputs) or (experts, ., .), with their names."""
    for name, module in layer.named_modules():
        if isinstance(getattr(module, "in_features", None), int) and isinstance(module.weight, Tensor):
            yield name, dequantize_module_weight(module).detach()
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.dim() >= 2 and parameter.is_floating_point():
                yield f"{name}.{own}", parameter.detach()


def _snr(weight: Tensor) -> float:
    """Mean over the matrices of a (..., n, m) tensor."""
    matrix = weight.double()
    short, long = sorted(matrix.shape[-2:])
    gram = matrix @ matrix.mT if matrix.shape[-2] == short else matrix.mT @ matrix
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()  # cheaper than singular values, float64 for the small ones
    quartiles = torch.quantile(values, torch.tensor([0.25, 0.75], dtype=values.dtype, device=values.device), dim=-1)
    sigma = (quartiles[1] - quartiles[0]) / 1.349  # the interquartile range of a normal distribution
    edge = sigma * (1 + (short / long) ** 0.5)
    is_signal = values > edge[..., None]
    signal = torch.where(is_signal, values, 0.0).sum(-1)
    noise = torch.where(is_signal, 0.0, values).sum(-1)
    return float((signal / noise.clamp(min=1e-12) / values[..., -1].clamp(min=1e-12)).mean())


def block_influence(stack: DecoderStack, rows: Sequence[Row], *, batch_tokens: int = 4096) -> Array:
    """1 - cos(h_i, h_{i+1}), mean over all tokens, in [0, 2]: how much a layer turns its input (ShortGPT)."""
    total_L = np.zeros(stack.num_layers)

    def pair(index: int, before_ND: Tensor, after_ND: Tensor) -> None:
        total_L[index] += float((1 - F.cosine_similarity(before_ND, after_ND, dim=-1)).double().sum())

    tokens = _adjacent_states(stack, rows, pair, batch_tokens=batch_tokens)
    return total_L / tokens


def state_change(stack: DecoderStack, rows: Sequence[Row], *, batch_tokens: int = 4096) -> Array:
    """1 - linear CKA of adjacent latent states, in [0, 1]: how much a layer changes the representation.

    The minibatch estimator of 2010.15327: unbiased HSIC of each batch, summed before the ratio, so nothing grows with
    the sample. Batches of fewer than four tokens have no unbiased HSIC and are left out.
    """
    hsic_3L = np.zeros((3, stack.num_layers))

    def pair(index: int, before_ND: Tensor, after_ND: Tensor) -> None:
        one, other = (state_ND[:_CKA_TOKENS].double() for state_ND in (before_ND, after_ND))
        if len(one) < 4:
            return
        one_NN, other_NN = one @ one.T, other @ other.T
        for place, (k_NN, l_NN) in enumerate([(one_NN, other_NN), (one_NN, one_NN), (other_NN, other_NN)]):
            hsic_3L[place, index] += _unbiased_hsic(k_NN, l_NN)

    _adjacent_states(stack, rows, pair, batch_tokens=batch_tokens)
    scale_L = np.sqrt(np.maximum(hsic_3L[1] * hsic_3L[2], 0.0))
    if not (scale_L > 0).all():
        raise SignalError("the sample is too small for CKA: give it more rows, or rows of at least four tokens")
    return np.asarray(np.clip(1 - hsic_3L[0] / scale_L, 0.0, 1.0))


def _unbiased_hsic(k_NN: Tensor, l_NN: Tensor) -> float:
    n = len(k_NN)
    k_NN, l_NN = (kernel - torch.diag(kernel.diagonal()) for kernel in (k_NN, l_NN))
    rows_k, rows_l = k_NN.sum(dim=1), l_NN.sum(dim=1)
    value = (k_NN * l_NN).sum() + rows_k.sum() * rows_l.sum() / ((n - 1) * (n - 2)) - 2 * rows_k @ rows_l / (n - 2)
    return float(value) / (n * (n - 3))


def _adjacent_states(
    stack: DecoderStack, rows: Sequence[Row], pair: Callable[[int, Tensor, Tensor], None], *, batch_tokens: int
) -> int:
    """Call `pair` with (layer, input, output), (N, D) float32 of a batch's real tokens; return their number."""
    device = next(stack.embeddings.parameters()).device
    tokens = 0
    for batch in (b.to(device) for b in batches(rows, range(len(rows)), batch_tokens=batch_tokens)):
        tokens += int(batch.attention_mask.sum())
        reader = _pairs(pair, batch.attention_mask.bool())
        read_states(stack, input_ids=batch.input_ids, attention_mask=batch.attention_mask, reader=reader)
    return tokens


def _pairs(pair: Callable[[int, Tensor, Tensor], None], real_BT: Tensor) -> StateReader:
    """A reader that keeps one state of a batch until the next one comes."""
    before: list[Tensor] = []

    def reader(state: int, hidden_BTD: Tensor) -> None:
        now_ND = hidden_BTD[real_BT.to(hidden_BTD.device)].float()
        if before:
            pair(state - 1, before[0].to(now_ND.device), now_ND)
        before[:] = [now_ND]

    return reader
