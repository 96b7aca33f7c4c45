"""The demo's model and data, made from the standard library of the Python that runs this file.

`prepare` writes a small language model that has really been trained (8 decoder layers, on the library's source text)
and instruction data (a function's signature -> the first paragraph of its docstring) for `demo-lora.yml` and
`demo-qlora.yml`. About every tenth top-level module is held out: no line of it is seen in pretraining or fine-tuning,
and the losses that `prepare` and `summary` report are measured on those modules. Nothing is downloaded, and equal
installations give equal data.

    python example_configs/demo.py prepare           # about two minutes on two cores
    accelerate launch --cpu -m axolotl.cli.train example_configs/demo-lora.yml
    python example_configs/demo.py summary example_configs/demo/work/lora
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import random
import sysconfig
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

WORK = Path(__file__).parent / "demo" / "work"
END, PAD = "<|endoftext|>", "<|pad|>"
HELD_OUT_SHARE = 10  # one top-level module in ten
EVAL_ROWS = 320  # of the held-out rows, so that measuring takes seconds
# Tests and bundled copies are no part of the library's own text; codec tables are no text; the rest differs by machine.
SKIPPED = {"test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "encodings", "_bundled", "__pycache__"}
SKIPPED |= {"site-packages", "dist-packages"}


@dataclass(frozen=True)
class Module:
    """One source file of the standard library."""

    name: str  # dotted, "json.decoder"
    source: str

    @property
    def held_out(self) -> bool:
        """Decided by the top-level name, so that a package is on one side as a whole."""
        digest = hashlib.sha256(self.name.partition(".")[0].encode()).digest()
        return digest[0] % HELD_OUT_SHARE == 0


@dataclass(frozen=True)
class Row:
    """One example in the alpaca format."""

    instruction: str  # the signature
    input: str  # always empty; the format has the field
    output: str  # first paragraph of the docstring


@dataclass(frozen=True)
class Recipe:
    """How the base model is made; a saved model that was made otherwise is made again."""

    vocab_size: int = 2048
    hidden_size: int = 128
    intermediate_size: int = 384  # a multiple of 32: bitsandbytes' 4-bit products on a CPU need it
    layers: int = 8
    heads: int = 4
    window: int = 128  # tokens
    batch: int = 8  # windows in a step
    steps: int = 600
    learning_rate: float = 0.02  # of the matrices in the layers; embeddings and unembedding have a fifth of it
    seed: int = 7


def library_modules(root: Path | None = None) -> list[Module]:
    """The Python files of the standard library (or of `root`), in the order of their names."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    modules = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED.isdisjoint(parts) and not parts[0].startswith(("config-", "_sysconfigdata")):
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            modules.append(Module(name, path.read_text(encoding="utf-8", errors="replace")))
    return modules


