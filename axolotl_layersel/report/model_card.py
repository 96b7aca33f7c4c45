"""The section of a model card that says which layers were trained, why, and after whom.

Names and sentences are escaped: a card is Markdown that others publish. The section stands between two comments, so
that a later run into the same folder replaces it.
"""

from __future__ import annotations

import re
from pathlib import Path

from axolotl_layersel.plan import Plan, write_text
from axolotl_layersel.report.wording import SALF, dataset_name, model_name, recipe, summary

CARD_BEGIN, CARD_END = "<!-- layersel -->", "<!-- /layersel -->"


def add_to_model_card(path: Path, plan: Plan) -> None:
    """Put the section at the end of a model card, or in the place of an earlier one; no card, no change.

    Raises:
        OSError: the card cannot be read or written.
    """
    if not path.exists():
        return
    card = path.read_text(encoding="utf-8")
    before, mark, rest = card.partition(CARD_BEGIN)
    after = rest.partition(CARD_END)[2] if mark else ""
    write_text(path, f"{before.rstrip()}\n\n{CARD_BEGIN}\n{model_card_section(plan)}{CARD_END}\n{after.lstrip()}")


def model_card_section(plan: Plan) -> str:
    """A section of Markdown for the model card: what was trained, why, the numbers of each layer, the citation."""
    lines = {name: _escaped(text) for name, text in summary(plan).items()}
    text = [
        "## Layer selection",
        "",
        f"{_code(model_name(plan))} was trained on {lines['trained']}",
        "",
        f"- Cut: {lines['cut']}",
        f"- Predicted cost: {lines['predicted']}",
    ]
    if plan.scores is not None:
        text += ["", "| layer | deviation | descent | kept from here | |", "|--:|--:|--:|--:|:--|"]
        scores = plan.scores
        for i, (after, fell, kept) in enumerate(
            zip(scores.deviation[1:], scores.descent, scores.retention, strict=True)
        ):
            state = "trained" if i >= plan.first_trainable else "frozen"
            text.append(f"| {i} | {after:.3f} | {fell:.3f} | {kept:.3f} | {state} |")
        text += [
            "",
            "Deviation: how far the state after the layer is from the semantics of the labels; descent: the layer's "
            "share of its fall. Kept from here: the predicted share of the improvement of training all layers that "
            "training from this layer on keeps. "
            f"Measured on {_sample(plan)}.",
        ]
    text += ["", f"To train the same layers: `{recipe(plan)}`", "", f"The deviation follows: {SALF}"]
    return "\n".join(text) + "\n"


def _sample(plan: Plan) -> str:
    data = _code(dataset_name(plan)) if dataset_name(plan) else "the training data"
    if plan.sample is None or plan.scores is None:
        return data
    return f"{plan.sample.rows} rows with {plan.scores.tokens} scored tokens of {data}"


def _escaped(text: str) -> str:
    """Text that starts no markup."""
    return re.sub(r"([\\`*<>\[\]|])", r"\\\1", text)


def _code(name: str) -> str:
    """A name as inline code: it can neither end the span nor start markup."""
    return "`" + re.sub(r"[`|<>\s]+", " ", name).strip() + "`"
