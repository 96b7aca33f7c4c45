"""axolotl's own example configs with this plugin: what it says to each as it is, and how a tiny stand-in trains.

Each config of `LIST` gets `plugins: [layersel]`. First `find_conflicts` reads it as it is. Then the model becomes a
tiny random one of its architecture, the data local rows of its type, what needs a GPU or several of them is left out,
and axolotl trains two steps in this process: a run counts as trained if exactly the plan's layers have adapters, or
changed weights. See README.md here for the command and the results.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

from axolotl_runs import instruction_rows, make_tokenizer  # noqa: E402
from example_stand_ins import StandIn, make_stand_in, train  # noqa: E402
from models import CASES, EXPERTS, GEMMA_3N, NUM_LAYERS, Case  # noqa: E402

from axolotl_layersel.config.conflicts import find_conflicts  # noqa: E402

SEQUENCE_LEN = 512  # Llama 3's template writes a system prompt of some 100 tokens of a tiny vocabulary
SECONDS = 900  # for one config, on a busy machine
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"

# architectures of the examples that the README's table of models does not have
MORE = (
    Case("Gemma 3 (image-text model)", "Gemma3"),  # built by `make_stand_in`
    Case("Arcee", "Arcee"),
    Case("Apertus", "Apertus"),
    Case("Cohere 2", "Cohere2", {"tie_word_embeddings": True, "sliding_window": 8}),
    Case("OLMo 3", "Olmo3", {"sliding_window": 8}),
    Case("Nemotron", "Nemotron"),
    Case("Seed-OSS", "SeedOss"),
    Case("StarCoder 2", "Starcoder2", {"sliding_window": None}),
    Case("Hunyuan", "HunYuanDenseV1"),
    Case("Qwen2-MoE", "Qwen2Moe", {**EXPERTS, "decoder_sparse_step": 1, "shared_expert_intermediate_size": 16}),
    Case("ERNIE 4.5", "Ernie4_5"),
    Case(
        "Qwen3.5 (hybrid)",
        "Qwen3_5Text",
        {
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    Case("LFM2", "Lfm2", {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False}),
    Case("GLM-4 MoE", "Glm4Moe", {**EXPERTS, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}),
    Case(
        "Jamba (hybrid)",
        "Jamba",
        {
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_d_conv": 4,
            "mamba_expand": 2,
            "use_mamba_kernels": False,
        },
    ),
    Case(
        "Granite 4 (hybrid)",
        "GraniteMoeHybrid",
        {
            **EXPERTS,
            "layer_types": ["mamba", "attention"] * 2,
            "shared_intermediate_size": 16,
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_n_groups": 1,
            "mamba_d_state": 8,
            "mamba_chunk_size": 8,
        },
    ),
)
MODELS: Mapping[str, Case] = {case.name: case for case in (*CASES, *MORE, GEMMA_3N)}

# config -> architecture, by the name in MODELS
LIST: Mapping[str, str] = {
    "LiquidAI/lfm2-350m-fft.yaml": "LFM2",
    "apertus/apertus-8b-qlora.yaml": "Apertus",
    "arcee/afm-4.5b-qlora.yaml": "Arcee",
    "archived/cerebras/qlora.yml": "GPT-2",
    "archived/code-llama/13b/qlora.yml": "Llama",
    "archived/code-llama/7b/lora.yml": "Llama",
    "archived/falcon/config-7b-lora.yml": "Falcon",
    "archived/falcon/config-7b.yml": "Falcon",
    "archived/gemma/qlora.yml": "Gemma",
    "archived/gptj/qlora.yml": "GPT-J",
    "archived/openllama-3b/config.yml": "Llama",
    "archived/pythia/lora.yml": "GPT-NeoX (parallel block)",
    "archived/pythia-12b/config.yml": "GPT-NeoX (parallel block)",
    "archived/qwen/qwen2-moe-lora.yaml": "Qwen2-MoE",
    "archived/qwen/qwen2-moe-qlora.yaml": "Qwen2-MoE",
    "archived/stablelm-2/1.6b/fft.yml": "StableLM",
    "archived/stablelm-2/1.6b/lora.yml": "StableLM",
    "archived/starcoder2/qlora.yml": "StarCoder 2",
    "archived/tiny-llama/pretrain.yml": "Llama",
    "archived/tiny-llama/qlora.yml": "Llama",
    "archived/xgen-7b/xgen-7b-8k-qlora.yml": "Llama",
    "archived/yi-34B-chat/qlora.yml": "Llama",
    "cohere/command-r-7b-qlora.yml": "Cohere 2",
    "deepcogito/cogito-v1-preview-llama-3B-lora.yml": "Llama 3.2 (tied)",
    "deepcogito/cogito-v1-preview-qwen-14B-lora.yml": "Qwen2",
    "deepseek-v2/qlora-fsdp-2_5.yaml": "DeepSeek-V3",
    "distributed-parallel/qwen3-8b-fsdp-tp-cp.yaml": "Qwen3",
    "ebft/llama-1b-ebft-strided.yaml": "Llama 3.2 (tied)",
    "expert_parallel/qwen3_30ba3b_ep_lora_4gpu.yaml": "Qwen3-MoE",
    "falcon-h1/falcon-h1-1b-qlora.yaml": "Falcon-H1 (hybrid)",
    "falcon-h1/falcon-h1-1b-qlora-cp.yaml": "Falcon-H1 (hybrid)",
    "gemma2/qlora.yml": "Gemma 2 (soft-cap)",
    "gemma2/reward-model.yaml": "Gemma 2 (soft-cap)",
    "gemma3/gemma-3-1b-qlora.yml": "Gemma 3 text",
    "gemma3/gemma-3-4b-qlora.yml": "Gemma 3 (image-text model)",
    "gemma3n/gemma-3n-e2b-qlora.yml": "Gemma 3n",
    "glm4/qlora-32b.yaml": "GLM-4",
    "glm45/glm-45-air-qlora.yaml": "GLM-4 MoE",
    "gpt-oss/gpt-oss-20b-fft-deepspeed-zero3.yaml": "gpt-oss",
    "gpt-oss/gpt-oss-20b-fft-fsdp2.yaml": "gpt-oss",
    "gpt-oss/gpt-oss-20b-sft-lora-singlegpu.yaml": "gpt-oss",
    "granite4/granite-4.0-tiny-fft.yaml": "Granite 4 (hybrid)",
    "hunyuan/hunyuan-v1-dense-qlora.yaml": "Hunyuan",
    "jamba/qlora.yaml": "Jamba (hybrid)",
    "llama-2/lisa.yml": "Llama",
    "llama-2/loftq.yml": "Llama",
    "llama-2/lora.yml": "Llama",
    "llama-2/relora.yml": "Llama",
    "llama-3/fft-8b.yaml": "Llama",
    "llama-3/instruct-dpo-lora-8b.yml": "Llama",
    "llama-3/instruct-lora-8b.yml": "Llama",
    "llama-3/lora-1b-deduplicate-dpo.yml": "Llama 3.2 (tied)",
    "llama-3/lora-1b-deduplicate-sft.yml": "Llama 3.2 (tied)",
    "llama-3/lora-1b-kernels.yml": "Llama 3.2 (tied)",
    "llama-3/lora-1b-sample-packing-sequentially.yml": "Llama 3.2 (tied)",
    "llama-3/lora-1b.yml": "Llama 3.2 (tied)",
    "llama-3/qlora-1b-gdpo.yaml": "Llama 3.2 (tied)",
    "llama-3/qlora-1b-kto.yaml": "Llama 3.2 (tied)",
    "llama-3/qlora-fsdp-70b.yaml": "Llama",
    "mistral/config.yml": "Mistral",
    "mistral/dpo/mistral-dpo-qlora.yml": "Mistral",
    "mistral/lora.yml": "Mistral",
    "mistral/mixtral/mixtral-qlora-fsdp.yml": "Mixtral",
    "mistral/mixtral/mixtral.yml": "Mixtral",
    "mistral/mixtral/mixtral_22.yml": "Mixtral",
    "mistral/orpo/mistral-qlora-orpo.yml": "Mistral",
    "nemotron-h/nano-30b-a3b-qlora.yaml": "Nemotron-H (hybrid)",
    "nemotron/nemotron-mini-4b-qlora.yaml": "Nemotron",
    "olmo3/olmo3-7b-qlora.yaml": "OLMo 3",
    "phi/lora-3.5.yaml": "Phi-3",
    "phi/phi-ft.yml": "Phi (parallel block)",
    "phi/phi-qlora.yml": "Phi (parallel block)",
    "phi/phi3-ft-fsdp.yml": "Phi-3",
    "phi/phi3-ft.yml": "Phi-3",
    "qwen2/dpo.yaml": "Qwen2.5 (tied)",
    "qwen2/prm.yaml": "Qwen2.5 (tied)",
    "qwen2/qlora-fsdp.yaml": "Qwen2",
    "qwen2/reward-model.yaml": "Qwen2.5 (tied)",
    "qwen3-next/qwen3-next-80b-a3b-qlora.yaml": "Qwen3-Next (hybrid)",
    "qwen3/32b-qlora.yaml": "Qwen3",
    "qwen3/8b-lora-fused-attn.yaml": "Qwen3",
    "seed-oss/seed-oss-36b-qlora.yaml": "Seed-OSS",
    "streaming/pretrain.yaml": "Llama 3.2 (tied)",
    "streaming/sft.yaml": "Llama 3.2 (tied)",
    # in axolotl 0.21 alone
    "distributed-parallel/llama3-8b-ringmaster-cp.yaml": "Llama",
    "dft/gemma-3-1b-dft.yml": "Gemma 3 text",
    "ernie4_5/0.3b-sft.yaml": "ERNIE 4.5",
    "minicpm5/fft-2b.yaml": "Llama",
    "minicpm5/lora-2b.yaml": "Llama",
    "nebius-serverless/lora-1b.yml": "Llama 3.2 (tied)",
    "nemotron-diffusion/lora-smoke.yaml": "Llama",
    "qwen3.8/27b-qlora.yaml": "Qwen3.5 (hybrid)",
}

# what a stand-in replaces or leaves out: hardware, several devices, other plugins' options, services, saving, and
# what names the real model and its tokenizer
LEFT_OUT = re.compile(
    r"fsdp|deepspeed|attn_implementation|flash_|xformers|flex_|fused_attn|liger_|cut_cross|torch_compile|tiled_mlp|qat$"
    r"|\w*parallel_size$|dp_|(context|expert)_parallel|use_(kernels|scattermoe|sonicmoe|otel)|quantize_moe|experts_impl|otel_"
    r"|wandb|swanlab|use_swanlab|hub_|bfloat16|fp16|float16|fp8|device_map|activation_offloading|model_type"
    r"|tokenizer_|trust_remote|revision|is_llama|evals_per|eval_|evaluation_|early_stopping|saves_per|save_|val_set"
    r"|test_datasets|resume|auto_resume|warmup|batch_size|unfrozen_parameters|model_config|experimental_|low_cpu|hf_use"
    r"|load_best|load_in_8bit|max_packed|peft$|model_quantization|do_causal|loss_watchdog|resize_token|ddp"
)
TURNS = ["<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|eot_id|>", "<|start_header_id|>"]
TURNS += ["<|end_header_id|>", "<|begin_of_text|>", "<|end|>", "<|user|>", "<|assistant|>", "<|endoftext|>"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ENDS = {"llama3": "<|eot_id|>", "phi_3": "<|end|>", "gemma": "<end_of_turn>", "gemma3": "<end_of_turn>"}
ENDS |= dict.fromkeys(("chatml", "qwen_25", "qwen3", "falcon_h1", "tokenizer_default"), "<|im_end|>")


# ---- the stand-in of one config ------------------------------------------------------------------------------------


def make_model(case: Case, config: Mapping[str, Any], folder: Path) -> Path:
    """The tiny model, with a tokenizer that knows the tokens that the config names."""
    if case.architecture == "Gemma3":
        return make_stand_in(StandIn("Gemma3", eos="<eos>"), folder)
    import transformers

    named = dict(config.get("special_tokens") or {})
    chat = any("chat_template" in str(entry.get("type")) for entry in config.get("datasets") or [])
    end = ENDS.get(config.get("chat_template") or "tokenizer_default", "</s>") if chat else "</s>"
    small = make_tokenizer()
    extra = [*TURNS, *(str(token) for token in named.values()), *(config.get("tokens") or [])]
    small.add_special_tokens({"additional_special_tokens": list(dict.fromkeys(extra))})
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=small.backend_tokenizer,
        bos_token=named.get("bos_token", small.bos_token),
        eos_token=named.get("eos_token", end),
        pad_token=named.get("pad_token", small.pad_token),
        model_max_length=SEQUENCE_LEN,
    )
    if chat:
        tokenizer.chat_template = CHATML
    model = case.model(
        vocab_size=len(tokenizer),
        **({"vocab_size_per_layer_input": len(tokenizer)} if case is GEMMA_3N else {}),
        max_position_embeddings=SEQUENCE_LEN,
        **({"n_positions": SEQUENCE_LEN} if "n_positions" in case.options else {}),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_rows(entry: Mapping[str, Any], rl: str | None, path: Path) -> Path:
    """Rows of the type of one entry of `datasets`."""
    kind = str(entry.get("type"))
    names = {"role": "role", "content": "content", **(entry.get("message_property_mappings") or {})}
    sharegpt = names["role"] == "from" or entry.get("message_field_role") == "from"
    names = {"role": "from", "content": "value"} if sharegpt else names
    human, model = ("human", "gpt") if sharegpt else ("user", "assistant")

    def said(role: str, text: str) -> dict[str, str]:
        return {names["role"]: role, names["content"]: text}

    rows: list[dict[str, Any]] = []
    for i, row in enumerate(instruction_rows(24)):
        question, answer, wrong = row["instruction"], row["output"], "I do not know."
        if rl == "kto":
            rows.append({"prompt": question, "completion": answer if i % 2 else wrong, "label": bool(i % 2)})
        elif rl and (kind.endswith((".argilla", ".ultra"))):
            good, bad = ([said(human, question), said(model, text)] for text in (answer, wrong))
            rows.append({"prompt": question, "chosen": good, "rejected": bad})
        elif rl and kind.startswith("chat_template"):
            pair = {entry["field_chosen"]: said(model, answer), entry["field_rejected"]: said(model, wrong)}
            rows.append({entry["field_messages"]: [said(human, question)], **pair})
        elif kind == "chat_template":
            rows.append({entry.get("field_messages", "messages"): [said(human, question), said(model, answer)]})
        elif kind in ("completion", "pretrain"):
            rows.append({entry.get("field") or "text": f"{question} {answer}"})
        else:
            rows.append(dict(row))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def stand_in(config: Mapping[str, Any], case: Case, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The config that trains here, and the names of the keys that were left out."""
    left_out = sorted(key for key, value in config.items() if LEFT_OUT.match(key) and value)
    left_out += [str(name) for name in config.get("plugins") or []]
    changed = {key: value for key, value in config.items() if value is not None and not LEFT_OUT.match(key)}
    data: dict[str, Any] = {}
    for key in ("datasets", "pretraining_dataset"):
        entries = []
        for i, entry in enumerate(config.get(key) or []):
            rows = make_rows(entry, config.get("rl"), folder / f"{key}-{i}.jsonl")
            kept = {k: v for k, v in entry.items() if k not in ("name", "data_files", "ds_type", "revision")}
            source = {"path": str(rows), "ds_type": "json"}
            if key == "pretraining_dataset" or (config.get("streaming") and config.get("sample_packing")):
                source = {"path": "json", "data_files": [str(rows)]}  # these streams are opened without ds_type
            entries.append({**kept, **source, "split": "train"})
        if entries:
            data[key] = entries
    changed |= {
        **data,
        "base_model": str(make_model(case, config, folder / "model")),
        "plugins": ["layersel"],
        "layersel": {"num_samples": 4, "report": False},
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / "out"),
        "dataset_num_proc": 0,
        "use_cpu": True,
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "sequence_len": SEQUENCE_LEN,
        "micro_batch_size": 2 if config.get("rl") == "kto" else 1,  # TRL wants pairs for KTO
        "gradient_accumulation_steps": 1,
        "num_epochs": 1,
        "max_steps": 2,
        "optimizer": "adamw_torch",
        "learning_rate": 0.01,
        "val_set_size": 0.0,
        "save_strategy": "no",
        **dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), False),
    }
    if config.get("load_in_4bit") and case.name.startswith("Falcon-H1"):
        # axolotl quantises the unembedding of Falcon-H1, and casts it: to float32 here, which bfloat16 storage of
        # packed weights does not survive (to bfloat16, on a GPU, nothing changes)
        changed["bnb_config_kwargs"] = {"bnb_4bit_quant_storage": "uint8"}
    return changed, left_out


