"""Tables of what was measured: retention and its noise, rates, other lengths, full fine-tuning, blocks, equal time."""

import math

import numpy as np
from curves import Curve, Run


def table(title: str, header: list[str], rows: list[list[object]]) -> None:
    if rows:
        print(f"\n### {title}\n\n| {' | '.join(header)} |\n{'|---' * len(header)}|")
        for row in rows:
            print("| " + " | ".join(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row) + " |")


def show_measured(curves: list[Curve]) -> None:
    cuts = sorted({cut for c in curves for cut in c.retention()})
    rows: list[list[object]] = []
    for c in curves:
        kept, best = c.retention(), c.best()
        if kept:
            cells = [f"{kept[k]:.3f}" if k in kept else "" for k in cuts[1:]]
            rows.append([c.task, c.base, float(np.mean([r["loss"] for r in best[0].values()])), *cells])
    table(
        "Measured retention at cut, best of the rates tried", ["task", "base", "all layers", *map(str, cuts[1:])], rows
    )
    spread = [x for c in curves if 0 in c.best() for x in c.seed_spreads()]
    if spread:
        print(
            f"\nStandard deviation of one seed ({len(spread)} cuts and rates with more than one): "
            f"{np.sqrt(np.mean(np.square(spread))):.3f}, largest {max(spread):.3f}"
        )
    noise = [c.row_noise(k) for c in curves if "base" in c.signals for k in c.retention() if k]
    if noise:
        print(f"Standard error from the choice of held-out rows: mean {np.mean(noise):.3f}, largest {max(noise):.3f}")


def show_rates(curves: list[Curve]) -> None:
    rows: list[list[object]] = []
    for c in curves:
        for cut in sorted({run["index"] for run in c.of(steps=c.steps, seed=0)}):
            tried = {r["learning_rate"]: r["loss"] for r in c.of(steps=c.steps, seed=0) if r["index"] == cut}
            if len(tried) > 1:
                cells = ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in sorted(tried.items()))
                rows.append([c.task, cut, cells, f"{c.rate(cut):g}"])
    table("Held-out loss at each rate tried, first seed", ["task", "cut", "rate: loss", "best"], rows)


def show_pilots(curves: list[Curve]) -> None:
    rows: list[list[object]] = []
    for c in curves:
        whole = c.retention()
        for steps in sorted({r["steps"] for r in c.runs if r["kind"] == "cut" and 0 < r["steps"] != c.steps}):
            short = c.retention(steps=steps)
            for cut in sorted(set(short) & set(whole) - {0}):
                power = np.log(whole[cut]) / np.log(short[cut]) if 0 < short[cut] < 1 and whole[cut] > 0 else np.nan
                rows.append([c.task, steps, cut, short[cut], whole[cut], whole[cut] - short[cut], float(power)])
    table(
        "Runs of another length, own schedule, against the whole run",
        ["task", "steps", "cut", "kept then", "kept in the whole run", "difference", "power"], rows,
    )  # fmt: skip
    rows = []
    for c in curves:
        for steps, off in sorted(c.switched_off.items()):
            rows.append([c.task, steps, ", ".join(f"{k}: {r:.3f}" for k, r in sorted(off.items()))])
    table("One run of all layers, adapters below the cut switched off", ["task", "steps", "left at cut"], rows)


def show_full(curves: list[Curve]) -> None:
    """Full fine-tuning beside LoRA, each to its own run of all layers."""
    rows: list[list[object]] = []
    for c in curves:
        full, adapters, best = c.retention(kind="full"), c.retention(), c.best(kind="full")
        for cut in sorted(full):
            run = best[cut][min(best[cut])]
            rows.append([
                c.task, cut, f"{run['learning_rate']:g}", run["loss"], full[cut], adapters.get(cut, ""),
            ])  # fmt: skip
    table("Full fine-tuning", ["task", "cut", "best rate tried", "loss", "kept", "kept with LoRA"], rows)


def show_blocks(curves: list[Curve]) -> None:
    """Layers trained alone, with everything above and below frozen, as a share of what all layers gain."""
    rows: list[list[object]] = []
    for c in curves:
        if not (kept := c.retention()):
            continue
        alone: dict[tuple[int, int], list[Run]] = {}
        for run in c.of(kind="block", steps=c.steps, seed=0):
            alone.setdefault((run["index"], run["last"]), []).append(run)
        gain = c.base - c.best()[0][0]["loss"]
        for (first, last), runs in sorted(alone.items()):
            run = min(runs, key=lambda r: r["loss"])
            share = (c.base - run["loss"]) / gain
            rows.append([c.task, f"{first} to {last}", f"{run['learning_rate']:g}", share, kept.get(first, "")])
    table("Layers trained alone", ["task", "layers", "best rate tried", "kept", "all from the first on keep"], rows)


def step_cost(cut: int, layers: int, *, cached: bool) -> float:
    """A LoRA step above a cut, to one of all layers; with the prefix cache the mean of three epochs, one to fill it."""
    plain = 1 - cut / layers / 2
    return (plain + 2 * (1 - cut / layers)) / 3 if cached else plain


def show_equal_time(curves: list[Curve]) -> None:
    """Runs that spend on more steps what their cut saves, against all layers in the usual steps; best rates of both."""
    for cached in (False, True):
        rows: list[list[object]] = []
        for c in curves:
            best: dict[tuple[int, int, int], float] = {}
            for run in (run for run in c.runs if run["kind"] == "cut" and run["steps"] > c.steps and run["index"]):
                if abs(run["steps"] * step_cost(run["index"], c.layers, cached=cached) - c.steps) <= 0.7:
                    pair = (run["index"], run["steps"], run["seed"])
                    best[pair] = min(run["loss"], best.get(pair, math.inf))
            for (cut, steps, seed), loss in best.items():
                whole = c.best()[0][seed]["loss"]
                rows.append([c.task, cut, steps, c.base, whole, loss, (c.base - loss) / (c.base - whole)])
        how = "with the prefix cache, three epochs" if cached else "without a cache"
        table(
            f"Equal time {how}: improvement as a share of that of all layers",
            ["task", "cut", "steps", "base", f"all layers, {curves[0].steps} steps", "loss", "share"], rows,
        )  # fmt: skip
        if rows:
            shares = np.array([row[-1] for row in rows], float)
            print(f"\nMedian {np.median(shares):.3f}, at least 1 in {(shares >= 1).sum()} of {len(shares)}")
