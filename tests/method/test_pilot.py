"""The pilot: what it costs, what it measures, what it leaves behind, and why it may not run."""

from __future__ import annotations

import math
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

from axolotl_layersel.method import pilot as pilots
from axolotl_layersel.method.calibration import Row
from axolotl_layersel.method.low_rank import low_rank_adapters
from axolotl_layersel.method.pilot import PilotSettings, run_pilot
from axolotl_layersel.method.pilot_rates import (
    FAR_ENOUGH,
    FIRST_STEP_POWER,
    FIRST_STEPS,
    first_step_factor,
    rate_ratio,
    usual_rate,
)
from axolotl_layersel.method.pilot_result import Arm, result_of
from axolotl_layersel.method.pilot_size import (
    LEAST_STEPS,
    MOST_EPOCHS,
    Size,
    Work,
    least_cost,
    pilot_cut,
    pilot_size,
    switched_off_cuts,
)
from axolotl_layersel.method.pilot_training import PilotError, Trainer, frozen, rate_at
from axolotl_layersel.method.retention import pilot_law
from axolotl_layersel.method.score_layers import score_layers
from axolotl_layersel.model.decoder_stack import find_stack
from axolotl_layersel.plan_parts import Pilot

LAYERS = 6
LONG = PilotSettings(run_tokens=1e6)


