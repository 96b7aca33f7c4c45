"""What stored states change in the loss: eight bits for each number, and bf16 beside the rounding of another batch.

Rows of the help texts that come with Python run through a model in four ways, without training: each row alone, all
rows padded in one batch, and each row alone on states from a prefix cache, in the model's dtype and in eight bits. The
table shows how far the loss of a row, in nats per token, is from that of the row alone.

    python benchmarks/state_rounding.py --model /path/to/a/model --cuts 15,25
"""

from __future__ import annotations

import argparse
import contextlib
import pydoc_data.topics
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from axolotl_layersel.model.decoder_stack import find_stack
from axolotl_layersel.prefix_cache.cached_prefix import CachedPrefix
from axolotl_layersel.prefix_cache.fill import Sample, fill_store, padded
from axolotl_layersel.prefix_cache.obstacles import rounding_tolerance
from axolotl_layersel.prefix_cache.samples import sample_key
from axolotl_layersel.prefix_cache.state_store import MemoryStore, StoredAs

LENGTHS = (48, 64, 80, 96, 112, 128, 144, 160)  # of the rows, in turn
WAYS: dict[str, StoredAs] = {"cached": "model", "cached, int8": "int8"}


def main() -> None:
    """Measure in float32 and bf16 and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a model with its tokenizer")
    parser.add_argument("--cuts", default="15,25", help="first trained layers")
    parser.add_argument("--rows", type=int, default=8)
    options = parser.parse_args()
    samples = rows_of_text(options.model, options.rows)
    print(
        "| weights | cut | way | mean | mean size | largest | first step's check: found, allowed |\n" + "|---" * 7 + "|"
    )
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, use_cache=False).eval()
        model.requires_grad_(False)
        alone = losses(model, [[sample] for sample in samples], dtype)
        show(dtype, "", "another batch", losses(model, [samples], dtype) - alone)
        for cut in map(int, options.cuts.split(",")):
            for way, stored_as in WAYS.items():
                with caching(model, samples, cut=cut, stored_as=stored_as, dtype=dtype) as cached:
                    found = losses(model, [[sample] for sample in samples], dtype)
                show(dtype, str(cut), way, found - alone, f"{cached.worst_error:.1e}, {cached.tolerance:.1e}")


def rows_of_text(model: str, count: int) -> list[Sample]:
    """So many rows of different lengths."""
    text = "\n\n".join(pydoc_data.topics.topics.values())
    ids = AutoTokenizer.from_pretrained(model)(text[: 2000 * count], return_tensors="np")["input_ids"][0]
    samples, start = [], 0
    for place in range(count):
        row = ids[start : start + LENGTHS[place % len(LENGTHS)]]
        samples.append(Sample(sample_key(row), row, f"row {place}"))
        start += len(row)
    return samples


@contextlib.contextmanager
def caching(model: nn.Module, samples: Sequence[Sample], *, cut: int, stored_as: StoredAs, dtype: torch.dtype):
    """Within the block the model reads the states of the samples from a cache."""
    stack, autocast = find_stack(model), _autocast(dtype)
    store = MemoryStore(width=model.config.hidden_size, dtype=dtype, stored_as=stored_as)
    fill_store(
        *(model, stack, store, samples),
        first_trainable=cut,
        batch_tokens=1024,
        autocast=autocast,
        show_progress=False,
    )
    tolerance = rounding_tolerance(stack, first_trainable=cut, autocast=autocast) + store.storage_error
    cached = CachedPrefix(stack, store, cut, where={s.key: s.where for s in samples}, tolerance=tolerance)
    cached.install()
    try:
        yield cached
    finally:
        cached.remove()


@torch.no_grad()
def losses(model: nn.Module, batches: Sequence[Sequence[Sample]], dtype: torch.dtype) -> Tensor:
    """Of each row, nats per token."""
    found = []
    for batch in batches:
        inputs = padded(batch, torch.device("cpu"))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask).logits.float()
        for row, sample in enumerate(batch):
            n = len(sample.ids)
            found.append(nn.functional.cross_entropy(logits[row, : n - 1], inputs.input_ids[row, 1:n]))
    return torch.stack(found)


def show(dtype: torch.dtype, cut: str, way: str, off: Tensor, check: str = "") -> None:
    """A line of the table."""
    numbers = " | ".join(f"{value:.1e}" for value in (off.mean(), off.abs().mean(), off.abs().max()))
    print(f"| {str(dtype).removeprefix('torch.')} | {cut} | {way} | {numbers} | {check} |", flush=True)


def _autocast(dtype: torch.dtype) -> torch.dtype | None:
    return dtype if dtype == torch.bfloat16 else None


if __name__ == "__main__":
    main()
