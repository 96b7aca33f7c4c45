"""What a finished run of the demo chose, learned and saved.

Prints the plan's table, the held-out loss before and after, three held-out functions with the docstrings that the model
wrote before and after, how long a training step takes beside one that trains every layer, and where the files are.

    accelerate launch --cpu example_configs/demo/summarize.py example_configs/demo/work/lora
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import textwrap
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils.logging import disable_progress_bar

from axolotl_layersel.plan import Plan, read_plan
from axolotl_layersel.report.table import print_plan

PROMPTS = 3
LONGEST = 48  # tokens of an answer that are shown
TURNS = 3  # timed steps of each kind
PRECISION = "ACCELERATE_MIXED_PRECISION"  # as `accelerate launch --mixed_precision` sets it
ROWS = 8  # in a timed step, as in the config
WIDTH = 100

Messages = list[dict[str, str]]


def losses(output_dir: Path) -> tuple[float, float]:
    """Held-out loss at the first step, whose learning rate is still 0, and after the last one.

    Raises:
        SystemExit: no checkpoint, so the run has not finished.
    """
    states = sorted(output_dir.glob("checkpoint-*/trainer_state.json"), key=lambda p: int(p.parent.name.split("-")[1]))
    if not states:
        raise SystemExit(f"{output_dir} holds no checkpoint; train first, see the command at the top of the config")
    history = json.loads(states[-1].read_text(encoding="utf-8"))["log_history"]
    found = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    return found[0], found[-1]


def conversations(path: Path, count: int) -> list[Messages]:
    """The first rows of a data file of the demo."""
    lines = path.read_text(encoding="utf-8").splitlines()[:count]
    return [json.loads(line)["messages"] for line in lines]


def load(config: dict[str, Any]) -> Any:
    """The base model as the run had it: its precision, its four bits, its device."""
    dtype = torch.bfloat16 if config["bf16"] else torch.float32
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    quantized = {"quantization_config": four_bits} if config.get("load_in_4bit") else {}
    model = AutoModelForCausalLM.from_pretrained(config["base_model"], dtype=dtype, **quantized)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def answers(model: Any, tokenizer: Any, rows: list[Messages]) -> list[str]:
    """What the model says to the first turn of each conversation, always taking the likeliest token."""
    prompts = [tokenizer.apply_chat_template(row[:1], tokenize=False, add_generation_prompt=True) for row in rows]
    tokenizer.padding_side = "left"
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
    with torch.no_grad():
        said = model.generate(
            **batch, max_new_tokens=LONGEST, do_sample=False, pad_token_id=tokenizer.pad_token_id, use_cache=True
        )
    texts = tokenizer.batch_decode(said[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    return [" ".join(text.split()) for text in texts]


def step_seconds(model: Any, tokenizer: Any, rows: list[Messages], plan: Plan, options: LoraConfig) -> dict[str, float]:
    """Seconds of forward and backward over equal rows, three ways: every layer trained, the plan's, and these alone.

    The last is what a step costs whose frozen layers come from the prefix cache. The three take turns in one process,
    so that whatever else the machine does meets all of them; medians.
    """
    options.inference_mode, options.layers_to_transform = False, plan.trainable_layers
    adapted = get_peft_model(model, options, adapter_name="chosen")
    every = copy.deepcopy(options)
    every.layers_to_transform = None
    adapted.add_adapter("every", every)
    decoder = adapted.get_base_model().model
    layers = decoder.layers
    kinds = {"every": layers, "chosen": layers, "cached": layers[plan.first_trainable :]}
    tokenizer.padding_side = "right"
    texts = [tokenizer.apply_chat_template(row, tokenize=False) for row in rows]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
    mixed = os.environ.get(PRECISION) == "bf16"
    autocast = torch.autocast(model.device.type, torch.bfloat16) if mixed else nullcontext()
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(1 + TURNS):  # the first of each warms up
        for kind, run in kinds.items():
            decoder.layers = layers  # whole, or layers that are left out keep the adapter of the kind before
            adapted.set_adapter("every" if kind == "every" else "chosen")
            decoder.layers = run
            started = time.perf_counter()
            with autocast:
                loss = adapted(**batch, labels=batch.input_ids, use_cache=False).loss
            loss.backward()
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[kind].append(time.perf_counter() - started)
            adapted.zero_grad()
    decoder.layers = layers
    return {kind: median(times[1:]) for kind, times in seconds.items()}


def saving(seconds: dict[str, float]) -> str:
    """The measured step beside one that trains every layer."""
    every, chosen, cached = (seconds[kind] for kind in ("every", "chosen", "cached"))
    return (
        f"a step takes {chosen:.2f} s instead of {every:.2f} s with every layer trained ({chosen / every:.2f}), and "
        f"{cached:.2f} s ({cached / every:.2f}) where the frozen layers come from the cache"
    )


def cache_lines(output_dir: Path) -> list[str]:
    """What the run's log says about its prefix cache."""
    lines = (output_dir / "debug.log").read_text(encoding="utf-8").splitlines()
    return [line.partition("layersel: prefix cache: ")[2] for line in lines if "layersel: prefix cache: " in line]


def show_answers(rows: list[Messages], before: list[str], after: list[str]) -> None:
    """Each function, what the model wrote about it before and after, and what its author wrote."""
    for (question, answer), *said in zip(rows, before, after, strict=True):
        print("\n" + textwrap.indent(question["content"].partition("\n\n")[2], "    "))
        for name, text in zip(("before", "after", "library"), (*said, answer["content"]), strict=True):
            print(textwrap.fill(text, WIDTH, initial_indent=f"  {name:9}", subsequent_indent=" " * 11))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path)
    output_dir = parser.parse_args().output_dir
    before_loss, after_loss = losses(output_dir)
    disable_progress_bar()
    plan = read_plan(output_dir)
    folder = output_dir / "layersel"
    config = yaml.safe_load((folder / "recipe.yml").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(output_dir)  # with the chat template that the run used
    rows = conversations(Path(config["test_datasets"][0]["path"]), PROMPTS)
    model = load(config)
    before = answers(model, tokenizer, rows)
    adapted = PeftModel.from_pretrained(model, output_dir).eval()
    after = answers(adapted, tokenizer, rows)
    options = adapted.peft_config["default"]
    training_rows = conversations(Path(config["datasets"][0]["path"]), ROWS)
    seconds = step_seconds(adapted.unload(), tokenizer, training_rows, plan, options)

    print()
    print_plan(plan)
    print("\nThree functions of modules that were held out, and the docstrings that the model wrote")
    show_answers(rows, before, after)
    print(f"\nheld-out loss  {before_loss:.3f} before, {after_loss:.3f} after (nats for each token of an answer)")
    last = plan.num_layers - 1
    print(f"cut            layers {plan.first_trainable} to {last} of 0 to {last} trained")
    print(f"saved          {saving(seconds)}; medians of {TURNS} on {model.device.type}, without the optimizer")
    for line in cache_lines(output_dir):
        print(f"cache          {line}")
    print(f"report         {folder / 'report.html'}")
    print(f"recipe         {folder / 'recipe.yml'}")


if __name__ == "__main__":
    main()