def documented_functions(tree: ast.AST, prefix: str) -> Iterator[Row]:
    """Functions and methods that have a docstring of 15 to 240 characters in its first paragraph."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            paragraph = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            signature = f"{prefix}.{node.name}({ast.unparse(node.args)})"
            if 15 <= len(paragraph) <= 240 and len(signature) <= 160:
                yield Row(signature, "", paragraph)
        elif isinstance(node, ast.ClassDef):
            yield from documented_functions(node, f"{prefix}.{node.name}")
        elif isinstance(node, ast.If | ast.Try):
            yield from documented_functions(node, prefix)


def instruction_data(modules: list[Module], *, seed: int = 7) -> tuple[list[Row], list[Row]]:
    """Rows for training and rows of held-out modules.

    No signature and no output occurs twice, neither in one of them nor across both.
    """
    train: list[Row] = []
    held_out: list[Row] = []
    seen: set[str] = set()
    for module in sorted(modules, key=lambda m: m.held_out):  # what occurs on both sides stays on the training side
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old library code
            tree = ast.parse(module.source)
        for row in documented_functions(tree, module.name):
            if seen.isdisjoint({row.instruction, row.output}):
                seen |= {row.instruction, row.output}
                (held_out if module.held_out else train).append(row)
    random.Random(seed).shuffle(train)
    random.Random(seed).shuffle(held_out)
    return train, held_out


def write_rows(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), encoding="utf-8")


def train_tokenizer(texts: list[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every text round-trips, and no token is unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)


def windows(texts: list[str], tokenizer: PreTrainedTokenizerFast, *, length: int) -> Tensor:
    """All texts behind one another, cut into windows that share one token: (windows, length + 1) int64."""
    import torch

    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids, tokenizer.eos_token_id]
    return torch.tensor(ids).unfold(0, length + 1, length)


def mean_loss(model: torch.nn.Module, windows_NT: Tensor, *, batch: int = 16) -> float:
    """Nats for each token."""
    import torch

    model.eval()
    with torch.no_grad():
        losses = [model(input_ids=part, labels=part).loss.item() * len(part) for part in windows_NT.split(batch)]
    return sum(losses) / len(windows_NT)


def bigram_loss(train_NT: Tensor, held_out_NT: Tensor, *, vocab_size: int) -> float:
    """Held-out nats for each token of a bigram backed off to a unigram, at the best of four strengths."""
    import torch

    previous, following = train_NT[:, :-1].flatten(), train_NT[:, 1:].flatten()
    unigram_V = torch.bincount(following, minlength=vocab_size).float() + 0.1
    unigram_V /= unigram_V.sum()
    pairs_VV = torch.bincount(previous * vocab_size + following, minlength=vocab_size**2).view(vocab_size, vocab_size)
    seen_V = pairs_VV.sum(-1)
    previous, following = held_out_NT[:, :-1].flatten(), held_out_NT[:, 1:].flatten()

    def loss(strength: float) -> float:
        smoothed = pairs_VV[previous, following] + strength * unigram_V[following]
        return float(-(smoothed / (seen_V[previous] + strength)).log().mean())

    return min(loss(strength) for strength in (3.0, 10.0, 30.0, 100.0))


def pretrain(model: torch.nn.Module, windows_NT: Tensor, recipe: Recipe) -> None:
    """Muon for the matrices of the layers and AdamW for the rest; a short warm-up, then linear decay to zero.

    On this little text Muon needs about half the steps of AdamW alone.
    """
    import torch

    matrices = {name: p for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2}
    others = [p for name, p in model.named_parameters() if name not in matrices]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices.values(), lr=recipe.learning_rate, weight_decay=0.1),
        torch.optim.AdamW(others, lr=recipe.learning_rate / 5, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    schedules = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    order = torch.randperm(len(windows_NT), generator=torch.Generator().manual_seed(recipe.seed))
    model.train()
    start = time.monotonic()
    for step in range(recipe.steps):
        for group, highest in schedules:
            group["lr"] = highest * min(1.0, (step + 1) / 20, 1.02 - step / recipe.steps)
        picked = order[torch.arange(step * recipe.batch, (step + 1) * recipe.batch) % len(order)]
        part = windows_NT[picked]
        loss = model(input_ids=part, labels=part).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            seconds = time.monotonic() - start
            print(f"  step {step + 1} of {recipe.steps}, loss {loss.item():.3f}, {seconds:.0f} s", flush=True)


def build_model(modules: list[Module], folder: Path, recipe: Recipe) -> dict[str, float]:
    """Train tokenizer and model, check on held-out modules that the model has learned, save both.

    Returns:
        Held-out losses in nats for each token, before and after, and the bigram's.

    Raises:
        SystemExit: the model does not beat a bigram, so it is no language model worth fine-tuning.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    texts = [m.source for m in modules if not m.held_out]
    tokenizer = train_tokenizer(texts, vocab_size=recipe.vocab_size)
    train_NT = windows(texts, tokenizer, length=recipe.window)
    held_out_NT = windows([m.source for m in modules if m.held_out], tokenizer, length=recipe.window)
    held_out_NT = held_out_NT[:: math.ceil(len(held_out_NT) / 256)]
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=recipe.vocab_size,
            hidden_size=recipe.hidden_size,
            intermediate_size=recipe.intermediate_size,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads,
            max_position_embeddings=512,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            use_cache=False,
        )
    )
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    tokens = recipe.steps * recipe.batch * recipe.window / 1e6
    print(f"model: {recipe.layers} layers, {millions:.1f} M parameters, trained on {tokens:.1f} M tokens", flush=True)
    facts = {"before": mean_loss(model, held_out_NT)}
    pretrain(model, train_NT, recipe)
    facts["after"] = mean_loss(model, held_out_NT)
    facts["bigram"] = bigram_loss(train_NT, held_out_NT, vocab_size=recipe.vocab_size)
    if not facts["after"] < facts["bigram"]:
        raise SystemExit(
            f"the base model has not learned: {facts['after']:.3f} nats for each held-out token, and a bigram has "
            f"{facts['bigram']:.3f}. Give its recipe more than {recipe.steps} steps, in {__file__}"
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return facts


def prepare(work: Path, recipe: Recipe) -> None:
    """Write the data, and the model unless the same recipe has already made it from the same library."""
    start = time.monotonic()
    modules = library_modules()
    train, held_out = instruction_data(modules)
    write_rows(work / "train.jsonl", train)
    write_rows(work / "eval.jsonl", held_out[:EVAL_ROWS])
    print(f"data: {len(train)} rows from the standard library, {len(held_out[:EVAL_ROWS])} from held-out modules, e.g.")
    print(f"  {train[0].instruction} -> {train[0].output}", flush=True)
    made_of = json.dumps(asdict(recipe)) + "".join(m.name + m.source for m in modules)
    fingerprint = hashlib.sha256(made_of.encode("utf-8", errors="replace")).hexdigest()
    record = work / "model" / "demo.json"
    if record.exists() and json.loads(record.read_text())["fingerprint"] == fingerprint:
        print("model: already trained")
        return
    facts = build_model(modules, work / "model", recipe)
    record.write_text(json.dumps({"fingerprint": fingerprint, **facts}, indent=1))
    print(
        f"model: held-out loss {facts['before']:.3f} before, {facts['after']:.3f} after {recipe.steps} steps "
        f"(bigram {facts['bigram']:.3f}); {time.monotonic() - start:.0f} s"
    )


def summary(output_dir: Path) -> None:
    """Print the table and the cut of a finished run, its losses before and after, and where its plan is.

    Raises:
        SystemExit: no checkpoint, so the run has not finished.
    """
    from axolotl_layersel.plan import read_plan
    from axolotl_layersel.report.table import print_plan

    states = sorted(output_dir.glob("checkpoint-*/trainer_state.json"), key=lambda p: int(p.parent.name.split("-")[1]))
    if not states:
        raise SystemExit(f"{output_dir} holds no checkpoint; train first: see the commands at the top of {__file__}")
    history = json.loads(states[-1].read_text(encoding="utf-8"))["log_history"]
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    plan = read_plan(output_dir)
    print_plan(plan)
    print(f"\nlayers trained   {plan.first_trainable} to {plan.num_layers - 1} of {plan.num_layers}")
    print(f"held-out loss    {losses[0]:.3f} before, {losses[-1]:.3f} after fine-tuning (nats for each answer token)")
    print(f"plan             {output_dir / 'layersel' / 'plan.json'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("prepare", help="write the data and train the base model")
    making.add_argument("--work", type=Path, default=WORK, help="folder to write to")
    showing = commands.add_parser("summary", help="show what a finished run chose and learned")
    showing.add_argument("output_dir", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "prepare":
        prepare(arguments.work, Recipe())
    else:
        summary(arguments.output_dir)


if __name__ == "__main__":
    main()
