"""Fine-tuning tasks as token rows with the instruction mask that axolotl makes: only the response carries labels.

- `gsm8k`: grade-school maths, step-by-step answer (a .jsonl with `question`, `answer`).
- `question`: the question that a grade-school maths answer belongs to (the same file).
- `roleplay`: role-play instructions (a .jsonl with `instruction`, `input`, `output`).
- `code`: signature and docstring of a function of the standard library; the body answers.
- `docstring`: a function of the standard library; its docstring answers.
- `near`: a paragraph and the next one, from documents that the toys' pretraining never saw.

The prompt is the tokenizer's chat template where it has one, and alpaca's where not. Rows are cut at `max_length`
tokens; a row whose answer would keep fewer than 12 tokens is dropped. Train and held-out rows never share a document
(for `code` and `docstring`: a source file).
"""

import ast
import json
import random
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from transformers import PreTrainedTokenizerBase

TASKS = ("gsm8k", "question", "roleplay", "code", "near", "docstring")
IGNORED = -100
MIN_ANSWER = 12
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Rows:
    """Token ids and labels of a task; labels are -100 outside of the response."""

    train: list[tuple[list[int], list[int]]]
    heldout: list[tuple[list[int], list[int]]]


@dataclass(frozen=True)
class Example:
    """What is asked, what answers, and the document that both come from."""

    instruction: str
    context: str
    answer: str
    document: str


def alpaca(instruction: str, context: str = "") -> str:
    """The prompt of `type: alpaca`."""
    template = WITH_INPUT if context else WITHOUT_INPUT
    return template.format(instruction=instruction, input=context)


def read_jsonl(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def gsm8k(path: Path) -> Iterator[Example]:
    for number, row in enumerate(read_jsonl(path)):
        yield Example(row["question"], "", row["answer"], str(number))


def question(path: Path) -> Iterator[Example]:
    for number, row in enumerate(read_jsonl(path)):
        yield Example("Write the question that this answer belongs to.", row["answer"], row["question"], str(number))


def roleplay(path: Path) -> Iterator[Example]:
    for number, row in enumerate(read_jsonl(path)):
        yield Example(row["instruction"], row.get("input", ""), row["output"], str(number))


FROM_FILE = {"gsm8k": (gsm8k, "gsm8k"), "question": (question, "gsm8k"), "roleplay": (roleplay, "roleplay")}


def functions() -> Iterator[tuple[str, str, str, str]]:
    """File, head with docstring, body and docstring of functions of the running interpreter's standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        if {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(file.parts):
            continue
        source = file.read_text(encoding="utf-8", errors="replace")
        lines = source.splitlines()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and (docstring := ast.get_docstring(node)) and len(node.body) > 2:
                head = "\n".join(lines[node.lineno - 1 : node.body[0].end_lineno])
                body = "\n".join(lines[node.body[1].lineno - 1 : node.end_lineno])
                yield str(file), head, body, docstring


def code() -> Iterator[Example]:
    for file, head, body, _ in functions():
        yield Example("Complete this Python function.", head, body, file)


def docstring() -> Iterator[Example]:
    """The body without signature: names of parameters in the answer have to be read from the code."""
    for file, _, body, answer in functions():
        yield Example("Write a docstring for this Python code.", body, answer, file)


def near(documents: list[str]) -> Iterator[Example]:
    """Neighbouring paragraphs of the documents that pretraining has not seen, in the alpaca prompt.

    Plain continuation of such text leaves nothing to gain (less than 0.01 nats on the models of the reduced grid); with
    the prompt around it the text stays the pretraining text and the format is what there is to learn.
    """
    for number, document in enumerate(documents):
        paragraphs = [part.strip() for part in document.split("\n\n") if len(part.strip()) > 80]
        for first, second in pairwise(paragraphs):
            yield Example("Continue the text.", first, second, str(number))


def prompt_ids(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids up to where the answer starts, by the tokenizer's chat template or alpaca's prompt."""
    if tokenizer.chat_template is None:
        return list(tokenizer(alpaca(example.instruction, example.context), verbose=False)["input_ids"])
    content = "\n\n".join(part for part in (example.instruction, example.context) if part)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def tokenize(
    example: Example, tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> tuple[list[int], list[int]] | None:
    """Ids and labels, or None if too little of the answer is left within `max_length`."""
    prompt = prompt_ids(example, tokenizer)
    answer = tokenizer(example.answer, add_special_tokens=False, verbose=False)["input_ids"]
    ids = [*prompt, *answer, tokenizer.eos_token_id][:max_length]
    if len(ids) - len(prompt) < MIN_ANSWER:
        return None
    return ids, [IGNORED] * len(prompt) + ids[len(prompt) :]


def build_task(
    name: str,
    *,
    tokenizer: PreTrainedTokenizerBase,
    paths: dict[str, Path],
    heldout_documents: Callable[[], list[str]],
    train_rows: int,
    heldout_rows: int,
    max_length: int,
    seed: int = 0,
) -> Rows:
    """Draws the rows of one task.

    Args:
        name: one of `TASKS`.
        paths: the .jsonl of `gsm8k` and of `roleplay`.
        heldout_documents: gives the documents that pretraining has not seen, for `near`.
        train_rows, heldout_rows: rows wanted; fewer than that is an error.
    """
    if name == "near":
        examples = list(near(heldout_documents()))
    elif name in ("code", "docstring"):
        examples = list(code() if name == "code" else docstring())
    elif name in FROM_FILE:
        made, file = FROM_FILE[name]
        examples = list(made(paths[file]))
    else:
        raise ValueError(f"got task {name!r}; allowed: {', '.join(TASKS)}")
    draw = random.Random(seed)
    documents = sorted({example.document for example in examples})
    draw.shuffle(documents)
    kept_out = set(documents[: max(1, len(documents) // 5)])
    draw.shuffle(examples)
    train: list[tuple[list[int], list[int]]] = []
    heldout: list[tuple[list[int], list[int]]] = []
    for example in examples:
        part, wanted = (heldout, heldout_rows) if example.document in kept_out else (train, train_rows)
        if len(part) < wanted:
            row = tokenize(example, tokenizer, max_length=max_length)
            if row is not None:
                part.append(row)
    if len(train) < train_rows or len(heldout) < heldout_rows:
        raise ValueError(
            f"task {name!r} has {len(train)} training and {len(heldout)} held-out rows; wanted are {train_rows} and "
            f"{heldout_rows}: give more text, or lower --steps or --rows"
        )
    return Rows(train=train, heldout=heldout)
