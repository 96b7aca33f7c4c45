"""The evidence as arrays: measured retention of every cut beside what was measured before training.

Retention(k) = (base - loss_k) / (base - loss_0): the share of the improvement of training all layers that a cut keeps.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Pair:
    """One model on one task."""

    model: str
    task: str
    layers: int
    base: float  # held-out loss before fine-tuning
    cuts: list[int]  # grid cuts with a measured loss, cut 0 first
    losses: dict[int, dict[int, float]]  # cut -> seed -> held-out loss, at the tuned rate
    single: dict[int, float]  # layer -> held-out loss of LoRA on that layer alone
    full: dict[int, float]  # cut -> held-out loss of full fine-tuning
    longer: dict[int, dict[int, float]]  # steps -> cut -> held-out loss of LoRA runs of another length
    signals: dict[str, object]  # file of signals.py

    @property
    def seeds(self) -> list[int]:
        return sorted(set.intersection(*(set(by_seed) for by_seed in self.losses.values())))

    def loss(self, cut: int, seeds: list[int] | None = None) -> float:
        return float(np.mean([self.losses[cut][seed] for seed in seeds or self.seeds]))

    def retention(self, cut: int, seeds: list[int] | None = None) -> float:
        return (self.base - self.loss(cut, seeds)) / (self.base - self.loss(0, seeds))

    @property
    def measured(self) -> Array:
        """Retention at every cut of the grid."""
        return np.array([self.retention(cut) for cut in self.cuts])

    def mean(self, name: str, counts_R: Array | None = None, rows: int = 128) -> Array:
        """Token-weighted mean of a signal over the first `rows` rows, or over rows as often as `counts_R` says.

        Compact evidence has rows for two signals only; the others are means over 128 rows.
        """
        if name not in self.signals["rows"]:  # type: ignore[operator]
            return np.array(self.signals["means"][name])  # type: ignore[index]
        table, tokens = np.array(self.signals["rows"][name]), np.array(self.signals["rows"]["tokens"])[:, 0]  # type: ignore[index]
        counts = np.zeros(len(tokens)) if counts_R is None else counts_R
        if counts_R is None:
            counts[:rows] = 1
        return np.asarray(counts @ table / (counts @ tokens))


FIRST = {  # what layer 0 gets instead of its own value, which leaving the embedding space makes an outlier
    "first_raw": lambda w: w[0],
    "first_mean": lambda w: w[1:].mean(),
    "first_next": lambda w: w[1],
    "first_min": lambda w: w[1:].min(),
    "first_zero": lambda w: 0.0,
}
BY_ROW = ("block_influence", "length", "turn", "turn_without_norm", "length_without_norm")
OF_LAYERS = ("gradient", "relative_gradient", "gradient_128", "relative_gradient_128", "spectrum", "cka")


def raw_weights(pair: Pair, name: str, deviation: str, counts_R: Array | None, rows: int) -> Array:
    """The signal of every layer, (L,), before any treatment; larger = more to gain."""
    if name == "uniform":
        return np.ones(pair.layers)
    if name == "ramp":  # as blind to the data as equal weights, but more towards the output
        return np.arange(1.0, pair.layers + 1)
    if name in OF_LAYERS:
        return np.array(pair.signals["layers"][name])  # type: ignore[index]
    if name in BY_ROW:
        return pair.mean(name, counts_R, rows)
    if name == "transition":
        return pair.mean("miss_without_norm" if deviation == "cosine_without_norm" else "miss", counts_R, rows)
    d = pair.mean(deviation, counts_R, rows)
    return {
        "remaining": d[1:],
        "entering": d[:-1],
        "drop": np.maximum(d[:-1] - d[1:], 0),
        "change": np.abs(d[:-1] - d[1:]),
        "relative_drop": np.maximum(d[:-1] - d[1:], 0) / d[:-1],
    }[name]


def weights(pair: Pair, weight: str, counts_R: Array | None = None, rows: int = 128) -> Array:
    """Layer weights, (L,), >= 0, sum 1.

    Args:
        pair: whose signals are read.
        weight: `SOURCE[@DEVIATION][:TREATMENT]...`; without a name the deviation is the cosine with the final norm;
            treatments are those of layer 0 (`drop`, `change` and `transition` have `first_mean` unless told otherwise),
            `squared`, `cubed`, and `half` (mixed half and half with equal weights).
        counts_R: how often each row occurs; the first `rows` rows once where not given.
        rows: rows of the sample.
    """
    source, *treatments = weight.split(":")
    name, _, deviation = source.partition("@")
    w = np.maximum(raw_weights(pair, name, deviation or "cosine", counts_R, rows), 0)
    first = [treatment for treatment in treatments if treatment in FIRST]
    if not first and name in ("drop", "relative_drop", "change", "transition"):
        first = ["first_mean"]
    for treatment in first:
        w = np.concatenate([[FIRST[treatment](w)], w[1:]])
    if "squared" in treatments:
        w = w**2
    if "cubed" in treatments:
        w = w**3
    w = w / w.sum() if w.sum() > 0 else np.full(pair.layers, 1 / pair.layers)
    return (w + 1 / pair.layers) / 2 if "half" in treatments else w


def tails(weight_L: Array) -> Array:
    """Sum of the weights of layers k..L-1 for every k."""
    return np.clip(np.cumsum(weight_L[::-1])[::-1], 1e-12, 1)


def scalars(pair: Pair) -> dict[str, float]:
    """What might set the exponent, each from forward passes over the sample."""
    marginal = pair.signals["marginal"]
    shifted: dict[str, float] = marginal["shifted"]  # type: ignore[index, assignment]
    base: float = marginal["loss"]  # type: ignore[index, assignment]
    unigram: float = marginal["unigram"]  # type: ignore[index, assignment]
    d = pair.mean("cosine")
    lens = pair.mean("logit_lens")
    return {
        "shift_share": (base - shifted["1000"]) / base,
        "shift_nats": base - shifted["1000"],
        "divergence": marginal["divergence"],  # type: ignore[dict-item, index]
        "loss": base,
        "unigram": unigram,
        "unigram_gain": base - unigram,
        "entropy_gap": base - marginal["entropy"],  # type: ignore[operator, index]
        "final_deviation": float(d[-1]),
        "lowest_deviation": float(d.min()),
        "fall": float((d[1] - d[-1]) / d[1]),
        "late_fall": float((d[pair.layers // 2] - d[-1]) / d[pair.layers // 2]),
        "lens_fall": float((lens[pair.layers // 2] - lens[-1]) / lens[pair.layers // 2]),
    }


def load(folder: Path) -> list[Pair]:
    """Pairs of a folder with `runs.jsonl` and `signals/` that have a complete grid with at least one seed."""
    lines = [json.loads(line) for line in (folder / "runs.jsonl").read_text(encoding="utf-8").splitlines()]
    pairs = []
    for file in sorted((folder / "signals").glob("*.json")):
        found = json.loads(file.read_text(encoding="utf-8"))
        mine = [line for line in lines if (line["model"], line["task"]) == (found["model"], found["task"])]
        base = [line["loss"] for line in mine if line["kind"] == "base"]
        lengths = [line["steps"] for line in mine if line["kind"] == "cut"]
        steps = max(set(lengths), key=lengths.count, default=0)  # runs of another length are extra evidence
        cut_lines = [line for line in mine if line["kind"] == "cut" and line["steps"] == steps]
        losses: dict[int, dict[int, float]] = {}
        for line in cut_lines:
            losses.setdefault(line["index"], {})[line["seed"]] = line["loss"]
        if 0 in losses:
            losses = {cut: by_seed for cut, by_seed in losses.items() if set(by_seed) & set(losses[0])}
        layers = len(found["layers"]["spectrum"])
        if not base or 0 not in losses or layers - 1 not in losses:
            continue
        single = {line["index"]: line["loss"] for line in mine if line["kind"] == "single"}
        full = {line["index"]: line["loss"] for line in mine if line["kind"] == "full"}
        longer: dict[int, dict[int, float]] = {}
        for line in mine:
            if line["kind"] == "cut" and line["steps"] != steps and line["seed"] == 0:
                longer.setdefault(line["steps"], {})[line["index"]] = line["loss"]
        name, task = found["model"], found["task"]
        pairs.append(Pair(name, task, layers, base[0], sorted(losses), losses, single, full, longer, found))
    return pairs


def compact(evidence: Path, folder: Path) -> None:
    """A copy of the evidence that is small enough for a repository: row sums of two signals, means of the others."""
    (folder / "signals").mkdir(parents=True, exist_ok=True)
    lines = list(dict.fromkeys((evidence / "runs.jsonl").read_text(encoding="utf-8").splitlines()))
    (folder / "runs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for file in (evidence / "signals").glob("*.json"):
        found = json.loads(file.read_text(encoding="utf-8"))
        rows = found["rows"]
        tokens = np.array(rows["tokens"])[:128]
        found["rows"] = {"tokens": tokens[:, 0:1].tolist()}
        found["means"] = {}
        for name, table in rows.items():
            sums = np.array(table)[:128]
            if name in ("cosine", "miss"):
                found["rows"][name] = [[float(f"{x:.4g}") for x in row] for row in sums]
            elif name != "tokens":
                found["means"][name] = [float(f"{x:.6g}") for x in sums.sum(0) / tokens.sum()]
        (folder / "signals" / file.name).write_text(json.dumps(found, separators=(",", ":")) + "\n", encoding="utf-8")
