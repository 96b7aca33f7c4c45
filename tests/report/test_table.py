"""The table, the sentences and the model card section."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from plans import cached, given_plan, prediction, sample, scored_plan
from rich.console import Console

from axolotl_layersel.plan import Plan
from axolotl_layersel.plan_parts import Scores
from axolotl_layersel.report.model_card import add_to_model_card, model_card_section
from axolotl_layersel.report.table import print_plan
from axolotl_layersel.report.wording import (
    dataset_name,
    layer_range,
    model_name,
    per_cut,
    printable,
    shares,
    summary,
)

FOUR = scored_plan(num_layers=4, first_trainable=1)


def plan_text(plan: Plan, *, width: int = 80, ascii_only: bool = False) -> str:
    """The table as a log file gets it, without blanks at line ends."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii" if ascii_only else "utf-8", errors="replace", newline="\n")
    print_plan(plan, console=Console(file=stream, width=width, no_color=True, force_terminal=False))
    stream.seek(0)
    return "".join(f"{line.rstrip()}\n" for line in stream.read().splitlines())


def rows(text: str) -> list[str]:
    return [line for line in text.splitlines() if re.match(r" *\d+ ", line)]


def test_the_whole_text_of_a_small_plan() -> None:
    plan = Plan(
        base_model="acme/tiny",
        adapter="lora",
        num_layers=2,
        first_trainable=1,
        options={"policy": "coverage", "coverage": 0.75},
        scores=Scores(
            deviation=[0.99, 0.8, 0.4],
            deviation_stderr=[0.01, 0.01, 0.01],
            descent=[0.2, 0.8],
            retention=[1.0, 0.8],
            stability={0: 0.1, 1: 0.9},
            row_cuts={1: 128},
            tokens=1000,
        ),
        prediction=replace(prediction(num_layers=2, first_trainable=1), gradient_checkpointing=False),
        sample=sample("acme/chat"),
    )
    assert plan_text(plan) == (
        "acme/tiny, LoRA, acme/chat\n"
        "\n"
        "layer   deviation              descent                kept from here\n"
        "──────────────────────────────────────────────────────────────────────────────\n"
        "    0   0.800 ██████████████   0.200 ███▌                      1.000   frozen\n"
        "\n"
        "    1   0.400 ███████          0.800 ██████████████            0.800   trained\n"
        "\n"
        "cut        first trainable layer 1 of 0 to 1, by coverage 0.75; predicted to\n"
        "           keep 0.800 of the improvement. 0.90 of the resamples choose it (0.10\n"
        "           choose 0).\n"
        "trained    layer 1 (1 of 2), LoRA; layer 0 is frozen.\n"
        "predicted  FLOPs of a step 0.73, FLOPs of its backward pass 0.56, activation\n"
        "           memory 0.54, trainable parameters and optimizer state 0.50 of\n"
        "           training every layer, without gradient checkpointing. No cut brings a\n"
        "           step below 0.46.\n"
        "again      layersel: {first_layer: 1}   (scores nothing)\n"
    )


@pytest.mark.parametrize("plan", [FOUR, scored_plan(num_layers=80), scored_plan(num_layers=1), given_plan()])
@pytest.mark.parametrize("ascii_only", [False, True])
def test_text_fits_80_columns_and_has_no_escapes(plan: Plan, ascii_only: bool) -> None:
    text = plan_text(plan, width=80, ascii_only=ascii_only)
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text and "…" not in text
    assert text.isascii() or not ascii_only


def test_every_layer_has_a_row_and_its_numbers() -> None:
    plan = scored_plan(num_layers=80, first_trainable=60)
    assert plan.scores
    listed = rows(plan_text(plan))
    assert len(listed) == 80
    for i, row in enumerate(listed):
        scores = plan.scores
        values = [
            f"{x:.3f}"
            for x in (scores.deviation[i + 1], scores.descent[i], scores.retention[i], (scores.retention_low or [])[i])
        ]
        assert re.findall(r"\d\.\d{3}", row) == values and row.startswith(f"{i:>5} ")
        assert row.endswith("trained" if i >= 60 else "frozen")


