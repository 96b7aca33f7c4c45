"""The whole scoring pass against a slow reference written with `output_hidden_states` and a pseudoinverse."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import VOCABULARY, tiny_llama, tiny_llama_4bit
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from axolotl_layersel.method import batch_reader
from axolotl_layersel.method.calibration import Row
from axolotl_layersel.method.retention import forward_exponent, forward_law, unlike_the_known
from axolotl_layersel.method.score_layers import score_layers
from axolotl_layersel.method.scoring_pass import ScoringError, measure
from axolotl_layersel.method.transition import RowStatistics
from axolotl_layersel.model.decoder_stack import StackError, find_stack
from axolotl_layersel.model.verify_stack import prove_stack

LAYERS = 6


def _rows(count: int = 7, seed: int = 0) -> list[Row]:
    """Rows of odd lengths, a few positions of each unsupervised, the first label always so."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        ids = [rng.randrange(1, VOCABULARY) for _ in range(rng.randrange(3, 23))]
        rows.append(Row(tuple(ids), tuple(-100 if i < 2 or rng.random() < 0.2 else t for i, t in enumerate(ids))))
    return [row for row in rows if row.scored]


def _reference(model: nn.Module, rows: list[Row]) -> tuple[list[float], list[float]]:
    """Mean cosine deviation of each state and mean transition miss of each layer, one token at a time in float64."""
    bases_VD = torch.linalg.pinv(model.lm_head.weight.double()).T
    states, misses = [], []
    for row in rows:
        seen: list[torch.Tensor] = []
        hooks = [layer.register_forward_pre_hook(lambda m, a: seen.append(a[0][0])) for layer in model.model.layers]
        hooks.append(model.model.norm.register_forward_pre_hook(lambda m, a: seen.append(a[0][0])))
        with torch.no_grad():
            model(input_ids=torch.tensor([row.input_ids]))
        for hook in hooks:
            hook.remove()
        normed = [model.model.norm(s).detach().double() for s in seen]
        for t in range(len(row.input_ids) - 1):
            label = row.labels[t + 1]
            if label == -100:
                continue
            b = bases_VD[label]
            r = [s[t] for s in normed]
            states.append([float(1 - (x @ b) / x.norm() / b.norm()) for x in r])
            miss = []
            for i in range(len(r) - 1):
                f, u = r[i + 1] - r[i], r[i].norm() * b / b.norm() - r[i]
                miss.append(float(f.norm() * (1 - (f @ u) / f.norm() / u.norm()) / u.norm()))
            misses.append(miss)
    return np.mean(states, axis=0).tolist(), np.mean(misses, axis=0).tolist()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_llama(num_layers=LAYERS, attention_dropout=0.3)


def _measure(model: nn.Module, rows: list[Row], **options: object) -> RowStatistics:
    settings: dict = {"deviation": "cosine", "batch_tokens": 64, "transitions": True, **options}
    with torch.no_grad():
        return measure(model.eval(), find_stack(model), rows, range(len(rows)), **settings)


def test_deviations_equal_the_reference(model: nn.Module) -> None:
    rows = _rows()
    statistics = _measure(model, rows)
    deviation, miss = _reference(model, rows)
    # Float32 states against the same states in float64: a few rounding errors of cosines of 32 terms.
    np.testing.assert_allclose(statistics.mean(statistics.deviation_RS), deviation, atol=2e-6)
    np.testing.assert_allclose(statistics.mean(statistics.miss_RL), miss, rtol=2e-5)


def test_the_loss_is_the_model_s_own(model: nn.Module) -> None:
    rows = _rows()
    losses = []
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row.input_ids])).logits[0, :-1]
        labels = torch.tensor(row.labels[1:])
        losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none")[labels != -100])
    assert score_layers(model, rows).scores.loss == pytest.approx(float(torch.cat(losses).mean()), abs=1e-5)


class _Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation makes."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        made = [t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor)]
        self.bytes = max([self.bytes, *(t.numel() * t.element_size() for t in made)])
        return output


