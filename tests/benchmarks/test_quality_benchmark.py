"""The quality benchmark: masks, rates, cut grid, frozen prefix, and figures of merit on made-up evidence."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks" / "quality"
sys.path.insert(0, str(FOLDER))

import evidence  # noqa: E402
import merits  # noqa: E402
import oracle  # noqa: E402
import pretrain  # noqa: E402
import students  # noqa: E402
import tasks  # noqa: E402


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return pretrain.train_tokenizer(["one two three four five six seven eight nine ten\n" * 20], vocab_size=300)


def made_up_pair(exponent: float, *, model: str = "m", task: str = "t", layers: int = 6) -> evidence.Pair:
    """A pair whose measured retention follows equal weights and `exponent` exactly, with an improvement of 2 nats."""
    kept = (1 - np.arange(layers) / layers) ** exponent
    rows = {"cosine": [[1.0] * (layers + 1)] * 4, "tokens": [[1.0]] * 4}
    losses = {k: {0: 5.0 - 2.0 * float(r)} for k, r in enumerate(kept)}
    signals = {"rows": rows, "layers": {"spectrum": [1.0] * layers}}
    return evidence.Pair(model, task, layers, 5.0, list(range(layers)), losses, {}, {}, {}, signals)


def test_only_the_answer_carries_labels(tokenizer: Any) -> None:
    example = tasks.Example(tasks.alpaca("one two"), "three four five six seven eight nine ten " * 3, "0")
    row = tasks.tokenize(example, tokenizer, max_length=500)
    assert row is not None
    ids, labels = row
    answered = [token for token in labels if token != tasks.IGNORED]
    assert tokenizer.decode(answered) == example.answer + pretrain.END
    assert tokenizer.decode(ids[: len(ids) - len(answered)]) == example.prompt


def test_a_row_without_room_for_an_answer_is_dropped(tokenizer: Any) -> None:
    example = tasks.Example("one two three " * 50, "four five six seven eight nine ten " * 5, "0")
    prompt = len(tokenizer(example.prompt)["input_ids"])
    assert tasks.tokenize(example, tokenizer, max_length=prompt + tasks.MIN_ANSWER - 1) is None


def test_code_task_shows_the_docstring_and_hides_the_body() -> None:
    example = next(tasks.code())
    assert "def " in example.prompt and '"""' in example.prompt
    assert example.answer.strip() and example.answer not in example.prompt


def test_bigram_beats_unigram_on_alternating_text() -> None:
    stream = torch.tensor([0, 1] * 500, dtype=torch.int32)
    unigram, bigram = pretrain.ngram_losses(stream, stream, vocab_size=2)
    assert unigram == pytest.approx(np.log(2), abs=1e-3)
    assert bigram == pytest.approx(-np.log(0.95 + 0.05 * 0.5), abs=1e-3)


@pytest.mark.parametrize(("layers", "points"), [(12, 8), (24, 9), (4, 8), (32, 9)])
def test_grid_starts_at_all_layers_and_ends_with_the_last(layers: int, points: int) -> None:
    cuts = oracle.grid(layers, points)
    assert cuts[0] == 0 and cuts[-1] == layers - 1 and cuts == sorted(set(cuts)) and len(cuts) <= points


class Bowl(oracle.Sweep):
    """A sweep whose loss is a bowl around the rate `best`, 5 nats below the base, and breaks down above `breaks`."""

    best, breaks = 1e-2, math.inf

    def base_loss(self) -> float:
        return 10.0

    def loss(self, kind: str, index: int, learning_rate: float, seed: int, steps: int | None = None) -> float:
        self.asked = [*getattr(self, "asked", []), learning_rate]
        return 9.9 if learning_rate > self.breaks else 5 + float(np.log(learning_rate / self.best) ** 2)


@pytest.fixture
def bowl(tmp_path: Path) -> Bowl:
    model = pretrain.build_model("llama", size="quick", vocab_size=50, seed=0)
    data, runs = tasks.Rows(train=[], heldout=[]), oracle.Runs(tmp_path / "runs.jsonl")
    return Bowl("m", "t", model=model, data=data, cuts=[0, 3, 6, 9, 11], runs=runs, steps=1, rows=1)


@pytest.mark.parametrize("best", [5e-4, 3e-3, 0.018, 0.2])
def test_the_tuned_rate_was_measured_and_is_within_half_a_step(bowl: Bowl, best: float) -> None:
    bowl.best = best
    found = bowl.tuned_rate("cut", 0)
    assert found in bowl.asked and len(bowl.asked) <= 7
    assert max(found / best, best / found) < 1.83


