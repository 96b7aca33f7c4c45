"""Run every example config on a tiny stand-in of its model; `test_examples.py` starts this in a process of its own.

A stand-in keeps the config and replaces what needs the network or a GPU: the model by a tiny one of its architecture,
the data by rows of its type, attention kernels, mixed precision and 8-bit optimizers by what a CPU runs. The keys of
FSDP and DeepSpeed are dropped, since one process trains, but `sharded_example` keeps them for several. All runs share
one process, because importing axolotl takes longer than training; `results.json` tells how each of them ended.
"""

from __future__ import annotations

import json
import re
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from axolotl_runs import instruction_rows, make_tokenizer

EXAMPLES = Path(__file__).parents[2] / "example_configs"
NUM_LAYERS = 4
GPU = {"bf16": True, "fp8": True, "tf32": True, "n_gpu": 1, "compute_capability": "sm_90"}


@dataclass(frozen=True)
class StandIn:
    """What replaces the model of an example."""

    architecture: str  # transformers' config class, without "Config"
    options: dict[str, Any] = field(default_factory=dict)
    eos: str = "</s>"


STAND_INS = {
    "gemma-3-4b-lora": StandIn("Gemma3", eos="<eos>"),
    "llama-3.1-8b-lora": StandIn("Llama"),
    "llama-3.1-70b-qlora-fsdp2": StandIn("Llama"),
    "llama-3.1-8b-full-zero3": StandIn("Llama"),
    "llama-3.1-8b-lora-fsdp2": StandIn("Llama"),
    "llama-3.1-8b-qlora-24gb": StandIn("Llama"),
    "llama-3.2-1b-qlora": StandIn("Llama", {"tie_word_embeddings": True}),
    "llama-3.2-3b-qlora-budget": StandIn("Llama", {"tie_word_embeddings": True}),
    "mistral-7b-dpo-lora": StandIn("Mistral", {"sliding_window": None}),
    "qwen3-30b-a3b-moe-lora": StandIn(
        "Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
    ),
    "qwen3-4b-lora-chat-packed": StandIn("Qwen3", eos="<|im_end|>"),
    "smollm2-135m-full": StandIn("Llama", {"tie_word_embeddings": True}, eos="<|endoftext|>"),
}
RERUN = ("llama-3.2-1b-qlora", "smollm2-135m-full")  # an adapter and full fine-tuning, from their recipes
# tokens that the configs and chat templates name, so that nothing is added to the vocabulary
TOKENS = [
    *("<|end_of_text|>", "<|finetune_right_pad_id|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>", "[INST]", "[/INST]"),
]
IMAGE_TOKENS = {
    "image_token": "<image_soft_token>",
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
}


def examples() -> list[Path]:
    """All examples but the demo's, which has a test of its own."""
    return sorted(path for path in EXAMPLES.glob("*.yml") if not path.name.startswith("demo"))


def make_stand_in(stand_in: StandIn, folder: Path) -> Path:
    """The model, random, with a tokenizer that knows all tokens that the examples name."""
    import torch
    import transformers

    small = make_tokenizer()
    small.add_special_tokens({"additional_special_tokens": [*TOKENS, *IMAGE_TOKENS.values()]})
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=small.backend_tokenizer,
        bos_token=small.bos_token,
        eos_token=stand_in.eos,
        pad_token=small.pad_token,
        model_max_length=512,
        extra_special_tokens=IMAGE_TOKENS if stand_in.architecture == "Gemma3" else {},
    )
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **stand_in.options,
    }
    torch.manual_seed(0)
    if stand_in.architecture == "Gemma3":
        vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 5, "num_attention_heads": 2}
        config = transformers.Gemma3Config(
            text_config={**text, "layer_types": ["sliding_attention", "full_attention"] * 2},
            vision_config={**vision, "image_size": 16, "patch_size": 8},
            mm_tokens_per_image=4,
        )
        model: Any = transformers.Gemma3ForConditionalGeneration(config)
        images = transformers.Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
        processor = transformers.Gemma3Processor(image_processor=images, tokenizer=tokenizer, image_seq_length=4)
        processor.save_pretrained(folder)
    else:
        config = getattr(transformers, f"{stand_in.architecture}Config")(**text)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_rows(kind: str, folder: Path) -> Path:
    """Rows of a dataset type that the examples use."""
    rows: list[dict[str, Any]] = []
    for row in instruction_rows(24):
        question, answer = row["instruction"], row["output"]
        if kind == "alpaca":
            rows.append(dict(row))
        elif kind == "chat_template":
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            rows.append({"conversations": turns})
        else:
            pair = {"chosen": answer, "rejected": "I do not know."}
            said = {key: {"role": "assistant", "content": text} for key, text in pair.items()}
            rows.append({"conversation": [{"role": "user", "content": question}], **said})
    path = folder / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def stand_in_config(config: dict[str, Any], model: Path, data: Path, folder: Path) -> dict[str, Any]:
    """The example's config with everything replaced that needs the network or a GPU, and nothing else."""
    dataset = {**config["datasets"][0], "path": str(data), "ds_type": "json"}
    dataset.pop("split", None)
    changes: dict[str, Any] = {
        "base_model": str(model),
        "datasets": [{**dataset, "split": "train"}],
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / "out"),
        "dataset_num_proc": 0,  # in this process; 1 is a spawned one, which imports everything again
        "use_cpu": True,
        "bf16": False,
        "tf32": False,
        "sequence_len": 512,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": 2,
        "optimizer": "adamw_torch",
        "learning_rate": 0.01,
        "warmup_ratio": 0.0,
        "val_set_size": 0.0,
        "save_steps": 2,
        **dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), False),
    }
    left_out = {"evals_per_epoch", "saves_per_epoch", "attn_implementation", "deepspeed", "fsdp_version", "fsdp_config"}
    block = {**(config.get("layersel") or {}), "report": False}  # figures have tests of their own
    if block.get("first_layer") is not None:
        block["first_layer"] = NUM_LAYERS // 2
    elif block.get("plan") is not None:
        from axolotl_layersel.plan import Plan

        plan = Plan(
            base_model=str(model),
            adapter=config.get("adapter"),
            num_layers=NUM_LAYERS,
            first_trainable=NUM_LAYERS // 2,
        )
        block["plan"] = str(folder / "plan.json")
        Path(block["plan"]).write_text(plan.to_json(), encoding="utf-8")
    else:
        block["num_samples"] = 8
    return {key: value for key, value in {**config, **changes, "layersel": block}.items() if key not in left_out}


