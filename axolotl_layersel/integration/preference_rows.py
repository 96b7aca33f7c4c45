"""Preference data as rows with labels: what a run learns to prefer is what it is scored on.

Scored are the chosen completions (DPO, IPO, ORPO, SimPO) and the desirable ones (KTO), each after its prompt, whose
tokens carry no label. The tokens are the trainer's own: TRL's functions do the work, in TRL's order, for the rows that
are drawn and no others. Rejected and undesirable completions are not scored: they have no label to come closer to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

from axolotl_layersel.config.conflicts import SCORED_RL
from axolotl_layersel.method.calibration import IGNORED


class PreferenceRows:
    """An indexable view of a preference data set: rows with `input_ids` and `labels`, made when they are asked for.

    Args:
        dataset: indexable rows as axolotl prepares them: prompt with chosen and rejected, or prompt, completion, label.
        rl: the config's `rl`.
        tokenizer: the run's own.
        max_length: the trainer's `max_length`, in tokens.

    Raises:
        ValueError: rows of this kind have no completion to score.
    """

    def __init__(self, dataset: Any, *, rl: str, tokenizer: Any, max_length: int) -> None:
        if rl not in SCORED_RL:
            raise ValueError(f"rl is {rl!r}; allowed are {', '.join(SCORED_RL)}: other kinds have no chosen completion")
        if images := sorted({"image", "images"} & set(getattr(dataset, "column_names", None) or ())):
            raise ValueError(
                f"the preference data has the column {images[0]!r}: images are put among the tokens while training, so "
                "the rows cannot be scored before. Give the cut with `layersel: {first_layer: ...}` or `layersel: "
                "{plan: ...}`, or take the column out of data without images"
            )
        self._dataset = dataset
        self._tokenise: Callable[[Mapping[str, Any]], dict[str, list[int]]]
        if rl in ("orpo", "simpo"):
            from trl.experimental.cpo import CPOTrainer  # here and below: slow to import, and few runs need it
            from trl.experimental.orpo import ORPOTrainer

            trainer = ORPOTrainer if rl == "orpo" else CPOTrainer
            self._tokenise = partial(_odds_ratio_row, trainer=trainer, tokenizer=tokenizer, max_length=max_length)
        else:
            self._tokenise = partial(_reference_row, tokenizer=tokenizer)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self._tokenise(self._dataset[index])


def _reference_row(record: Mapping[str, Any], *, tokenizer: Any) -> dict[str, list[int]]:
    """DPO, IPO, KTO: plain text gets an end-of-sequence token; then prompt, and prompt + completion, are tokenised."""
    from trl.data_utils import _tokenize, extract_prompt, is_conversational

    record = dict(record) if "prompt" in record else extract_prompt(dict(record))
    if "chosen" in record:
        record["completion"], record["label"] = record.pop("chosen"), True
        record.pop("rejected", None)
    tools: dict[str, Any] = {}
    start: dict[str, Any] = {}
    if is_conversational(record):
        tools = {"tools": record.get("tools"), **(record.get("chat_template_kwargs") or {})}
        start = {"add_generation_prompt": True}
    elif not record["completion"].endswith(tokenizer.eos_token):
        record["completion"] += tokenizer.eos_token
    prompt = list(_tokenize(tokenizer, record["prompt"], **start, **tools)["input_ids"])
    whole = list(_tokenize(tokenizer, record["prompt"] + record["completion"], **tools)["input_ids"])
    completion = whole[len(prompt) :]
    labels = completion if record["label"] else [IGNORED] * len(completion)
    return {"input_ids": prompt + completion, "labels": [IGNORED] * len(prompt) + labels}


def _odds_ratio_row(
    record: Mapping[str, Any], *, trainer: Any, tokenizer: Any, max_length: int
) -> dict[str, list[int]]:
    """ORPO and SimPO: the trainer's own `tokenize_row`, which makes labels."""
    from trl.data_utils import maybe_apply_chat_template, maybe_extract_prompt

    record = maybe_apply_chat_template(maybe_extract_prompt(dict(record)), tokenizer)
    me = SimpleNamespace(processing_class=tokenizer, is_encoder_decoder=False, max_length=max_length)
    me.build_tokenized_answer = partial(trainer.build_tokenized_answer, me)
    row = trainer.tokenize_row(me, record)
    return {"input_ids": row["chosen_input_ids"], "labels": row["chosen_labels"]}