def _rows(count: int = 48, seed: int = 0) -> list[Row]:
    """Rows that count up in steps of 7 from a random start: something that a few steps can learn."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        start, length = rng.randrange(VOCABULARY), rng.randrange(8, 15)
        ids = [1 + (start + 7 * i) % (VOCABULARY - 1) for i in range(length)]
        rows.append(Row(tuple(ids), tuple(-100 if i < 2 else t for i, t in enumerate(ids))))
    return rows


def _pilot(model: nn.Module, rows: list[Row] | None = None, **options: Any) -> Pilot:
    values: dict[str, Any] = {"settings": LONG, "seed": 1, "batch_tokens": 120, **options}
    return run_pilot(model, find_stack(model), rows or _rows(), **values)


@pytest.fixture(scope="module")
def found() -> Pilot:
    return _pilot(tiny_llama(num_layers=LAYERS))


def test_it_trains_a_sixth_a_half_and_all_layers_and_all_learn(found: Pilot) -> None:
    every, half, sixth = found.cuts
    assert (every.first_trainable, half.first_trainable, sixth.first_trainable) == (0, 3, 5)
    assert max(every.loss, half.loss) < sixth.loss < found.base_loss
    gain = found.base_loss - every.loss
    assert every.retention == 1.0
    for part in (half, sixth):
        assert part.retention == pytest.approx((found.base_loss - part.loss) / gain)
    assert (found.rows, found.heldout_rows) == (36, 12)
    assert found.cost_share <= LONG.share


def test_what_is_left_with_adapters_switched_off_falls_towards_the_output(found: Pilot) -> None:
    left = [found.switched_off[cut] for cut in (2, 3, 4, 5)]
    assert list(found.switched_off) == [2, 3, 4, 5]
    assert 1.0 > left[0] > left[-1]


def test_adapters_below_a_cut_are_switched_off_by_starting_there(trainer: Trainer) -> None:
    """The same losses as those of a model whose lower adapters are gone."""
    trainer.keep_states(3, trainer.heldout)
    drawn = low_rank_adapters(trainer.stack, first_trainable=0, seed=0)
    with drawn as parameters:
        for number, up in enumerate(parameters[1::2]):
            torch.manual_seed(number)
            up.data.normal_(0, 0.1)
        started, whole = trainer.heldout_losses(3), trainer.heldout_losses(0)
        for up in parameters[1 : len(parameters) // 2 : 2]:  # layers 0..2 of 6
            up.data.zero_()
        silenced = trainer.heldout_losses(0)
    np.testing.assert_allclose(started, silenced, rtol=1e-5)
    assert not np.allclose(started, whole, rtol=1e-3)


def test_a_pilot_that_the_run_hardly_pays_for_leaves_out_the_half(found: Pilot) -> None:
    settings = PilotSettings(run_tokens=LONG.run_tokens, share=found.cost_share * 0.9)
    short = _pilot(tiny_llama(num_layers=LAYERS), settings=settings)
    assert [cut.first_trainable for cut in short.cuts] == [0, 5]
    assert short.cost_share <= settings.share


def test_all_trainings_take_the_rate_that_follows_from_the_first_step() -> None:
    told: list[str] = []
    settings = PilotSettings(run_tokens=1e6, say=told.append)
    every, half, sixth = _pilot(tiny_llama(num_layers=LAYERS), settings=settings).cuts
    said = next(float(line.split()[6]) for line in told if line.startswith("pilot, rate by the first step"))
    assert every.learning_rate == pytest.approx(said, rel=0.05)
    assert half.learning_rate == pytest.approx(every.learning_rate * rate_ratio(3, LAYERS))
    assert sixth.learning_rate == pytest.approx(every.learning_rate * rate_ratio(5, LAYERS))


def test_a_model_whose_first_step_may_not_go_far_is_trained_at_a_lower_rate() -> None:
    """Inputs of the last layer that are ten times as large let each entry of an adapter move a tenth as far."""
    model = tiny_llama(num_layers=LAYERS)
    usual = _pilot(model).cuts[1].learning_rate
    with torch.no_grad():
        for norm in (model.model.layers[-1].input_layernorm, model.model.layers[-1].post_attention_layernorm):
            norm.weight.mul_(10)
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(model.model.layers[-1].self_attn, name).weight.div_(10)
        for name in ("gate_proj", "up_proj"):
            getattr(model.model.layers[-1].mlp, name).weight.div_(10)
    assert _pilot(model).cuts[1].learning_rate < 0.7 * usual


def test_the_first_step_is_that_of_the_optimizer(trainer: Trainer) -> None:
    rates = [1e-3, 1e-2]
    found = trainer.after_first_step(0, rates, seed=0, indices=trainer.heldout)
    for rate, losses_H in zip(rates, found, strict=True):
        with low_rank_adapters(trainer.stack, first_trainable=0, seed=0) as parameters:
            optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
            assert trainer._step(0, next(trainer.order(1, 0)), parameters, optimizer)
            np.testing.assert_allclose(losses_H, trainer.heldout_losses(0), rtol=1e-3)
    assert found[1].sum() < found[0].sum() < trainer.heldout_losses(0).sum()


def test_the_rate_falls_where_the_first_step_may_not_go_far_and_never_rises() -> None:
    def factor(best: float) -> float:
        return first_step_factor({length: 1 - math.log(length / best) ** 2 for length in FIRST_STEPS})

    assert factor(FAR_ENOUGH) == pytest.approx(1.0)
    assert factor(FAR_ENOUGH / 4) == pytest.approx(0.25**FIRST_STEP_POWER)
    assert factor(0.3) == pytest.approx((0.3 / FAR_ENOUGH) ** FIRST_STEP_POWER)
    assert factor(1e-3) == factor(1e-4) == pytest.approx((FIRST_STEPS[0] / FAR_ENOUGH) ** FIRST_STEP_POWER)
    assert factor(10.0) == factor(1e3) == 1.0


@pytest.mark.parametrize("beyond", [-math.inf, math.nan])
def test_a_first_step_that_breaks_the_model_is_not_taken(beyond: float) -> None:
    gains = dict.fromkeys(FIRST_STEPS, beyond) | {FIRST_STEPS[0]: 0.1, FIRST_STEPS[1]: 0.2}
    assert first_step_factor(gains) == pytest.approx((FIRST_STEPS[1] / FAR_ENOUGH) ** FIRST_STEP_POWER)


def test_the_usual_rate_falls_with_the_width_and_rises_as_fewer_layers_are_trained() -> None:
    assert usual_rate(576) == pytest.approx(3e-3) and usual_rate(4 * 576) == pytest.approx(1.5e-3)
    assert rate_ratio(0, 30) == rate_ratio(0, 30, adapters=False) == 1.0
    assert rate_ratio(15, 30) == pytest.approx(2**0.25)
    assert rate_ratio(15, 30) < rate_ratio(15, 30, adapters=False) < 2


def test_equal_inputs_give_equal_pilots(found: Pilot) -> None:
    assert _pilot(tiny_llama(num_layers=LAYERS)) == found


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
    result = _pilot(model, autocast=torch.bfloat16 if kind == "bfloat16" else None)
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


def test_recomputing_layers_changes_no_number(found: Pilot) -> None:
    again = _pilot(tiny_llama(num_layers=LAYERS), settings=PilotSettings(run_tokens=1e6, checkpointing=True))
    for cut, other in zip(found.cuts, again.cuts, strict=True):
        assert cut.loss == pytest.approx(other.loss, rel=1e-6)


@pytest.mark.slow
def test_small_batches_change_no_number_but_by_rounding(found: Pilot) -> None:
    again = _pilot(tiny_llama(num_layers=LAYERS), batch_tokens=15)
    for cut, other in zip(found.cuts, again.cuts, strict=True):
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
    trainer.keep_states(2, trainer.heldout)
    trainer.keep_states(4, trainer.heldout)  # from what was kept for 2
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
    trainer.keep_states(3, trainer.heldout)
    before = trainer.heldout_losses(3)
    for row in trainer.heldout:
        trainer._entering[3][row] = trainer._entering[3][row].flip(-1)
    assert not np.allclose(before, trainer.heldout_losses(3), rtol=1e-3)


def test_a_rate_that_is_far_too_high_diverges_and_is_not_chosen(trainer: Trainer) -> None:
    trainer.keep_states(5, range(len(trainer.rows)))
    calm, wild = (trainer.trained(5, learning_rate=rate, steps=6, seed=0)[0].sum() for rate in (5e-3, 1e3))
    assert calm < wild or not np.isfinite(wild)


def test_the_schedule_warms_up_and_ends_near_zero() -> None:
    rates = [rate_at(step, 20) for step in range(20)]
    assert rates[0] == pytest.approx(1 / 3) and max(rates) == 1.0 == rates[2]
    assert rates[-1] < 0.01


@pytest.mark.parametrize(
    ("layers", "cuts"), [(30, [8, 15, 20, 25]), (12, [3, 6, 8, 10]), (6, [2, 3, 4, 5]), (3, [1, 2]), (2, [1])]
)
def test_the_cuts_lie_at_a_quarter_half_two_thirds_and_five_sixths(layers: int, cuts: list[int]) -> None:
    assert switched_off_cuts(layers) == cuts
    assert pilot_cut(layers) == cuts[-1]


def _work(**other: float) -> Work:
    values = {"num_layers": 12, "head_layers": 1.0, "row_tokens": 100.0, "rows": 128, "step_passes": 2.0}
    return Work(**{**values, **other})  # type: ignore[arg-type]


def test_a_pilot_is_as_long_as_its_budget_allows_and_never_costs_more() -> None:
    work, budgets = _work(), range(0, 2_000_000, 1_000)
    sizes = [pilot_size(budget, work) for budget in budgets]
    assert sizes[0] is None and sizes[-1] is not None
    assert sizes[-1].steps == MOST_EPOCHS * 104 / 8
    for budget, size in zip(budgets, sizes, strict=True):
        if size is None:
            assert least_cost(work) > budget
        else:
            rows, half = size.rows_per_step, size.with_half
            assert size.cost == work.cost(size.steps, rows, 24, with_half=half) <= budget
            longer = work.cost(size.steps + 1, rows, 24, with_half=half)
            assert size.steps * rows > MOST_EPOCHS * 104 - rows or longer > budget
            # The half is left out only where it would leave too few steps.
            assert half == (work.cost(LEAST_STEPS, 8, 24, with_half=True) <= budget)
    assert {size.rows_per_step for size in sizes if size} == {6, 7, 8}
    assert {size.heldout_rows for size in sizes if size} == {24}


def test_few_rows_are_enough_for_a_half_where_the_run_pays() -> None:
    size = pilot_size(1e9, _work(rows=48))
    assert size and size.with_half and size.steps * 8 <= MOST_EPOCHS * 36
    assert not pilot_size(1e9, _work(num_layers=2)).with_half  # type: ignore[union-attr]  # one layer is both


def test_more_calibration_rows_take_no_pilot_away() -> None:
    few, many = _work(), _work(rows=512)
    for budget in range(0, 400_000, 1_000):
        with_few, with_many = pilot_size(budget, few), pilot_size(budget, many)
        assert (with_few is None) == (with_many is None)
        if with_few and with_many:
            assert with_many.heldout_rows in (24, 96)
    assert with_many and with_many.heldout_rows == 96  # where it pays


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_planned_cost_is_that_of_the_layers_that_run(checkpointing: bool) -> None:
    """Counted: positions of every layer's and the unembedding's forward pass, doubled where a backward pass follows."""
    ids = (1, 2, 3, 4) * 3
    model, rows = tiny_llama(num_layers=LAYERS), [Row(ids, (-100,) * 6 + ids[6:]) for _ in range(48)]
    settings = PilotSettings(run_tokens=1e6, checkpointing=checkpointing)
    head_layers = pilots.head_size(find_stack(model))[1]
    whole, passes = LAYERS + head_layers, 0.0

    def count(layers: float) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal passes
            states = args[0] if args else kwargs["hidden_states"]
            passes += (
                states.shape[0] * states.shape[1] / len(ids) * layers / whole * (2 if torch.is_grad_enabled() else 1)
            )

        return hook

    # A layer that is passed over is called as well, its attention is not.
    hooks = [layer.self_attn.register_forward_pre_hook(count(1), with_kwargs=True) for layer in model.model.layers]
    hooks.append(model.lm_head.register_forward_pre_hook(count(head_layers), with_kwargs=True))
    try:
        result = _pilot(model, rows, batch_tokens=96, settings=settings)
    finally:
        for hook in hooks:
            hook.remove()
    planned = result.cost_share * settings.run_tokens * (2 + checkpointing) / 12
    # With checkpointing a layer is called twice as often with gradients, and the unembedding is not.
    assert passes == pytest.approx(planned * (4 / 3 if checkpointing else 1), rel=0.1 if checkpointing else 0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"settings": PilotSettings(run_tokens=5000)},
            r"a run of 5,000 tokens is too short .*raise pilot_share to 0\.",
        ),
        ({"settings": PilotSettings(run_tokens=500)}, r"a run of 500 tokens is too short .*the smallest costs [1-9]\."),
        ({"rows": _rows(20)}, "20 calibration rows .* are too few, at least 40"),
        ({"autocast": torch.float16}, "float16; use bf16"),
    ],
)
def test_what_cannot_be_piloted_says_why(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PilotError, match=message):
        _pilot(tiny_llama(num_layers=LAYERS), **options)


def test_the_share_that_a_run_too_short_is_told_pays_for_a_pilot() -> None:
    with pytest.raises(PilotError) as error:
        _pilot(tiny_llama(num_layers=LAYERS), settings=PilotSettings(run_tokens=5000))
    share = float(str(error.value).split("raise pilot_share to ")[1].split()[0])
    found = _pilot(tiny_llama(num_layers=LAYERS), settings=PilotSettings(run_tokens=5000, share=share))
    assert 0 < share - found.cost_share < 1e-3


def test_what_cannot_be_learnt_is_no_pilot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels without any pattern: held-out rows gain nothing."""
    rng = random.Random(3)
    rows = [Row(tuple(ids), tuple(ids)) for ids in ([rng.randrange(61) for _ in range(9)] for _ in range(48))]
    monkeypatch.setattr(pilots, "usual_rate", lambda width: 1e-5)
    with pytest.raises(PilotError, match="did not improve the held-out loss beyond its noise"):
        _pilot(tiny_llama(num_layers=LAYERS), rows)


