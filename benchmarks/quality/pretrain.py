"""Pretrains a small language model on any text, as a base model for the oracle benchmark.

A base model must have learned a language before "which layers to fine-tune" means anything, so the script measures
held-out loss against two models without layers, a unigram and an interpolated bigram fitted on as many tokens as the
network has read, and exits with an error when the network does not beat both. The tokenizer (byte-level BPE) is trained
on the same text. One document in twenty is never trained on; `tasks.py` draws its near task from them.

    python pretrain.py --text my_text_folder/ --arch llama --size cpu --minutes 11 --output work/models/llama-cpu

`--text` takes a text file, a folder of text files, or a .jsonl / .jsonl.xz whose rows have a `text` field.
"""

import argparse
import json
import lzma
import math
import random
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

SIZES = {  # hidden size, feed-forward size of a gated MLP, layers, heads
    "quick": (64, 176, 12, 2),
    "cpu": (192, 512, 12, 6),
    "cpu-deep": (192, 512, 16, 6),
    "cpu-wide": (224, 608, 12, 7),
    "gpu-60m": (512, 1408, 12, 8),
    "gpu-deep": (384, 1024, 24, 6),
    "gpu-150m": (768, 2048, 16, 12),
}
END = "<|endoftext|>"


def read_documents(path: Path) -> list[str]:
    """The documents of a text file, a folder of text files, or a .jsonl / .jsonl.xz with a `text` field."""
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix in {".txt", ".md", ".rst", ".py"})
        files = [file for file in found if not {"site-packages", "test", "tests"} & set(file.relative_to(path).parts)]
        return [file.read_text(encoding="utf-8", errors="replace") for file in files]
    if path.name.endswith((".jsonl", ".jsonl.xz")):
        opened = lzma.open if path.suffix == ".xz" else open
        with opened(path, "rt", encoding="utf-8") as lines:
            return [json.loads(line)["text"] for line in lines if line.strip()]
    return [part for part in path.read_text(encoding="utf-8").split("\n\n\n") if part.strip()]


def split_documents(documents: list[str], *, holdout: float = 0.05, seed: int = 0) -> tuple[list[str], list[str]]:
    """Shuffles the documents and keeps the last share of them out of pretraining."""
    if len(documents) < 2:
        raise ValueError(f"got {len(documents)} documents; at least two are needed: give more text")
    documents = list(documents)
    random.Random(seed).shuffle(documents)
    cut = max(1, round(len(documents) * holdout))
    return documents[:-cut], documents[-cut:]


def within(documents: list[str], *, characters: int) -> list[str]:
    """The first documents that hold that many characters together."""
    kept, size = [], 0
    for document in documents:
        if kept and size + len(document) > characters:
            break
        kept.append(document)
        size += len(document)
    return kept


def train_tokenizer(documents: list[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over at most 8 million characters of the training documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(within(documents, characters=8_000_000), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END, bos_token=END)


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    """One long stream of token ids with an end-of-text token after each document."""
    ids: list[int] = []
    for document in documents:
        ids.extend(tokenizer(document, verbose=False)["input_ids"])
        ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids, dtype=torch.int32)


def build_model(arch: str, *, size: str, vocab_size: int, seed: int) -> PreTrainedModel:
    """A randomly initialised model: `llama` (sequential block, tied head) or `neox` (parallel block, separate head)."""
    hidden, feed_forward, layers, heads = SIZES[size]
    torch.manual_seed(seed)
    if arch == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab_size,
                hidden_size=hidden,
                intermediate_size=feed_forward,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=heads,
                max_position_embeddings=2048,
                tie_word_embeddings=True,
                bos_token_id=0,
                eos_token_id=0,
                pad_token_id=0,
            )
        )
    if arch == "neox":
        return GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=vocab_size,
                hidden_size=hidden,
                intermediate_size=hidden * 4,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                max_position_embeddings=2048,
                use_parallel_residual=True,
                tie_word_embeddings=False,
                bos_token_id=0,
                eos_token_id=0,
                pad_token_id=0,
            )
        )
    raise ValueError(f"got arch {arch!r}; allowed: 'llama' (sequential block), 'neox' (parallel block)")