@pytest.mark.parametrize("deviation", ["cosine", "logit_lens"])
def test_no_copy_of_the_unembedding_and_no_logits_of_all_tokens_are_made(
    monkeypatch: pytest.MonkeyPatch, deviation: str
) -> None:
    """In float32 both would take gigabytes where the vocabulary has 128,000 entries."""
    monkeypatch.setattr(batch_reader, "_LOGITS", 2**18)
    vocabulary, hidden, tokens = 20_011, 64, 64
    model = tiny_llama(num_layers=2, vocab_size=vocabulary, hidden_size=hidden, max_position_embeddings=128).bfloat16()
    rows = [Row((1, 2, 3), (-100, 2, 3)), Row(tuple(range(1, tokens + 1)), tuple(range(1, tokens + 1)))]
    largest = _Largest()
    with largest:
        score_layers(model, rows, deviation=deviation, batch_tokens=tokens)
    assert largest.bytes < min(4 * vocabulary * hidden, 4 * vocabulary * (tokens - 1))


def test_batches_padding_order_and_processes_do_not_matter(model: nn.Module) -> None:
    rows = _rows(9)
    whole = score_layers(model, rows, batch_tokens=10**6)
    one_by_one = score_layers(model, rows, batch_tokens=1)
    np.testing.assert_allclose(whole.scores.deviation, one_by_one.scores.deviation, atol=1e-6)
    assert whole.first_trainable == one_by_one.first_trainable

    def shared(rank: int) -> RowStatistics:
        with torch.no_grad():
            return measure(
                model, find_stack(model), rows, range(rank, len(rows), 2), deviation="cosine", batch_tokens=64
            )

    together = score_layers(model, rows, together=lambda _work: [shared(1), shared(0)])
    np.testing.assert_allclose(whole.scores.deviation, together.scores.deviation, atol=1e-6)
    assert whole.first_trainable == together.first_trainable


def test_equal_inputs_give_equal_scores(model: nn.Module) -> None:
    assert score_layers(model, _rows()) == score_layers(model, _rows())


@pytest.mark.parametrize("deviation", ["cosine", "logit_lens"])
@pytest.mark.parametrize("policy", ["coverage", "peak_gain", "budget"])
def test_every_deviation_and_policy_gives_a_whole_result(model: nn.Module, deviation: str, policy: str) -> None:
    scored = score_layers(model, _rows(), deviation=deviation, policy=policy)
    scores = scored.scores
    assert scores.retention_low and scores.retention_high
    assert len(scores.deviation) == len(scores.deviation_stderr) == LAYERS + 1
    assert len(scores.descent) == len(scores.retention) == LAYERS
    assert sum(scores.descent) == pytest.approx(1.0)
    assert sum(scores.stability.values()) == pytest.approx(1.0)
    assert sum(scores.row_cuts.values()) == len(_rows())
    for low, kept, high in zip(scores.retention_low, scores.retention, scores.retention_high, strict=True):
        assert low <= kept <= high
    if policy == "coverage":
        assert scores.retention_low[scored.first_trainable] >= 0.95


def test_the_band_is_wider_for_a_model_unlike_the_known_ones_and_a_note_says_why(model: nn.Module) -> None:
    scored = score_layers(model, _rows())
    assert any("unlike" in note or "6 layers (known are 12 to 30)" in note for note in scored.notes)
    assert scored.scores.gain_source == "forward" and scored.scores.loss is not None
    loss, share_L = scored.scores.loss, np.array(scored.scores.descent)
    law = forward_law(loss)
    wider = law.widened(unlike_the_known(loss=loss, num_layers=LAYERS, family="llama"))
    assert wider.factor > law.factor > 1
    assert scored.scores.exponent == forward_exponent(loss)
    assert scored.scores.retention_low == wider.low(share_L).tolist() < law.low(share_L).tolist()
    assert scored.scores.retention_high == wider.high(share_L).tolist() > law.high(share_L).tolist()


