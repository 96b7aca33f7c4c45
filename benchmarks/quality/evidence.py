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


def first_as_mean(weight_L: Array) -> Array:
    """Layer 0 gets the mean of the others."""
    return np.concatenate([[weight_L[1:].mean()], weight_L[1:]])


def first_as_next(weight_L: Array) -> Array:
    """Layer 0 gets what layer 1 has."""
    return np.concatenate([weight_L[1:2], weight_L[1:]])


def deviation_of(weight: str) -> tuple[str, str]:
    """`drop@logit_lens` -> (`drop`, `logit_lens`); cosine with the final norm where none is named."""
    name, _, deviation = weight.partition("@")
    return name, deviation or "cosine"


def weights(pair: Pair, weight: str, counts_R: Array | None = None, rows: int = 128) -> Array:
    """Layer weights, (L,), >= 0, sum 1; `weight` is `SOURCE[@DEVIATION]` or a rival's signal."""
    name, deviation = deviation_of(weight)
    if name == "uniform":
        w = np.ones(pair.layers)
    elif name in ("gradient", "relative_gradient", "spectrum", "cka"):
        w = np.array(pair.signals["layers"][name])  # type: ignore[index]
    elif name == "gradient_squared":
        w = np.array(pair.signals["layers"]["gradient"]) ** 2  # type: ignore[index]
    elif name in ("block_influence", "length"):
        w = pair.mean(name, counts_R, rows)
    elif name.startswith("transition"):
        w = pair.mean("miss_without_norm" if deviation == "cosine_without_norm" else "miss", counts_R, rows)
        w = {"transition": first_as_mean, "transition_first_raw": np.asarray, "transition_first_next": first_as_next}[
            name
        ](w)
    else:
        d = pair.mean(deviation, counts_R, rows)
        drops = np.maximum(d[:-1] - d[1:], 0)
        w = {
            "remaining": lambda: d[1:],
            "entering": lambda: d[:-1],
            "remaining_excess": lambda: d[1:] - 0.9 * d.min(),
            "drop": lambda: first_as_mean(drops),
            "drop_first_raw": lambda: drops,
            "drop_first_next": lambda: first_as_next(drops),
            "drop_first_zero": lambda: np.concatenate([[0.0], drops[1:]]),
            "change": lambda: first_as_mean(np.abs(d[:-1] - d[1:])),
        }[name]()
    w = np.maximum(w, 0)
    return w / w.sum() if w.sum() > 0 else np.full(pair.layers, 1 / pair.layers)


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


def load(runs: Path, signals: Path) -> list[Pair]:
    """Pairs that have signals and a complete grid with at least one seed."""
    lines = [json.loads(line) for line in runs.read_text(encoding="utf-8").splitlines()]
    pairs = []
    for file in sorted(signals.glob("*.json")):
        found = json.loads(file.read_text(encoding="utf-8"))
        mine = [line for line in lines if (line["model"], line["task"]) == (found["model"], found["task"])]
        base = [line["loss"] for line in mine if line["kind"] == "base"]
        steps = max((line["steps"] for line in mine if line["kind"] == "cut" and line["index"] == 0), default=0)
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
        pairs.append(Pair(found["model"], found["task"], layers, base[0], sorted(losses), losses, single, found))
    return pairs


def compact(runs: Path, signals: Path, folder: Path) -> None:
    """A copy of the evidence that is small enough for a repository: row sums of two signals, means of the others."""
    (folder / "signals").mkdir(parents=True, exist_ok=True)
    lines = list(dict.fromkeys(runs.read_text(encoding="utf-8").splitlines()))
    (folder / "runs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for file in signals.glob("*.json"):
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