# ---- what came of it -----------------------------------------------------------------------------------------------


def trained_layers(folder: Path, adapter: str | None) -> list[int]:
    """Decoder layers with an adapter, or with a weight that differs from the base model's, in what was saved."""
    from safetensors.torch import load_file

    number = re.compile(r"\.(\d+)\.")
    if adapter:
        names = [name for name in load_file(folder / "out" / "adapter_model.safetensors") if "lora_" in name]
    else:
        before, after = (load_file(path / "model.safetensors") for path in (folder / "model", folder / "out"))
        names = [name for name, weight in after.items() if name not in before or not before[name].equal(weight)]
    return sorted({int(found.group(1)) for name in names if (found := number.search(name))})


def refusal(error: BaseException) -> str | None:
    """The plugin's own words in an error, or None if it is not the plugin that refused."""
    if "layersel: " in str(error):
        text = str(error).split("layersel: ", 1)[1].split(" [type=")[0]
        return " ".join(text.split())
    frames = traceback.extract_tb(error.__traceback__)
    ours = bool(frames) and "axolotl_layersel" in Path(frames[-1].filename).parts
    return " ".join(str(error).split()) if ours and isinstance(error, ValueError) else None


def first_sentence(text: str) -> str:
    """Up to the first full stop, colon or semicolon that ends a clause outside of backticks."""
    return re.split(r"(?<=[a-z0-9`)])[.:;] (?=(?:[^`]*`[^`]*`)*[^`]*$)", text, maxsplit=1)[0].rstrip(".")


