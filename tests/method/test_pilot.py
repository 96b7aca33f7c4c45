"""The pilot: what it costs, what it measures, what it leaves behind, and why it may not run."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import VOCABULARY, tiny_llama, tiny_llama_4bit
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from axolotl_layersel.method import gain as gains
from axolotl_layersel.method import pilot as pilots
from axolotl_layersel.method.calibration import Row
from axolotl_layersel.method.exponent import SHORTER
from axolotl_layersel.method.pilot import PilotSettings, run_pilot
from axolotl_layersel.method.pilot_curve import Arm, Piloted, curve_of, fit_exponent
from axolotl_layersel.method.pilot_size import LEAST_STEPS, MOST_EPOCHS, Size, pilot_cuts, pilot_size, rate_ratio
from axolotl_layersel.method.pilot_training import PilotError, Trainer, frozen, rate_at
from axolotl_layersel.method.score_layers import score_layers
from axolotl_layersel.model.decoder_stack import find_stack

LAYERS = 6
LONG = PilotSettings(run_tokens=1e6)


def _rows(count: int = 40, seed: int = 0) -> list[Row]:
    """Rows that count up in steps of 7 from a random start: something that a few steps can learn."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        start, length = rng.randrange(VOCABULARY), rng.randrange(8, 15)
        ids = [1 + (start + 7 * i) % (VOCABULARY - 1) for i in range(length)]
        rows.append(Row(tuple(ids), tuple(-100 if i < 2 else t for i, t in enumerate(ids))))
    return rows


def _pilot(model: nn.Module, rows: list[Row] | None = None, **options: Any) -> Piloted:
    values: dict[str, Any] = {"settings": LONG, "seed": 1, "batch_tokens": 120, **options}
    layers = find_stack(model).num_layers
    return run_pilot(model, find_stack(model), rows or _rows(), share_L=np.full(layers, 1 / layers), **values)


@pytest.fixture(scope="module")
def found() -> Piloted:
    return _pilot(tiny_llama(num_layers=LAYERS))


def test_it_trains_all_layers_half_and_a_sixth_and_each_learns(found: Piloted) -> None:
    result = found.result
    assert [cut.first_trainable for cut in result.cuts] == [0, 3, 5]
    assert all(cut.loss < result.base_loss for cut in result.cuts)
    assert [cut.retention for cut in result.cuts] == [
        pytest.approx((result.base_loss - cut.loss) / (result.base_loss - result.cuts[0].loss)) for cut in result.cuts
    ]
    assert (result.rows, result.heldout_rows) == (30, 10)
    assert result.cost_share <= LONG.share


def test_the_exponent_is_that_of_the_pilot_s_own_points_corrected_for_its_length(found: Piloted) -> None:
    left_L = gains.still_to_do(np.full(LAYERS, 1 / LAYERS))
    points = [(left_L[cut.first_trainable], cut.retention) for cut in found.result.cuts[1:]]
    tried = np.geomspace(0.005, 5, 20_000)
    error = sum((left**tried - kept) ** 2 for left, kept in points)
    # 400 points over three decades stand 1.8 % apart.
    assert found.result.exponent == pytest.approx(tried[np.argmin(error)], rel=0.018)
    assert found.exponent.value == pytest.approx(found.result.exponent / SHORTER)


def test_the_rate_grows_as_fewer_layers_are_trained(found: Piloted) -> None:
    every, half, sixth = (cut.learning_rate for cut in found.result.cuts)
    assert half / every == pytest.approx(2**0.25) and sixth / every == pytest.approx(6**0.25)
    assert rate_ratio(0, 30) == 1.0


def test_equal_inputs_give_equal_pilots(found: Piloted) -> None:
    again = _pilot(tiny_llama(num_layers=LAYERS))
    assert (again.exponent, again.result.cuts) == (found.exponent, found.result.cuts)


@pytest.mark.parametrize("kind", ["float32", "4 bit", "bfloat16"])
def test_the_model_and_the_random_state_are_left_bit_for_bit(kind: str, tmp_path: Path) -> None:
    model: nn.Module = tiny_llama(num_layers=LAYERS)
    if kind == "4 bit":
        model = tiny_llama_4bit(tmp_path, num_layers=LAYERS)
    elif kind == "bfloat16":
        model = model.bfloat16()
    model.model.layers[2].eval()
    list(model.parameters())[3].requires_grad_(False)
    before = _state(model)
    result = _pilot(model, autocast=torch.bfloat16 if kind == "bfloat16" else None).result
    assert all(cut.loss < result.base_loss for cut in result.cuts)  # it did train, also where autocast keeps copies
    after = _state(model)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]) if isinstance(value, torch.Tensor) else value == after[name], name


