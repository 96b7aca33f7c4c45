"""Rivals' signals against slow references and by hand, on tiny real models; and the comparison that uses them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_llama, tiny_llama_4bit, token_batch
from torch import Tensor, nn

from axolotl_layersel.compare import other_signals
from axolotl_layersel.compare.methods import Choice, Rule, compare_methods, spearman, table
from axolotl_layersel.compare.other_signals import SignalError
from axolotl_layersel.method.calibration import Row
from axolotl_layersel.method.retention import forward_law, unlike_the_known
from axolotl_layersel.method.score_layers import score_layers
from axolotl_layersel.model.decoder_stack import find_stack
from axolotl_layersel.model.latent_states import left_as_found

L = 4
RULE = Rule("coverage", 0.95, 1.0, 1)


def rows(count: int = 5) -> list[Row]:
    """Rows of 6 to 10 tokens, the first two of each unsupervised."""
    ids = token_batch(rows=count, tokens=10)["input_ids"].tolist()
    cut = [values[: 6 + i % 5] for i, values in enumerate(ids)]
    return [Row(tuple(r), (-100, -100, *r[2:])) for r in cut]


def model(**overrides: Any) -> Any:
    return tiny_llama(num_layers=L, **overrides)


def states(network: Any, row: Row) -> list[Tensor]:
    """Latent states 0..L of one row, (T, D): the last one is read before the final norm."""
    seen: list[Tensor] = []
    handles = [
        layer.register_forward_hook(lambda m, a, o: seen.append(o[0].detach())) for layer in network.model.layers
    ]
    ids = torch.tensor([row.input_ids])
    try:
        with torch.no_grad():
            network.eval()(input_ids=ids)
            first = network.model.embed_tokens(ids)[0]
    finally:
        for handle in handles:
            handle.remove()
        network.train()
    return [first, *seen]


def evaluated(signal: Callable[..., Any], network: Any, *args: Any, **options: Any) -> Any:
    """A signal as the comparison takes it: of a model that is not in training."""
    with left_as_found(network):
        return signal(*args, **options)


# ---- gradients -----------------------------------------------------------------------------------------------------


def reference_gradient_norms(network: Any, sample: list[Row]) -> np.ndarray[Any, Any]:
    """(rows, L), by autograd.grad, all gradients at once."""
    network.eval()
    found = []
    for row in sample:
        labels = torch.tensor(row.labels)[1:]
        logits = network(input_ids=torch.tensor([row.input_ids])).logits[0, :-1]
        loss = F.cross_entropy(logits, labels, ignore_index=-100)
        norms = []
        for layer in network.model.layers:
            grads = torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True)
            norms.append(float(torch.cat([g.flatten() for g in grads]).double().norm()))
        found.append(norms)
    network.train()
    return np.asarray(found)


def test_gradient_norm_is_the_mean_over_rows_of_what_autograd_gives() -> None:
    network, sample = model(), rows()
    expected = reference_gradient_norms(network, sample).mean(axis=0)
    found = evaluated(other_signals.gradient_norm, network, network, find_stack(network), sample)
    np.testing.assert_allclose(found, expected, rtol=1e-4)  # float32 gradients, summed in another order


def test_relative_gradient_norm_divides_by_the_norm_of_the_weights() -> None:
    network, sample = model(), rows()
    stack = find_stack(network)
    absolute = evaluated(other_signals.gradient_norm, network, network, stack, sample)
    before = other_signals.relative_gradient_norm(stack, absolute)
    weights = [
        float(torch.cat([p.detach().flatten() for p in layer.parameters()]).norm()) for layer in network.model.layers
    ]
    np.testing.assert_allclose(before, absolute / np.asarray(weights), rtol=1e-5)


def test_the_comparison_leaves_flags_gradients_mode_and_hooks_as_they_were() -> None:
    network = model()
    frozen = network.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    kept = network.lm_head.weight
    kept.grad = torch.ones_like(kept)
    compare(network)
    assert network.training
    assert not frozen.requires_grad
    assert [p is kept for p in network.parameters() if p.grad is not None] == [True]
    assert torch.equal(kept.grad, torch.ones_like(kept))
    assert all(not p._post_accumulate_grad_hooks for p in network.parameters())


def test_gradients_are_restored_when_the_forward_pass_fails() -> None:
    network = model()
    broken = Row((10_000, 1, 2), (1, 1, 2))  # no such token
    with pytest.raises(IndexError):
        evaluated(other_signals.gradient_norm, network, network, find_stack(network), [broken])
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    assert all(not p._post_accumulate_grad_hooks for p in network.parameters())


def test_quantised_weights_have_no_gradient_and_the_comparison_says_so(tmp_path: Path) -> None:
    network = tiny_llama_4bit(tmp_path, num_layers=L)
    with pytest.raises(SignalError, match="weights are quantised, so they have no gradient"):
        evaluated(other_signals.gradient_norm, network, network, find_stack(network), rows(1))
    choices = {c.method: c for c in compare(network)}
    assert "quantised" in str(choices["gradient norm"].skipped)
    assert choices["gradient norm"].first_trainable is None
    assert choices["weight SNR"].weight is not None


# ---- weights -------------------------------------------------------------------------------------------------------


def reference_snr(weight: Tensor) -> float:
    """As in Spectrum's description, from singular values."""
    values = torch.linalg.svdvals(weight.double())
    low, high = torch.quantile(values, 0.25), torch.quantile(values, 0.75)
    edge = (high - low) / 1.349 * (1 + (min(weight.shape) / max(weight.shape)) ** 0.5)
    return float(values[values > edge].sum() / values[values <= edge].sum() / values[0])


