"""What does choosing the layers cost, against the run that it is for and against a plain forward pass?

    python benchmarks/selection.py                                        # a small random Llama on one CPU thread
    python benchmarks/selection.py --model path/to/a/model --dtype bf16 --sequence 160
    python benchmarks/selection.py --model llama-3.2-1b --device cuda --dtype bf16 --sequence 1024

In one process and in turns, on rows of Python's own help texts (as bytes where the model is random): LoRA steps of all
layers as a trainer takes them, plain forward passes over the calibration rows with and without their loss, scoring by
the forward pass alone, and scoring with the pilot that the run pays for. It prints ratios of a round: scoring to plain
passes; pilot, and all of the selection, to the run's steps; and what the plan had said of the pilot. Time is the
process's CPU time, on a GPU seconds with the device waited for.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from step_arm import DTYPES, PRESETS, random_model, read_config
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))

from axolotl_layersel.method.calibration import IGNORED, Batch, Row, batches
from axolotl_layersel.method.pilot import PilotSettings
from axolotl_layersel.method.score_layers import ScoredCut, score_layers


def text_rows(ids: Sequence[int], count: int, length: int) -> list[Row]:
    """Rows of a half to the whole of a length, the second half of each supervised."""
    draw, rows = np.random.default_rng(0), []
    for _ in range(count):
        start, size = draw.integers(0, len(ids) - length), draw.integers(length // 2, length + 1)
        row = ids[start : start + size]
        rows.append(Row(tuple(row), tuple(IGNORED if i < size // 2 else token for i, token in enumerate(row))))
    return rows


class Selection:
    """A model and what is timed on it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, torch.device(options.device)
        torch.manual_seed(0)
        if options.model in PRESETS:
            self.model: Any = random_model(read_config(options.model), device=self.device, dtype=DTYPES[options.dtype])
        else:
            self.model = AutoModelForCausalLM.from_pretrained(options.model, dtype=DTYPES[options.dtype])
            self.model.to(self.device)
        self.rows = text_rows(self.token_ids(), options.rows, options.sequence)
        self.autocast = torch.bfloat16 if options.dtype == "bf16" else None
        length = float(np.mean([len(row.input_ids) for row in self.rows]))
        self.pilot = PilotSettings(
            run_tokens=options.run_steps * options.batch * length,
            share=options.share,
            required=True,
            say=lambda text: print(f"  {text}", flush=True),
        )

    def token_ids(self) -> list[int]:
        text = "\n".join(pydoc_data.topics.topics.values())
        if self.options.model in PRESETS:
            return list(text.encode())
        return list(AutoTokenizer.from_pretrained(self.options.model).encode(text))

    def timed(self, work: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds, and what the work gave."""
        if self.device.type != "cuda":
            started = time.process_time()
            found = work()
            return time.process_time() - started, found
        torch.cuda.synchronize(self.device)
        started = time.perf_counter()
        found = work()
        torch.cuda.synchronize(self.device)
        return time.perf_counter() - started, found

    def steps(self) -> float:
        """Seconds of a training step of all layers, the median of some."""
        config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        student = get_peft_model(self.model, config)
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        student.train()
        optimizer = torch.optim.AdamW((p for p in student.parameters() if p.requires_grad), lr=1e-4)
        draw, seconds = np.random.default_rng(0), []
        for _ in range(self.options.steps + 1):
            chosen = draw.choice(len(self.rows), self.options.batch, replace=False)
            seconds.append(self.timed(lambda chosen=chosen: self._step(student, optimizer, chosen))[0])
        self.model = student.unload()
        for parameter in self.model.parameters():
            parameter.requires_grad_(True)
        return statistics.median(seconds[1:])  # the first makes the optimizer's state

    def _step(self, student: Any, optimizer: torch.optim.Optimizer, chosen: Sequence[int]) -> None:
        self._forward(student, next(batches(self.rows, chosen, batch_tokens=10**9)), loss=True).loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def _forward(self, model: Any, batch: Batch, *, loss: bool) -> Any:
        here = batch.to(self.device)
        inputs = {"input_ids": here.input_ids, "attention_mask": here.attention_mask, "use_cache": False}
        if loss:
            inputs["labels"] = torch.full_like(here.input_ids, IGNORED)
            inputs["labels"][:, 1:] = here.targets[:, :-1]
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            return model(**inputs)

    @torch.no_grad()
    def plain(self, *, loss: bool) -> None:
        """Forward passes over all rows with the logits of every position, and with their loss if it is asked for."""
        self.model.eval()
        for batch in batches(self.rows, range(len(self.rows)), batch_tokens=self.options.batch_tokens):
            self._forward(self.model, batch, loss=loss)

    def score(self, pilot: PilotSettings | None) -> ScoredCut:
        """As the plugin does it."""
        size = self.options.batch_tokens
        return score_layers(self.model, self.rows, pilot=pilot, batch_tokens=size, autocast=self.autocast)

    def measure(self) -> dict[str, float]:
        """One round, as ratios."""
        step = self.steps()
        plain = self.timed(lambda: self.plain(loss=False))[0]
        forward = self.timed(lambda: self.score(None))[0]
        with_loss = self.timed(lambda: self.plain(loss=True))[0]
        both, found = self.timed(lambda: self.score(self.pilot))
        step = (step + self.steps()) / 2
        run = step * self.options.run_steps
        assert found.scores.pilot is not None  # it was required
        return {
            "step, s": step,
            "forward pass alone / plain passes with their loss": forward / with_loss,
            "forward pass alone / plain passes without": forward / plain,
            "forward pass alone / run": forward / run,
            "pilot / run": (both - forward) / run,
            "pilot / run, planned": found.scores.pilot.cost_share,
            "selection / run": both / run,
            "steps of the pilot": found.scores.pilot.steps,
        }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small", help=f"{', '.join(PRESETS)}, or a model's folder or hub name")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="bf16: weights in bf16, and autocast")
    parser.add_argument("--rows", type=int, default=128, help="calibration rows")
    parser.add_argument("--sequence", type=int, default=256, help="most tokens of a row")
    parser.add_argument("--batch", type=int, default=8, help="rows of a training step")
    parser.add_argument("--batch-tokens", type=int, default=4_096, help="of a forward pass over calibration rows")
    parser.add_argument("--run-steps", type=int, default=1_000, help="of the run that the selection is for")
    parser.add_argument("--share", type=float, default=0.02, help="pilot_share")
    parser.add_argument("--steps", type=int, default=3, help="training steps measured before and after, each round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    selection, rounds = Selection(options), list[dict[str, float]]()
    for number in range(options.rounds):
        rounds.append(selection.measure())
        print(f"round {number + 1}: " + ", ".join(f"{k} {v:.4g}" for k, v in rounds[-1].items()), flush=True)
    print("\n| what | median | least | most |\n|---|---|---|---|")
    for name in rounds[0]:
        values = [found[name] for found in rounds]
        print(f"| {name} | {statistics.median(values):.4g} | {min(values):.4g} | {max(values):.4g} |")


if __name__ == "__main__":
    main()