def test_of_rates_as_good_as_each_other_the_lowest_is_taken(bowl: Bowl) -> None:
    assert bowl.lowest_good({1e-3: 7.0, 1e-2: 5.04, 2e-2: 5.0, 3e-2: 9.0}) == 1e-2


def test_an_interpolated_rate_that_diverges_is_halved(bowl: Bowl) -> None:
    bowl.breaks = 9e-3
    rates = bowl.rates()
    assert set(rates) == set(range(12)) and all(rates[cut] <= 9e-3 for cut in bowl.cuts)


@pytest.mark.parametrize("arch", ["llama", "neox"])
def test_upper_layers_on_cached_states_are_the_whole_model(arch: str) -> None:
    model = pretrain.build_model(arch, size="quick", vocab_size=50, seed=0)
    model.config.use_cache = False
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length in (9, 5, 7):
        ids = torch.randint(0, 50, (length,), generator=generator).tolist()
        rows.append((ids, [tasks.IGNORED] * 2 + ids[2:]))
    cached = students.cache_states(model, rows, [0, 5, 11])
    for cut in (0, 5, 11):
        students.check_upper_part(model, rows, cached, cut)


@pytest.mark.parametrize("arch", ["llama", "neox"])
def test_single_layer_run_trains_that_layer_alone(arch: str) -> None:
    model = pretrain.build_model(arch, size="quick", vocab_size=50, seed=0)
    model.config.use_cache = False
    student = students.trainable(model, kind="single", cut=8, seed=0)
    names = [name for name, parameter in student.named_parameters() if parameter.requires_grad]
    assert names and all(".layers.0." in name for name in names)
    everything = students.trainable(model, kind="cut", cut=8, seed=0)
    found = {name.split(".layers.")[1].split(".")[0] for name, p in everything.named_parameters() if p.requires_grad}
    assert found == {"0", "1", "2", "3"}


def test_known_exponent_is_recovered() -> None:
    pairs = [made_up_pair(0.15, task=task) for task in "abc"]
    assert merits.fit_constant(pairs, "uniform")(pairs[0]) == pytest.approx(0.15, abs=1e-4)
    assert merits.calibration(pairs, "uniform", lambda rest: merits.fit_constant(rest, "uniform"))["mae"] < 1e-4


def test_left_out_pair_has_no_part_in_its_exponent() -> None:
    pairs = [made_up_pair(0.1, task="a"), made_up_pair(0.1, task="b"), made_up_pair(0.4, task="c")]
    left = {p.task: b for p, b in merits.leave_out(pairs, "task", lambda rest: merits.fit_constant(rest, "uniform"))}
    assert left["c"] == pytest.approx(0.1, abs=1e-4)


def test_best_cuts_take_depth_from_where_it_matters_least() -> None:
    steep, flat = made_up_pair(0.5, task="steep"), made_up_pair(0.01, task="flat")
    assert merits.best_cuts([steep, flat], 0.75) == [1, 5]
    assert merits.best_cuts([steep, flat], 1.0) == [0, 0]
    longer = made_up_pair(0.5, task="longer", layers=8)
    cuts = merits.best_cuts([steep, longer], 0.8)
    spent = [merits.step_cost(steep, cuts[0]), merits.step_cost(longer, cuts[1])]
    assert sum(spent) / 2 <= 0.8


def test_what_one_seed_knows_is_judged_by_the_others() -> None:
    pair, other = made_up_pair(0.1, task="a"), made_up_pair(0.3, task="b")
    for p in (pair, other):  # the second seed has the curve of the other task
        p.losses.update({k: {0: p.losses[k][0]} for k in p.cuts})
    for k in pair.cuts:
        pair.losses[k][1], other.losses[k][1] = other.losses[k][0], pair.losses[k][0]
    known, fixed = merits.across_seeds([pair, other], 0.75)
    assert known < fixed


def test_evidence_is_read_from_the_lines_of_the_sweep(tmp_path: Path) -> None:
    common = {"model": "m", "task": "t", "seed": 0, "steps": 10, "kind": "cut", "learning_rate": 0.1}
    lines: list[dict[str, Any]] = [
        {**common, "kind": "base", "index": -1, "steps": 0, "loss": 5.0},
        {**common, "index": 0, "loss": 3.0},
        {**common, "kind": "tune-cut", "index": 0, "loss": 2.5},
        {**common, "index": 1, "loss": 4.0},
    ]
    (tmp_path / "runs.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    (tmp_path / "signals").mkdir()
    signals = {"model": "m", "task": "t", "rows": {}, "layers": {"spectrum": [1.0, 1.0]}}
    (tmp_path / "signals" / "m-t.json").write_text(json.dumps(signals), encoding="utf-8")
    (pair,) = evidence.load(tmp_path)
    assert pair.retention(1) == pytest.approx(0.5)