def test_the_snr_of_a_matrix_is_that_of_its_singular_values() -> None:
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    weight += 3 * torch.outer(torch.ones(24), torch.ones(40))  # a signal far above the noise
    for matrix in (weight, weight.T):
        assert other_signals._snr(matrix) == pytest.approx(reference_snr(matrix), rel=1e-6)
    both = torch.stack([weight, 2 * weight])  # experts: the mean over their matrices
    assert other_signals._snr(both) == pytest.approx((reference_snr(weight) + reference_snr(2 * weight)) / 2, rel=1e-6)


def test_weight_snr_weighs_every_kind_of_matrix_alike_and_needs_no_data() -> None:
    network = model()
    kinds = [name for name, m in network.model.layers[0].named_modules() if isinstance(m, nn.Linear)]
    ratios = np.asarray(
        [[reference_snr(layer.get_submodule(kind).weight.detach()) for kind in kinds] for layer in network.model.layers]
    )
    np.testing.assert_allclose(
        other_signals.weight_snr(find_stack(network)), (ratios / ratios.sum(axis=0)).mean(axis=1), rtol=1e-6
    )


def test_weight_snr_reads_4_bit_weights(tmp_path: Path) -> None:
    exact = other_signals.weight_snr(find_stack(model()))
    quantised = other_signals.weight_snr(find_stack(tiny_llama_4bit(tmp_path, num_layers=L)))
    assert quantised.sum() == pytest.approx(1.0)
    np.testing.assert_allclose(quantised, exact, atol=0.1)  # 4 bits move each share by a few hundredths


# ---- states --------------------------------------------------------------------------------------------------------


def test_block_influence_is_the_mean_turn_of_all_tokens() -> None:
    network, sample = model(), rows()
    turns: list[list[float]] = []
    for row in sample:
        hidden = states(network, row)
        cosines = [F.cosine_similarity(a, b, dim=-1) for a, b in pairwise(hidden)]
        turns += torch.stack(cosines, dim=1).tolist()
    found = evaluated(other_signals.block_influence, network, find_stack(network), sample)
    np.testing.assert_allclose(found, 1 - np.mean(turns, axis=0), atol=1e-5)


def test_block_influence_does_not_depend_on_the_batches() -> None:
    network, sample = model(), rows()
    stack = find_stack(network)
    one = evaluated(other_signals.block_influence, network, stack, sample, batch_tokens=1)
    np.testing.assert_allclose(
        one, evaluated(other_signals.block_influence, network, stack, sample, batch_tokens=10_000), atol=1e-6
    )


def test_a_layer_that_does_nothing_has_no_influence_and_changes_nothing() -> None:
    network = model()
    idle = network.model.layers[2]
    with torch.no_grad():
        idle.self_attn.o_proj.weight.zero_()
        idle.mlp.down_proj.weight.zero_()
    stack = find_stack(network)
    assert evaluated(other_signals.block_influence, network, stack, rows())[2] == pytest.approx(0.0, abs=1e-6)
    assert evaluated(other_signals.state_change, network, stack, rows())[2] == pytest.approx(0.0, abs=1e-9)


def test_cka_of_one_batch_is_the_unbiased_formula() -> None:
    """Against the definition with explicit kernels: HSIC_1 of Song et al., zero diagonals."""
    network, row = model(), rows(5)[4]
    hidden = [h.double().numpy() for h in states(network, row)]

    def hsic(x: Any, y: Any) -> float:
        k, m = x @ x.T, y @ y.T
        np.fill_diagonal(k, 0)
        np.fill_diagonal(m, 0)
        n, one = len(k), np.ones(len(k))
        first = np.trace(k @ m) + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
        return float((first - 2 / (n - 2) * one @ k @ m @ one) / (n * (n - 3)))

    expected = [1 - hsic(a, b) / np.sqrt(hsic(a, a) * hsic(b, b)) for a, b in pairwise(hidden)]
    found = evaluated(other_signals.state_change, network, find_stack(network), [row])
    np.testing.assert_allclose(found, np.clip(expected, 0, 1), atol=1e-5)