def without_paths(text: str, folder: Path) -> str:
    """The text with no path of this machine."""
    text = text.replace(str(folder), "FOLDER").replace(str(ROOT), "REPOSITORY")
    return re.sub(r"[\w./+-]*/site-packages/", "", text)


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """TimeoutError when the time is up."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def run_config(config: dict[str, Any], architecture: str, folder: Path) -> dict[str, Any]:
    """One entry of the results; errors are results."""
    conflicts = find_conflicts({**config, "plugins": [*(config.get("plugins") or []), "layersel"]})
    adapter = config.get("adapter")
    entry: dict[str, Any] = {
        "architecture": architecture,
        "mode": adapter or "full",
        "as_it_is": [first_sentence(text) for text in conflicts],
    }
    started = time.monotonic()
    try:
        with time_limit(SECONDS):
            changed, entry["left_out"] = stand_in(config, MODELS[architecture], folder)
            train(changed, folder)
        plan = json.loads((folder / "out" / "layersel" / "plan.json").read_text(encoding="utf-8"))
        layers = trained_layers(folder, adapter)
        if plan["num_layers"] != NUM_LAYERS or layers != plan["trainable_layers"]:
            raise AssertionError(f"trained {layers}, planned {plan['trainable_layers']} of {plan['num_layers']} layers")
        entry |= {"result": "trained", "first_trainable": plan["first_trainable"], "layers": layers}
    except (Exception, SystemExit) as error:
        said = refusal(error)
        if said is not None:
            entry |= {"result": "refused", "reason": without_paths(said, folder)}
        else:
            text = f"{type(error).__name__}: {error}".strip()
            trace = traceback.format_exc().splitlines()[-14:]
            entry |= {
                "result": "error",
                "reason": without_paths(text, folder)[:600],
                "traceback": [without_paths(line, folder)[:300] for line in trace],
            }
    entry["seconds"] = round(time.monotonic() - started, 1)
    return entry


def read_results() -> dict[str, dict[str, dict[str, Any]]]:
    """The results of every version of axolotl that was run: version -> config -> entry, in the order of `LIST`."""
    found = {}
    for path in sorted(HERE.glob("results-*.json")):
        entries = json.loads(path.read_text(encoding="utf-8"))
        found[path.stem.removeprefix("results-")] = {name: entries[name] for name in LIST if name in entries}
    return found


def outcome(entry: Mapping[str, Any] | None) -> str:
    """One cell of the README's list."""
    if entry is None:
        return "not there"
    if entry["result"] == "trained":
        return f"trained, cut {entry['first_trainable']} of {NUM_LAYERS}"
    if entry["result"] == "refused" and entry["as_it_is"]:
        return "refused"
    reason = entry["reason"].splitlines()[0]
    return f"{entry['result']}: {first_sentence(reason) if entry['result'] == 'refused' else reason[:200]}"