def _state(model: nn.Module) -> dict[str, Any]:
    return {
        **{name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)},
        "modes": [m.training for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "own forward": [name for name, m in model.named_modules() if "forward" in vars(m)],
        "wanted": [p.requires_grad for p in model.parameters()],
        "gradients": [p.grad for p in model.parameters()],
        "random": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
        "grad enabled": torch.is_grad_enabled(),
    }


def test_recomputing_layers_changes_no_number(found: Piloted) -> None:
    again = _pilot(tiny_llama(num_layers=LAYERS), settings=PilotSettings(run_tokens=1e6, checkpointing=True))
    for cut, other in zip(found.result.cuts, again.result.cuts, strict=True):
        assert cut.loss == pytest.approx(other.loss, rel=1e-6)


def test_small_batches_change_no_number_but_by_rounding(found: Piloted) -> None:
    again = _pilot(tiny_llama(num_layers=LAYERS), batch_tokens=15)
    for cut, other in zip(found.result.cuts, again.result.cuts, strict=True):
        assert cut.loss == pytest.approx(other.loss, rel=1e-3)


@pytest.fixture(params=["llama", "gpt2"])
def trainer(request: pytest.FixtureRequest) -> Iterator[Trainer]:
    model: nn.Module = tiny_llama(num_layers=LAYERS)
    if request.param == "gpt2":
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=LAYERS, n_head=4, n_positions=32)
        model = GPT2LMHeadModel(config)
    with torch.no_grad(), frozen(model.eval()):
        yield Trainer(
            model=model,
            stack=find_stack(model),
            rows=_rows(12),
            train=range(8),
            heldout=range(8, 12),
            rows_per_step=4,
            batch_tokens=40,
        )


def test_a_training_that_starts_at_a_cut_computes_the_whole_model_s_loss(trainer: Trainer) -> None:
    trainer.keep_states(2)
    trainer.keep_states(4)  # from what was kept for 2
    expected = []
    for index in trainer.heldout:
        row = trainer.rows[index]
        logits = trainer.model(input_ids=torch.tensor([row.input_ids])).logits[0, :-1]
        labels = torch.tensor(row.labels[1:])
        expected.append(float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)))
    for cut in (0, 2, 4):
        np.testing.assert_allclose(trainer.heldout_losses(cut), expected, rtol=1e-5)


def test_the_kept_states_are_those_that_training_reads(trainer: Trainer) -> None:
    """With other states the loss is another one: the layers below the cut do not run."""
    trainer.keep_states(3)
    before = trainer.heldout_losses(3)
    for row in trainer.heldout:
        trainer._entering[3][row] = trainer._entering[3][row].flip(-1)
    assert not np.allclose(before, trainer.heldout_losses(3), rtol=1e-3)


def test_a_rate_that_is_far_too_high_diverges_and_is_not_chosen(trainer: Trainer) -> None:
    trainer.keep_states(5)
    calm, wild = (trainer.trained(5, learning_rate=rate, steps=6, seed=0).sum() for rate in (5e-3, 1e3))
    assert calm < wild or not np.isfinite(wild)


def test_the_schedule_warms_up_and_ends_near_zero() -> None:
    rates = [rate_at(step, 20) for step in range(20)]
    assert rates[0] == pytest.approx(1 / 3) and max(rates) == 1.0 == rates[2]
    assert rates[-1] < 0.01


@pytest.mark.parametrize(("layers", "cuts"), [(30, (15, 25)), (12, (6, 10)), (6, (3, 5)), (2, (1, 1)), (1, (0, 0))])
def test_the_cuts_train_half_and_a_sixth(layers: int, cuts: tuple[int, int]) -> None:
    assert pilot_cuts(layers) == cuts


def test_a_pilot_is_as_long_as_its_budget_allows_and_never_costs_more() -> None:
    sizes = [pilot_size(budget, row_tokens=100, train_rows=96, heldout_rows=32) for budget in range(0, 300_000, 5_000)]
    assert sizes[0] is None and sizes[-1] is not None
    assert sizes[-1].steps == MOST_EPOCHS * 96 / 8
    for budget, size in zip(range(0, 300_000, 5_000), sizes, strict=True):
        assert size is None or (size.cost <= budget and size.steps >= LEAST_STEPS)