def trained_layers(folder: Path, model: Path, adapter: str | None) -> list[int]:
    """Decoder layers that have an adapter, or a weight that differs from the base model's, in what was saved."""
    from safetensors.torch import load_file

    number = re.compile(r"layers\.(\d+)\.")
    if adapter:
        names = load_file(folder / "out" / "adapter_model.safetensors")
        return sorted({int(found.group(1)) for name in names if (found := number.search(name))})
    before, after = (load_file(path / "model.safetensors") for path in (model, folder / "out"))
    changed = [name for name, weight in after.items() if not before[name].equal(weight)]
    return sorted({int(found.group(1)) if (found := number.search(name)) else -1 for name in changed})


def validate(config: dict[str, Any]) -> None:
    """As axolotl does before a run, on a machine that has a GPU."""
    from axolotl.utils.config import prepare_plugins, validate_config
    from axolotl.utils.dict import DictDefault

    cfg = DictDefault(config)
    prepare_plugins(cfg)
    valid = validate_config(cfg, capabilities=GPU, env_capabilities={"torch_version": "2.11.0"})
    assert "layersel" not in config or dict(config["layersel"] or {}).items() <= dict(valid["layersel"]).items()


def train(config: dict[str, Any], folder: Path) -> None:
    """`axolotl train`, in this process."""
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.cli.train import do_train

    path = folder / "config.yml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    do_train(load_cfg(str(path)), TrainerCliArgs())


def run_example(path: Path, folder: Path) -> dict[str, Any]:
    """Validate and train one example; errors are results."""
    folder.mkdir(parents=True)
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    model = make_stand_in(STAND_INS[path.stem], folder / "model")
    data = make_rows(config["datasets"][0]["type"], folder)
    stand_in = stand_in_config(config, model, data, folder)
    started = time.monotonic()
    result: dict[str, Any] = {
        "valid": _failure(lambda: validate(config)),
        "trained": _failure(lambda: train(stand_in, folder)),
    }
    result["seconds"] = time.monotonic() - started
    if not result["trained"]:
        result["plan"] = json.loads((folder / "out" / "layersel" / "plan.json").read_text(encoding="utf-8"))
        result["layers"] = trained_layers(folder, model, config.get("adapter"))
        state = json.loads((folder / "out" / "checkpoint-2" / "trainer_state.json").read_text(encoding="utf-8"))
        result["steps"] = state["global_step"]
        if path.stem in RERUN:
            result |= rerun(stand_in, model, folder)
    return result


def sharded_example(name: str, folder: Path) -> Path:
    """The file of a stand-in's config that several processes can train on the CPU, sharded as in the example."""
    config = yaml.safe_load((EXAMPLES / f"{name}.yml").read_text(encoding="utf-8"))
    model = make_stand_in(STAND_INS[name], folder / "model")
    made = stand_in_config(config, model, make_rows(config["datasets"][0]["type"], folder), folder)
    if "deepspeed" in config:
        del made["use_cpu"]  # accelerate leaves DeepSpeed to accelerators
        made["deepspeed"] = {**config["deepspeed"], "bf16": {"enabled": False}}
    else:
        made |= {key: config[key] for key in ("fsdp_version", "fsdp_config")}
    harness = "CpuZero" if "deepspeed" in config else "CpuShards"
    made["plugins"] = [f"axolotl_test_plugins.{part}" for part in (harness, "CpuProcesses")] + config["plugins"]
    path = folder / "config.yml"
    path.write_text(yaml.safe_dump(made), encoding="utf-8")
    return path


def rerun(config: dict[str, Any], model: Path, folder: Path) -> dict[str, Any]:
    """The layers that a run from recipe.yml trains, and one from the recipe for stock axolotl; or a traceback."""
    from axolotl_layersel.plan import read_plan
    from axolotl_layersel.report.recipe import recipe_text

    texts = {
        "recipe": (folder / "out" / "layersel" / "recipe.yml").read_text(encoding="utf-8"),
        "plain": recipe_text(config, read_plan(folder / "out"), plain=True),
    }
    found: dict[str, Any] = {}
    for kind, text in texts.items():
        again = folder / kind
        again.mkdir()
        failure = _failure(lambda: train({**yaml.safe_load(text), "output_dir": str(again / "out")}, again))
        found[kind] = failure or trained_layers(again, model, config.get("adapter"))
    return found


def _failure(work: Callable[[], None]) -> str:
    try:
        work()
    except (Exception, SystemExit):
        return traceback.format_exc()
    return ""


def main(root: str, *only: str) -> None:
    """Packed examples last: axolotl patches transformers for them, for the rest of the process."""
    folder = Path(root)
    paths = [p for p in examples() if not only or p.stem in only]
    paths.sort(key=lambda p: "sample_packing: true" in p.read_text(encoding="utf-8"))
    results = {path.stem: run_example(path, folder / path.stem) for path in paths}
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
