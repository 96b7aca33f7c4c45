"""A tiny model that reads images, pictures to show it, and the axolotl config that trains it on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from axolotl_runs import instruction_rows
from example_stand_ins import IMAGE_TOKENS, StandIn, make_stand_in
from PIL import Image


def make_image_model(folder: Path) -> Path:
    """Gemma 3 with 4 decoder layers, a vision tower of 5, and a processor whose image tokens the model knows."""
    from transformers import AutoTokenizer

    make_stand_in(StandIn("Gemma3", eos="<eos>"), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for name, token in IMAGE_TOKENS.items():
        config[f"{name}_index"] = tokenizer.convert_tokens_to_ids(token)
    path.write_text(json.dumps(config), encoding="utf-8")
    return folder


def make_conversations(folder: Path, *, images: bool, rows: int = 12) -> Path:
    """Questions and answers in axolotl's multimodal format, each with a picture of one colour or with text alone."""
    made = []
    for i, row in enumerate(instruction_rows(rows)):
        question: list[dict[str, str]] = [{"type": "text", "text": row["instruction"]}]
        if images:
            picture = folder / f"{i}.png"
            Image.new("RGB", (20, 12), (20 * i, 50, 200 - i)).save(picture)
            question.insert(0, {"type": "image", "path": str(picture)})
        answer = [{"type": "text", "text": row["output"]}]
        made.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
    path = folder / "conversations.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return path


def image_options(folder: Path, model: Path, *, images: bool = True, **overrides: Any) -> dict[str, Any]:
    """Arguments of `write_config`: a processor, its chat template, and rows that axolotl prepares unless told not to.

    Args:
        images: the rows have pictures.
        overrides: more of the arguments.
    """
    data = make_conversations(folder, images=images)
    return {
        "model": model,
        "data": data,
        "datasets": [{"path": str(data), "ds_type": "json", "split": "train", "type": "chat_template"}],
        "processor_type": "AutoProcessor",
        "chat_template": "gemma3",
        "remove_unused_columns": False,
        "sequence_len": 512,
        "dataset_num_proc": 0,
        **overrides,
    }