def test_the_cut_follows_the_data_where_the_model_has_structure() -> None:
    """Two tokens whose labels are reached in layer 1 and in layer 4: their rows alone would choose other cuts."""
    early, late = 3, 7
    network = _reaching_labels(early=early, late=late)
    rows = [Row((token, 11, token), (-100, token, token)) for token in (early,) * 4 + (late,) * 4]
    choose = {token: score_layers(network, [r for r in rows if r.input_ids[0] == token]) for token in (early, late)}
    assert choose[early].first_trainable < choose[late].first_trainable
    together = score_layers(network, rows)
    assert together.scores.row_cuts == {choose[early].first_trainable: 4, choose[late].first_trainable: 4}
    assert len(together.scores.stability) > 1


def _reaching_labels(*, early: int, late: int) -> nn.Module:
    """A Llama without attention whose layers 1 and 4 move a position of one token towards that token's own label."""
    network = tiny_llama(num_layers=LAYERS, hidden_size=64, intermediate_size=64)
    with torch.no_grad():
        for layer in network.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embedding, head = network.model.embed_tokens.weight, network.lm_head.weight
        torch.nn.init.orthogonal_(embedding[:32]), torch.nn.init.orthogonal_(head[:32])
        for index, token in ((1, early), (4, late)):
            mlp = network.model.layers[index].mlp
            direction = embedding[token] / embedding[token].norm()
            mlp.gate_proj.weight.zero_()[0] = direction
            mlp.up_proj.weight.zero_()[0] = direction
            mlp.down_proj.weight[:, 0] = head[token] / head[token].norm()
    return network


def _state_of(model: nn.Module) -> tuple:
    return (
        [m.training for m in model.modules()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [p.sum().item() for p in model.parameters()],
        torch.random.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),
        random.getstate(),
        torch.is_grad_enabled(),
    )


def test_the_model_and_the_random_state_are_left_as_found(model: nn.Module) -> None:
    model.train()
    model.model.layers[2].eval()
    before = _state_of(model)
    score_layers(model, _rows())
    assert _state_of(model) == before