def test_too_small_a_sample_for_cka_is_refused() -> None:
    with pytest.raises(SignalError, match="too small for CKA"):
        evaluated(other_signals.state_change, model(), find_stack(model()), [Row((1, 2, 3), (1, 2, 3))])


# ---- controls ------------------------------------------------------------------------------------------------------


def test_random_weights_follow_their_seed() -> None:
    assert other_signals.random_weights(8, seed=3).tolist() == other_signals.random_weights(8, seed=3).tolist()
    assert other_signals.random_weights(8, seed=3).tolist() != other_signals.random_weights(8, seed=4).tolist()
    assert other_signals.equal_weights(3).tolist() == [1.0, 1.0, 1.0]


# ---- comparison ----------------------------------------------------------------------------------------------------


def compare(network: Any, **options: Any) -> list[Choice]:
    values = {"deviation": "cosine", "rule": RULE, "seed": 0, **options}
    return compare_methods(network, rows(), **values)


def test_every_method_is_compared_with_the_run_s_own_which_comes_first() -> None:
    choices = compare(model(), deviation="logit_lens", step_of_cut=[1.0, 0.9, 0.8, 0.7])
    scored = score_layers(model(), rows()).scores
    assert scored.loss is not None
    assert choices[0].method == "logit_lens, descent"
    assert (choices[0].overlap, choices[0].rank_correlation) == (1.0, pytest.approx(1.0))
    assert len(choices) == 2 + 1 + 7 + 3  # deviations, transition, rivals and controls, fixed shares
    assert len({c.method for c in choices}) == len(choices)
    for choice in choices:
        assert choice.first_trainable is not None and choice.skipped is None
        assert choice.step == [1.0, 0.9, 0.8, 0.7][choice.first_trainable]
        if choice.weight is not None:
            assert sum(choice.weight) == pytest.approx(1.0)
            law = forward_law(scored.loss).widened(unlike_the_known(loss=scored.loss, num_layers=L, family="llama"))
            assert RULE.cut(np.asarray(choice.weight), law=law) == choice.first_trainable
            assert choice.seconds is not None and choice.seconds >= 0


def test_salf_s_reading_is_the_run_s_own_where_its_policy_is() -> None:
    choices = compare(model(), rule=Rule("peak_gain", 0.95, 1.0, 1))
    assert choices[0].method == "transition" and choices[0].weight is not None
    assert choices[0].first_trainable == min(int(np.argmax(choices[0].weight)) + 1, L - 1)


def test_one_backward_pass_over_each_row_serves_both_gradient_signals() -> None:
    network, passes = model(), []
    network.model.layers[0].register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    choices = {choice.method: choice for choice in compare(network)}
    assert passes.count(True) == len(rows())
    absolute, relative = choices["gradient norm"], choices["relative gradient norm"]
    assert absolute.seconds is not None and relative.seconds is not None and relative.seconds >= absolute.seconds > 0


def test_the_run_s_own_row_is_what_a_run_would_choose() -> None:
    network = model()
    scored = score_layers(network, rows(), coverage=0.8)
    own = compare(network, rule=Rule("coverage", 0.8, 1.0, 1))[0]
    assert own.first_trainable == scored.first_trainable
    np.testing.assert_allclose(own.weight, scored.scores.descent, rtol=1e-9)


def test_fixed_shares_train_a_quarter_half_and_three_quarters() -> None:
    fixed = [c for c in compare(model()) if c.source == "fixed share"]
    assert [c.first_trainable for c in fixed] == [3, 2, 1]


def test_spearman_by_hand() -> None:
    assert spearman(np.asarray([1.0, 2, 3]), np.asarray([10.0, 20, 30])) == pytest.approx(1.0)
    assert spearman(np.asarray([1.0, 2, 3]), np.asarray([3.0, 2, 1])) == pytest.approx(-1.0)
    # ranks 0.5 0.5 2 and 0 1 2: covariance 1.5, variances 1.5 and 2
    assert spearman(np.asarray([1.0, 1, 5]), np.asarray([1.0, 2, 3])) == pytest.approx(1.5 / (1.5 * 2) ** 0.5)
    assert spearman(np.ones(3), np.asarray([1.0, 2, 3])) is None


def test_the_table_fits_80_columns_and_names_every_method() -> None:
    from rich.console import Console

    choices = compare(model(), step_of_cut=[1.0, 0.9, 0.8, 0.7])
    console = Console(width=80, no_color=True)
    with console.capture() as captured:
        console.print(table(choices, num_layers=L))
    lines = captured.get().splitlines()
    assert all(any(line.startswith(c.method) for line in lines) for c in choices)
    assert len(lines) == len(choices) + 2
