"""The evidence as arrays: measured retention of every cut beside what was measured before training; no figure of merit here.

Retention(k) = (base - loss_k) / (base - loss_0): the share of the improvement of training all layers that a cut keeps.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
RIVALS = ("block_influence", "cka", "gradient", "relative_gradient", "spectrum")
OURS = ("uniform", "remaining", "drop", "transition")


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
        """Token-weighted mean of a per-row signal over the first `rows` rows, or over rows as often as `counts_R` says."""
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
    elif name in ("block_influence", "length"):
        w = pair.mean(name, counts_R, rows)
    elif name.startswith("transition"):
        w = pair.mean("miss_without_norm" if deviation == "cosine_without_norm" else "miss", counts_R, rows)
        w = {"transition": first_as_mean, "transition_first_raw": np.asarray, "transition_first_next": first_as_next}[name](w)
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
        "shift_share": (base - shifted["100"]) / base,
        "shift_nats": base - shifted["100"],
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
        for cut in sorted({line["index"] for line in cut_lines}):
            at = [line for line in cut_lines if line["index"] == cut]
            best = min((line for line in at if line["seed"] == 0), key=lambda line: line["loss"], default=None)
            if best is None:
                continue
            losses[cut] = {0: best["loss"]}
            for line in at:
                if line["seed"] != 0:
                    losses[cut][line["seed"]] = line["loss"]
        layers = len(found["layers"]["spectrum"])
        if not base or 0 not in losses or layers - 1 not in losses:
            continue
        single = {line["index"]: line["loss"] for line in mine if line["kind"] == "single"}
        pairs.append(Pair(found["model"], found["task"], layers, base[0], sorted(losses), losses, single, found))
    return pairs