def test_the_model_is_left_as_found_when_scoring_fails(model: nn.Module) -> None:
    model.train()
    before = _state_of(model)

    def fail(rows: int, tokens: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_layers(model, _rows(), progress=fail)
    assert _state_of(model) == before


def test_a_token_whose_embedding_is_broken_names_its_rows() -> None:
    broken = tiny_llama()
    rows = _rows(6)
    token = rows[3].input_ids[0]
    with torch.no_grad():
        broken.model.embed_tokens.weight[token] = float("nan")
    guilty = [i for i, row in enumerate(rows) if token in row.input_ids]
    with pytest.raises(
        ScoringError, match=r"rows .*not finite.*'model.embed_tokens.weight' holds NaN or Inf"
    ) as caught:
        score_layers(broken, rows, batch_tokens=1)
    assert any(f"({i} of the calibration sample)" in str(caught.value) for i in guilty)


def test_infinite_weights_are_named() -> None:
    broken = tiny_llama()
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(ScoringError, match="layers.1.mlp.up_proj.weight"):
        score_layers(broken, _rows())


def test_memory_that_runs_out_halves_the_batch_and_says_so(model: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    """The error is raised by a hook where a batch of more than two rows enters, as an allocator would."""
    rows = _rows(7)

    def allocate(_module: nn.Module, args: tuple) -> None:
        if args[0].shape[0] > 2:
            raise torch.OutOfMemoryError("no memory for this batch")

    hook = model.model.layers[3].register_forward_pre_hook(allocate)
    try:
        scores = score_layers(model, rows, batch_tokens=10**6).scores
    finally:
        hook.remove()
    assert "out of memory: this batch and all after it are halved" in caplog.text
    np.testing.assert_allclose(scores.deviation, score_layers(model, rows).scores.deviation, atol=1e-6)


def test_memory_that_runs_out_for_a_single_row_stops_the_run(model: nn.Module) -> None:
    def allocate(_module: nn.Module, _args: tuple) -> None:
        raise torch.OutOfMemoryError("no memory at all")

    hook = model.model.layers[3].register_forward_pre_hook(allocate)
    try:
        with pytest.raises(
            ScoringError, match="one row of .* tokens alone is too much for the memory of cpu .no memory at all"
        ):
            score_layers(model, _rows(3))
    finally:
        hook.remove()


def test_4_bit_layers_and_a_bfloat16_model_are_scored(tmp_path: Path) -> None:
    reference = score_layers(tiny_llama(), _rows()).scores
    quantised = score_layers(tiny_llama_4bit(tmp_path), _rows()).scores
    rounded = score_layers(tiny_llama().bfloat16(), _rows()).scores
    autocast = score_layers(tiny_llama(), _rows(), autocast=torch.bfloat16).scores
    for scores in (quantised, rounded, autocast):
        assert np.isfinite(scores.deviation).all()
    # Six layers of bfloat16, each rounding by 2^-9 at most, add up to about a hundredth of a cosine.
    np.testing.assert_allclose(rounded.deviation, reference.deviation, atol=LAYERS * 2**-9)
    np.testing.assert_allclose(autocast.deviation, reference.deviation, atol=LAYERS * 2**-9)


def test_scoring_leaves_4_bit_weights_alone(tmp_path: Path) -> None:
    """On a CPU, bitsandbytes repacks the weights of a module that runs in eval mode."""
    model = tiny_llama_4bit(tmp_path, hidden_size=128, intermediate_size=128).eval()
    linears = [m for m in model.modules() if hasattr(getattr(m, "weight", None), "quant_state")]
    before = [(m.weight.data.clone(), m.weight.quant_state.absmax.clone(), m.training) for m in linears]
    score_layers(model, _rows())
    assert len(linears) == 7 * LAYERS
    for module, (data, absmax, training) in zip(linears, before, strict=True):
        assert torch.equal(module.weight.data, data)
        assert torch.equal(module.weight.quant_state.absmax, absmax)
        assert module.training == training


def test_a_policy_s_bounds_are_checked_before_anything_runs(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="budget is 0.1, which is 0 of 6 decoder layers"):
        score_layers(model, _rows(), budget=0.1)


def test_an_unstable_cut_is_told_with_the_cut_that_more_resamples_choose(model: nn.Module) -> None:
    rivals = set()
    for count, seed in itertools.product((3, 4, 5), (0, 3, 4)):
        scored = score_layers(model, _rows(count, seed))
        cut, stability = scored.first_trainable, scored.scores.stability
        told = [note for note in scored.notes if "bootstrap resamples" in note]
        assert len(told) == (stability.get(cut, 0.0) < 0.5)
        for note in told:
            assert f"the cut at layer {cut} holds in {stability[cut]:.2f} of" in note
            likely = max(stability.values())
            rivals.add(likely > stability[cut])
            assert ("(layer " in note) == (likely > stability[cut])
            assert (f" in {likely:.2f})" in note) == (likely > stability[cut])
    assert rivals == {True, False}


def test_a_broken_promise_is_told(model: nn.Module) -> None:
    capped = score_layers(model, _rows(), budget=2, coverage=1.0)
    assert any("budget keeps the cut at layer 4" in note for note in capped.notes)


def test_a_model_without_a_head_is_refused(model: nn.Module) -> None:
    with pytest.raises(StackError, match="has no unembedding"):
        score_layers(model.model, _rows())


def test_states_that_the_model_does_not_compute_are_refused() -> None:
    """The model turns its logits around after the unembedding, so reading states through it would mislead."""
    changed = tiny_llama()
    hook = changed.lm_head.register_forward_hook(lambda _m, _a, output: -output)
    stack = find_stack(changed)
    ours = nn.Linear(32, VOCABULARY, bias=False)
    ours.weight = changed.lm_head.weight
    stack = type(stack)(**{**stack.__dict__, "head": ours})
    with pytest.raises(StackError, match="norm and unembedding do not reproduce the model's logits"):
        prove_stack(changed, stack, input_ids=torch.arange(1, 9)[None])
    hook.remove()