def ngram_losses(train: torch.Tensor, heldout: torch.Tensor, *, vocab_size: int) -> tuple[float, float]:
    """Held-out nats for each token of a unigram and of an interpolated bigram (best of five weights)."""
    train, heldout = train.long(), heldout.long()
    counts = torch.bincount(train, minlength=vocab_size).double() + 0.1
    unigram = counts / counts.sum()
    pairs, pair_counts = torch.unique(train[:-1] * vocab_size + train[1:], return_counts=True)
    queries = heldout[:-1] * vocab_size + heldout[1:]
    slots = torch.searchsorted(pairs, queries).clamp(max=len(pairs) - 1)
    seen = torch.where(pairs[slots] == queries, pair_counts[slots], 0).double()
    conditional = seen / torch.bincount(train[:-1], minlength=vocab_size).double().clamp(min=1)[heldout[:-1]]
    marginal = unigram[heldout[1:]]
    bigram = min(float(-(w * conditional + (1 - w) * marginal).log().mean()) for w in (0.5, 0.7, 0.8, 0.9, 0.95))
    return float(-marginal.log().mean()), bigram


@torch.no_grad()
def heldout_loss(model: PreTrainedModel, stream: torch.Tensor, *, length: int, windows: int = 64) -> float:
    """Mean nats for each token over evenly spaced windows of the held-out stream, in float32."""
    model.eval()
    device = next(model.parameters()).device
    starts = torch.linspace(0, len(stream) - length - 1, windows).long().tolist()
    total = 0.0
    for at in range(0, windows, 8):
        rows = torch.stack([stream[start : start + length].long() for start in starts[at : at + 8]]).to(device)
        total += float(model(input_ids=rows, labels=rows).loss) * len(rows)
    model.train()
    return total / windows


def pretrain(
    model: PreTrainedModel,
    stream: torch.Tensor,
    *,
    minutes: float,
    length: int,
    rows: int,
    learning_rate: float,
    seed: int,
) -> dict[str, float]:
    """AdamW in bfloat16 autocast until the time is up; the rate warms up, then falls to zero with the clock."""
    device = next(model.parameters()).device
    decayed = [p for p in model.parameters() if p.ndim == 2]
    plain = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)
    generator = torch.Generator().manual_seed(seed)
    started, step, tokens, running = time.monotonic(), 0, 0, float("nan")
    while (done := (time.monotonic() - started) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / 60) * (1 - done)
        starts = torch.randint(0, len(stream) - length - 1, (rows,), generator=generator).tolist()
        batch = torch.stack([stream[start : start + length].long() for start in starts]).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, tokens = step + 1, tokens + batch.numel()
        running = loss.item() if math.isnan(running) else 0.98 * running + 0.02 * loss.item()
        if step % 50 == 0:
            print(f"step {step} share {done:.2f} training loss {running:.3f}", flush=True)
    return {"steps": step, "tokens": tokens, "seconds": time.monotonic() - started, "training_loss": running}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--arch", choices=("llama", "neox"), required=True)
    parser.add_argument("--size", choices=tuple(SIZES), default="cpu")
    parser.add_argument("--minutes", type=float, default=11.0)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, help="folder of an earlier model whose tokenizer is used again")
    parser.add_argument("--init", type=Path, help="folder of a model to train further, its tokenizer included")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--max-characters", type=int, default=400_000_000, help="most text to tokenise")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--keep-untrained", action="store_true", help="no error for a model that has not learned")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    train_documents, heldout_documents = split_documents(read_documents(args.text))
    if args.init or args.tokenizer:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.init or args.tokenizer)
    else:
        tokenizer = train_tokenizer(train_documents, vocab_size=args.vocab_size)
    train_documents = within(train_documents, characters=args.max_characters)
    stream, heldout = encode(tokenizer, train_documents), encode(tokenizer, heldout_documents)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model(args.arch, size=args.size, vocab_size=len(tokenizer), seed=args.seed)
    if args.init:
        model = type(model).from_pretrained(args.init, dtype=torch.float32)
    model.to(device)
    facts = pretrain(
        model,
        stream,
        minutes=args.minutes,
        length=args.length,
        rows=args.rows,
        learning_rate=args.learning_rate,
        seed=args.seed,
    )
    loss = heldout_loss(model, heldout, length=args.length)
    earlier = json.loads((args.init / "pretraining.json").read_text(encoding="utf-8")) if args.init else {}
    for name in ("steps", "tokens", "seconds"):
        facts[name] += earlier.get(name, 0)
    unigram, bigram = ngram_losses(stream[: int(facts["tokens"])], heldout, vocab_size=len(tokenizer))
    facts |= {
        "heldout_loss": loss,
        "unigram_loss": unigram,
        "bigram_loss": bigram,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "learned": loss < min(unigram, bigram),
    }
    model.to(torch.float32).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    (args.output / "pretraining.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(facts), flush=True)
    if not facts["learned"] and not args.keep_untrained:
        raise SystemExit(
            f"not trained: held-out loss {loss:.3f} does not beat unigram ({unigram:.3f}) and bigram ({bigram:.3f}); "
            "give more --minutes, or a smaller --size"
        )


if __name__ == "__main__":
    main()
