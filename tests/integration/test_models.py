"""Every architecture in the table of `tests/README.md`: scored, trained in each mode, stopped at the cut.

A model works or is refused with an error of our own. The columns are computed here (`outcome`), compared with what
`models.py` expects, and the whole table with that of `tests/README.md`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from model_outcomes import outcome, rows, table
from models import CASES, COLUMNS, GEMMA_3N, MARKERS, Case

from axolotl_layersel.method.score_layers import score_layers
from axolotl_layersel.model.decoder_stack import StackError

pytestmark = pytest.mark.slow

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_model_is_scored_and_trained_as_the_plan_says_or_refused(case: Case) -> None:
    refused = {column: f"refused: {reason}" for column, reason in case.refused.items()}
    assert outcome(case.name) == {**dict.fromkeys(COLUMNS, "yes"), **refused}


def test_a_model_that_computes_something_else_is_refused_with_what_was_found() -> None:
    with pytest.raises(StackError, match=r"the input of model.norm is not the output of the last layer; found were 4"):
        score_layers(GEMMA_3N.model(), rows())


def test_the_readme_shows_the_table_that_this_run_made() -> None:
    begin, end = MARKERS
    text = README.read_text(encoding="utf-8")
    assert text.count(begin) == text.count(end) == 1, "tests/README.md has no place for the table of models"
    assert text.partition(begin)[2].partition(end)[0].strip() == table()
    assert len(CASES) >= 30