def table(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The README's counts and list: one column of outcomes for each version of axolotl."""
    lines = ["| axolotl | configs | architectures | as they are | stand-ins |", "|---|---|---|---|---|"]
    for number, entries in results.items():
        count = Counter(entry["result"] for entry in entries.values())
        kinds = {entry["architecture"] for entry in entries.values()}
        as_is = sum(not entry["as_it_is"] for entry in entries.values())
        lines.append(
            f"| {number} | {len(entries)} | {len(kinds)} | {as_is} accepted, {len(entries) - as_is} refused "
            f"| {count['trained']} trained, {count['refused']} refused, {count['error']} errors |"
        )
    lines += [
        "",
        f"| config | architecture | mode | as it is | {' | '.join(results)} |",
        "|---" * (4 + len(results)) + "|",
    ]
    for name in LIST:
        entries = {number: found[name] for number, found in results.items() if name in found}
        if not entries:
            continue
        newest = list(entries.values())[-1]
        answers = ["refused: " + "; ".join(e["as_it_is"]) if e["as_it_is"] else "accepted" for e in entries.values()]
        said = (
            answers[0]
            if len(set(answers)) == 1
            else "; ".join(f"{v} {a}" for v, a in zip(entries, answers, strict=True))
        )
        outcomes = [outcome(entries.get(number)) for number in results]
        cells = (f"`{name}`", newest["architecture"], newest["mode"], said, *outcomes)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def example(checkout: Path, name: str) -> Path | None:
    """Where the checkout has the config: axolotl moves old ones into `archived`; None if it is not there."""
    places = (checkout / "examples" / name, checkout / "examples" / "archived" / name)
    return next((path for path in places if path.exists()), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--axolotl", type=Path, required=True, help="checkout or source distribution of axolotl")
    parser.add_argument("--only", nargs="*", default=[], help="part of a config's name; those entries are run again")
    parser.add_argument("--table", action="store_true", help="run nothing, write the README's table from the results")
    parser.add_argument("--missing", action="store_true", help="run those that the results lack")
    args = parser.parse_args()
    output = HERE / f"results-{'.'.join(version('axolotl').split('.')[:2])}.json"
    keep = output.exists() and (args.only or args.table or args.missing)
    results: dict[str, Any] = json.loads(output.read_text(encoding="utf-8")) if keep else {}
    paths = {name: path for name in LIST if (path := example(args.axolotl, name))}
    texts = {name: path.read_text(encoding="utf-8") for name, path in paths.items()}
    names = [n for n in texts if not args.table and (not args.only or any(part in n for part in args.only))]
    names = [n for n in names if not args.missing or n not in results]
    names.sort(key=lambda n: "sample_packing: true" in texts[n])  # axolotl patches transformers for those
    root = Path(tempfile.mkdtemp(prefix="compat-"))
    for name in names:
        folder = root / re.sub(r"\W+", "-", name)
        folder.mkdir()
        results[name] = run_config(yaml.safe_load(texts[name]), LIST[name], folder)
        shutil.rmtree(folder)
        gc.collect()
        shown = {key: results[name].get(key) for key in ("result", "reason", "seconds")}
        print("COMPAT", name, json.dumps(shown), flush=True)
        ordered = {key: results[key] for key in LIST if key in results}
        output.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(root)
    readme = HERE / "README.md"
    if readme.exists():
        before, rest = readme.read_text(encoding="utf-8").split(BEGIN)
        after = rest.split(END)[1]
        readme.write_text(f"{before}{BEGIN}\n{table(read_results())}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":  # not as a script: axolotl saves data from a spawned process, which imports that again
    os.environ["PYTHONPATH"] = str(HERE)
    os.execv(sys.executable, [sys.executable, "-c", "import run; run.main()", *sys.argv[1:]])