def test_scoring_without_a_pilot_that_pays_goes_on_and_says_so_unless_one_is_demanded() -> None:
    model, rows = tiny_llama(num_layers=LAYERS), _rows()
    short = score_layers(model, rows, pilot=PilotSettings(run_tokens=1000))
    assert short.scores.gain_source == "forward" and short.scores.pilot is None
    assert "from the forward pass alone: a run of 1,000 tokens is too short" in short.notes[0]
    with pytest.raises(ValueError, match="no pilot can be run: a run of .*Set `pilot: auto`"):
        score_layers(model, rows, pilot=PilotSettings(run_tokens=1000, required=True))


def test_scoring_with_a_pilot_goes_through_its_point_and_has_a_narrower_band() -> None:
    model, rows = tiny_llama(num_layers=LAYERS), _rows()
    plain, piloted = (score_layers(model, rows, batch_tokens=120, pilot=pilot).scores for pilot in (None, LONG))
    assert piloted.gain_source == "pilot" and piloted.pilot is not None and piloted.exponent is None
    assert piloted.retention == pilot_law(piloted.pilot).curve(np.array(piloted.descent)).tolist()
    assert piloted.retention_low and piloted.retention_high and plain.retention_low and plain.retention_high
    width = [np.log(s.retention_low[3]) / np.log(s.retention_high[3]) for s in (plain, piloted)]  # factor squared
    assert width[1] < width[0]