def test_the_exponent_of_exact_points_is_found() -> None:
    left = np.array([0.6, 0.2])
    assert fit_exponent(left, left**0.3) == pytest.approx(0.3, rel=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"settings": PilotSettings(run_tokens=1000)}, "a run of 1,000 tokens is too short .*raise pilot_share to"),
        ({"rows": _rows(20)}, "20 calibration rows .* are too few, at least 32"),
        ({"autocast": torch.float16}, "float16; use bf16"),
    ],
)
def test_what_cannot_be_piloted_says_why(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PilotError, match=message):
        _pilot(tiny_llama(num_layers=LAYERS), **options)


def test_what_cannot_be_learnt_is_no_pilot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels without any pattern: held-out rows gain nothing."""
    rng = random.Random(3)
    rows = [Row(tuple(ids), tuple(ids)) for ids in ([rng.randrange(61) for _ in range(9)] for _ in range(40))]
    monkeypatch.setattr(pilots, "FIRST_RATE", 1e-5)
    with pytest.raises(PilotError, match="did not improve the held-out loss beyond its noise"):
        _pilot(tiny_llama(num_layers=LAYERS), rows)


def test_scoring_without_a_pilot_that_pays_goes_on_and_says_so_unless_one_is_demanded() -> None:
    model, rows = tiny_llama(num_layers=LAYERS), _rows()
    short = score_layers(model, rows, pilot=PilotSettings(run_tokens=1000))
    assert short.scores.gain_source == "forward" and short.scores.pilot is None
    assert "from the forward pass alone: a run of 1,000 tokens is too short" in short.notes[0]
    with pytest.raises(ValueError, match="no pilot can be run: a run of .*Set `pilot: auto`"):
        score_layers(model, rows, pilot=PilotSettings(run_tokens=1000, required=True))


def test_scoring_with_a_pilot_uses_its_exponent_and_has_a_narrower_band() -> None:
    model, rows = tiny_llama(num_layers=LAYERS), _rows()
    plain, piloted = (score_layers(model, rows, batch_tokens=120, pilot=pilot).scores for pilot in (None, LONG))
    assert piloted.gain_source == "pilot" and piloted.pilot is not None
    assert piloted.exponent == pytest.approx(piloted.pilot.exponent / SHORTER)
    assert piloted.retention_low and piloted.retention_high and plain.retention_low and plain.retention_high
    width = [np.log(s.retention_low[3]) / np.log(s.retention_high[3]) for s in (plain, piloted)]  # factor squared
    assert width[1] < width[0]


def test_memory_that_runs_out_starts_the_pilot_again_with_smaller_batches() -> None:
    model, told = tiny_llama(num_layers=LAYERS), list[str]()

    def allocate(_module: nn.Module, args: tuple[Any, ...]) -> None:
        if args[0].shape[0] > 2:
            raise torch.OutOfMemoryError("no memory for this batch")

    hook = model.model.layers[5].register_forward_pre_hook(allocate)
    try:
        _pilot(model, settings=PilotSettings(run_tokens=1e6, say=told.append))
    finally:
        hook.remove()
    assert told[0] == "out of memory; the pilot starts again with 60 tokens at a time"


def test_a_point_that_contradicts_the_curve_widens_the_band_to_it() -> None:
    """Half of the layers got worse in their pilot: a curve through the other point alone must not promise them much."""
    layers = 12
    share_L = np.full(layers, 1 / layers)
    rows = np.ones(16)
    size = Size(steps=15, rows_per_step=8, cost=1.0)

    def band(half: float) -> float:
        arms = [
            Arm(12, 0.0, 4 * rows),
            Arm(10, 1e-3, 3.5 * rows),
            Arm(6, 1e-3, half * rows),
            Arm(0, 1e-3, 3 * rows),
        ]
        found = curve_of(
            arms, share_L=share_L, scored=16, size=size, rows=48, run_tokens=1e3, seed=0, seconds=0.0
        ).exponent
        return float(gains.still_to_do(share_L)[6] ** (found.high))

    consistent, contradicted = band(3.25), band(4.1)
    assert consistent > 0.5 > 0.05 > contradicted
