"""What does scoring layer by layer cost, and how much device memory does it take?

    python benchmarks/streaming.py                                                    # a small Llama on the CPU
    python benchmarks/streaming.py --model llama-3.1-8b --device cuda --dtype bf16    # about a minute on an H100
    python benchmarks/streaming.py --model llama-3.1-70b --layers 8 --device cuda --dtype bf16

A Llama with random weights is scored on random rows: in whole forward passes with all weights on the device, then
layer by layer with the weights in main memory, brought when they are needed and, in another round, one layer ahead.
Printed for each: seconds, the ratio to whole passes, the peak of device memory (of tensors; CUDA only), and whether
the scores are equal to the bit. Needs torch, transformers, accelerate, peft; not axolotl.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from step_arm import DTYPES, PRESETS, random_model, read_config

sys.path.insert(0, str(Path(__file__).parents[1]))

from axolotl_layersel.method.calibration import Row
from axolotl_layersel.method.scoring_pass import measure
from axolotl_layersel.method.streamed_pass import measure_streamed
from axolotl_layersel.method.transition import RowStatistics
from axolotl_layersel.model.decoder_stack import find_stack
from axolotl_layersel.model.latent_states import left_as_found
from axolotl_layersel.model.layer_by_layer import LayerByLayer


def random_rows(count: int, length: int, vocabulary: int) -> list[Row]:
    """Rows of one to one half of the length, the second half of each supervised."""
    draw = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        ids = tuple(draw.integers(3, vocabulary, draw.integers(length // 2, length + 1)).tolist())
        rows.append(Row(ids, tuple(-100 if i < len(ids) // 2 else t for i, t in enumerate(ids))))
    return rows


def timed(work: Callable[[], RowStatistics], device: torch.device) -> tuple[RowStatistics, float, float]:
    """What `work` finds, seconds, and GB of device memory at its peak."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    found = work()
    if cuda:
        torch.cuda.synchronize(device)
    return found, time.perf_counter() - started, torch.cuda.max_memory_allocated(device) / 1e9 if cuda else float("nan")


def differences(one: RowStatistics, other: RowStatistics) -> str:
    """Whether scores are equal, and by how much they are not."""
    names = ("deviation_RS", "miss_RL", "loss_R")
    if all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names):
        return "equal to the bit"
    mean, else_mean = one.mean(one.deviation_RS), other.mean(other.deviation_RS)
    return f"mean deviations differ by at most {np.abs(mean - else_mean).max():.2e}"


def main() -> None:
    """Build, score in every way, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=PRESETS, default="small")
    parser.add_argument("--layers", type=int, help="other than the model's")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--sequence", type=int, default=512, help="most tokens of a row")
    parser.add_argument("--batch-tokens", type=int, default=4_096)
    parser.add_argument("--keep-gb", type=float, default=16.0, help="of states that wait between two layers")
    parser.add_argument(
        "--transitions", action="store_true", help="measure the layers' moves, as policy peak_gain does"
    )
    parser.add_argument("--rounds", type=int, default=1, help="of each way")
    options = parser.parse_args()

    device, began = torch.device(options.device), time.perf_counter()
    config = read_config(options.model)
    config.num_hidden_layers = options.layers or config.num_hidden_layers
    torch.manual_seed(0)
    model = random_model(config, device=device, dtype=DTYPES[options.dtype]).eval()
    stack = find_stack(model)
    rows = random_rows(options.rows, options.sequence, config.vocab_size)
    weights, tokens = sum(p.nbytes for p in model.parameters()), sum(len(row.input_ids) for row in rows)
    layer = sum(p.nbytes for p in stack.layers[0].parameters())
    head = stack.head.weight.nbytes
    print(
        f"{options.model}, {stack.num_layers} layers, {options.dtype}: {weights / 1e9:.2f} GB of weights, a layer "
        f"{layer / 1e9:.2f}, the unembedding {head / 1e9:.2f}; {len(rows)} rows, {tokens:,} tokens, "
        f"{options.batch_tokens:,} at a time; built in {time.perf_counter() - began:.1f} s",
        flush=True,
    )

    def whole(some: list[Row]) -> RowStatistics:
        return measure(model, stack, some, range(len(some)), **how)

    def streamed(some: list[Row], *, ahead: bool) -> RowStatistics:
        way = LayerByLayer(device, int(options.keep_gb * 1e9), ahead=ahead)
        return measure_streamed(model, stack, some, range(len(some)), way=way, **how)

    how = {"deviation": "cosine", "batch_tokens": options.batch_tokens, "transitions": options.transitions}
    with left_as_found(model, device=device):
        whole(rows[:1])  # kernels are loaded
        for _ in range(options.rounds):
            reference, usual, peak = timed(lambda: whole(rows), device)
            print(f"whole passes:         {usual:7.2f} s, peak {peak:.2f} GB", flush=True)
        began = time.perf_counter()
        model.to("cpu")
        print(f"weights to main memory in {time.perf_counter() - began:.1f} s", flush=True)
        for ahead in [False, True] * options.rounds:
            name = "layer by layer, ahead" if ahead else "layer by layer"
            try:
                found, seconds, peak = timed(lambda ahead=ahead: streamed(rows, ahead=ahead), device)
            except Exception:
                traceback.print_exc()
                print(f"{name}: failed", flush=True)
                continue
            print(
                f"{name + ':':22}{seconds:7.2f} s, {seconds / usual:.2f} of whole passes, peak {peak:.2f} GB; "
                f"{differences(reference, found)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