@pytest.mark.slow
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


def _result(whole: float, part: float, *, noise: float = 0.0) -> Pilot:
    """16 held-out rows of one token, at 4 nats before training."""
    ones, wave = np.ones(16), noise * (-1.0) ** np.arange(16)
    return result_of(
        4 * ones,
        Arm(0, 1e-3, whole * ones),
        [Arm(10, 2e-3, part * ones + wave)],
        {6: 3.2 * ones, 10: 3.6 * ones},
        scored=16,
        size=Size(steps=15, rows_per_step=8, heldout_rows=24, cost=1.0),
        rows=48,
        cost_share=0.01,
        seed=0,
    )


def test_the_noise_of_held_out_rows_is_that_of_a_mean() -> None:
    sure, noisy = _result(3.0, 3.5), _result(3.0, 3.5, noise=0.4)
    assert sure.cuts[1].retention == noisy.cuts[1].retention == pytest.approx(0.5)
    assert sure.switched_off == {6: pytest.approx(0.8), 10: pytest.approx(0.4)}
    assert sure.cuts[1].retention_stderr == pytest.approx(0.0, abs=1e-12)
    assert noisy.cuts[1].retention_stderr == pytest.approx(0.4 / 4, rel=0.15)  # 0.4 over the root of 16 rows
    assert pilot_law(noisy).factor > pilot_law(sure).factor


def test_trainings_that_diverged_or_learnt_nothing_are_no_pilot() -> None:
    with pytest.raises(PilotError, match="training diverged"):
        _result(float("inf"), 3.5)
    with pytest.raises(PilotError, match=r"15 steps did not improve .*\(4.000 to 4.000 nats\)"):
        _result(4.0, 3.5)