def test_bars_are_in_proportion_and_start_at_zero() -> None:
    listed = rows(plan_text(FOUR, ascii_only=True))
    assert FOUR.scores
    deviation, gain = FOUR.scores.deviation, FOUR.scores.descent
    for i, row in enumerate(listed):
        bars = [part.count("#") for part in re.split(r"\d\.\d{3}", row)[1:3]]
        largest = max(deviation[1:]), max(gain)
        values = deviation[i + 1], gain[i]
        assert bars == [round(14 * value / of) for value, of in zip(values, largest, strict=True)]


def test_deviations_in_nats_fit_as_well() -> None:
    plan = scored_plan(num_layers=3, scores={"deviation": [12.5, 11.25, 9.0, 2.0], "deviation_stderr": [0.1] * 4})
    text = plan_text(plan)
    assert " 9.000 " in text and "11.250 " in text and max(map(len, text.splitlines())) <= 80


def test_a_given_cut_lists_ranges() -> None:
    text = plan_text(given_plan(num_layers=12, first_trainable=5))
    assert re.search(r"^ *0 - 4 +frozen$", text, re.M) and re.search(r"^ *5 - 11 +trained$", text, re.M)
    assert "given, nothing was scored" in text and "no cost is known" in text
    assert "frozen" not in plan_text(given_plan(num_layers=3, first_trainable=0))


def test_a_terminal_gets_colour_and_a_file_none() -> None:
    for terminal in (True, False):
        stream = io.StringIO()
        console = Console(file=stream, force_terminal=terminal or None, width=80, _environ={"TERM": "xterm-256color"})
        print_plan(FOUR, console=console)
        assert ("\x1b[" in stream.getvalue()) is terminal


def test_notes_follow_the_lines() -> None:
    text = plan_text(scored_plan(num_layers=4, notes=["first note", "second " + "note " * 40]))
    assert text.index("again ") < text.index("note       first note") < text.index("note       second note")


def test_texts_of_a_plan_cannot_command_the_terminal() -> None:
    """A plan is a file from elsewhere; rich markup and escape sequences in it are shown, not obeyed."""
    evil = "\x1b]0;title\x07[red]name[/red]\u202e\r\n"
    plan = scored_plan(
        num_layers=2,
        base_model=evil,
        notes=[evil],
        options={"policy": evil},
        sample=sample(evil),
        prediction=prediction(num_layers=2, first_trainable=1, why=evil),
    )
    stream = io.StringIO()
    print_plan(plan, console=Console(file=stream, force_terminal=True, width=100, color_system=None))
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202e]", stream.getvalue())
    assert stream.getvalue().count("[red]name[/red]") >= 4


def test_the_cut_says_what_the_resamples_choose() -> None:
    shaky = scored_plan(num_layers=4, first_trainable=1, scores={"stability": {0: 0.4, 1: 0.3, 2: 0.3}})
    assert "0.30 of the resamples choose it (0.40 choose 0, 0.30 choose 2)." in summary(shaky)["cut"]
    never = scored_plan(num_layers=4, first_trainable=1, scores={"stability": {2: 1.0}})
    assert "0.00 of the resamples choose it (1.00 choose 2)." in summary(never)["cut"]


def test_what_is_predicted() -> None:
    assert summary(FOUR)["predicted"].endswith(
        "of training every layer, with gradient checkpointing. No cut brings a step below 0.46."
    )
    why = scored_plan(
        num_layers=4, prediction=prediction(num_layers=4, first_trainable=1, why="Embeddings are trained.")
    )
    assert summary(why)["predicted"].endswith("below 0.46. Embeddings are trained.")
    assert summary(given_plan())["predicted"] == "no cost is known for this plan."


def test_a_run_with_a_prefix_cache_says_what_it_saves_and_holds() -> None:
    lines = summary(cached(FOUR))
    assert lines["cache"] == (
        "FLOPs of the whole run 0.81 of training every layer (0.86 without a prefix cache): 0.86 in the first epoch, "
        "filling included, 0.79 in later ones, 3 epochs. States take 8.19 GB on disk. 3 GB of frozen weights leave the "
        "device."
    )
    assert lines["memory"] == (
        "5.53 GB at the peak of a step, 9 GB when every layer is trained: weights 4 GB (3 GB more left the device), "
        "gradients 10 MB, optimizer 20 MB, activations 1 GB, logits or recomputation 500 MB."
    )
    assert "States take 8192 bytes for each token on disk." in summary(cached(FOUR, tokens=None))["cache"]
    assert not {"cache", "memory"} & summary(FOUR).keys()


def test_a_run_with_a_prefix_cache_shows_the_whole_run_of_every_cut() -> None:
    for plan in (
        cached(FOUR),
        cached(scored_plan(num_layers=80)),
        cached(given_plan(prediction=prediction(num_layers=12, first_trainable=5))),
    ):
        text = plan_text(plan)
        assert max(map(len, text.splitlines())) <= 80 and "whole run" in text
        assert plan.prediction and plan.prediction.per_cut.whole_run
        shown = [float(row.split()[-2]) for row in rows(text) if row.endswith(("frozen", "trained"))]
        assert shown == pytest.approx(plan.prediction.per_cut.whole_run, abs=0.0051)


def test_what_is_trained() -> None:
    assert summary(scored_plan(num_layers=4, first_trainable=0, adapter=None))["trained"] == (
        "every decoder layer (4 of 4), full fine-tuning."
    )
    assert summary(scored_plan(num_layers=4, first_trainable=3, adapter="qlora"))["trained"] == (
        "layer 3 (1 of 4), QLoRA; layers 0 to 2 are frozen."
    )


def test_small_facts() -> None:
    assert layer_range(3, 3) == "layer 3" and layer_range(0, 3) == "layers 0 to 3"
    assert shares({"10": 1, "9": 3}) == {9: 0.75, 10: 0.25} and shares(None) == shares({}) == shares({"1": 0}) == {}
    assert list(shares({"10": 1, "9": 3})) == [9, 10]
    assert printable("a\x1b[0m\nb") == "a [0m b"
    assert per_cut(given_plan(), "step") is None
    assert per_cut(given_plan(prediction=prediction(num_layers=12, first_trainable=5)), "forward") == [1.0] * 12


def test_a_folder_s_name_is_shown_without_its_place() -> None:
    assert model_name(given_plan()) == "HuggingFaceTB/SmolLM2-135M"
    for path in ("/home/someone/models/mine", "./mine/", "~/mine", "../mine"):
        assert model_name(scored_plan(base_model=path)) == "mine"
        assert dataset_name(scored_plan(sample=sample(path, "acme/chat"))) == "mine, acme/chat"


def test_the_card_s_section_has_the_table_and_the_source() -> None:
    section = model_card_section(FOUR)
    assert section.startswith("## Layer selection\n")
    assert section.count("\n| ") == 1 + 4, "the head and a row for each layer"
    assert "| 0 | 0.864 | " in section and section.count(" trained |") == 3 and section.count(" frozen |") == 1
    assert "`layersel: {first_layer: 1}`" in section
    assert "Findings of ACL 2025. arXiv:2406.11753" in section
    assert "128 rows with 23456 scored tokens of `yahma/alpaca-cleaned`" in section
    assert "| layer |" not in model_card_section(given_plan())


def test_names_start_no_markup_in_a_card() -> None:
    evil = "x`<img src=x>[a](b)|"
    section = model_card_section(scored_plan(num_layers=2, base_model=evil, options={"policy": evil}))
    assert "<img" not in section.replace("\\<img", "") and not re.search(r"(?<!\\)\[a", section.split("`", 2)[2])
    assert "`x img src=x [a](b)`" in section


def test_a_card_gets_the_section_once(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    add_to_model_card(card, FOUR)
    assert not card.exists(), "no card is made where the trainer made none"
    card.write_text("---\nbase_model: x\n---\n# Model\n", encoding="utf-8")
    add_to_model_card(card, FOUR)
    once = card.read_text(encoding="utf-8")
    assert once.startswith("---\nbase_model: x\n---\n# Model\n\n<!-- layersel -->\n## Layer selection\n")
    add_to_model_card(card, FOUR)
    assert card.read_text(encoding="utf-8") == once
    card.write_text(once + "\n## Later\n", encoding="utf-8")
    add_to_model_card(card, given_plan(num_layers=4, first_trainable=2))
    changed = card.read_text(encoding="utf-8")
    assert (
        changed.count("## Layer selection") == 1 and "{first_layer: 2}" in changed and "{first_layer: 1}" not in changed
    )
    assert changed.endswith("<!-- /layersel -->\n## Later\n")
