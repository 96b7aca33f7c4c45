"""Predicted against measured: calibration, exponent, rivals at equal cost, stability; tables and figures.

    python analyse.py                                                  # results/fitted, which set the defaults
    python analyse.py results/heldout --fitted-on results/fitted       # models that had no part in them
    python analyse.py work/cpu --save results/mine --figures work/cpu/figures

A folder of evidence holds `runs.jsonl` of oracle.py and `signals/` of signals.py.
"""

import argparse
from pathlib import Path

import numpy as np
from evidence import Pair, compact, load, scalars, weights
from merits import (
    across_seeds,
    at_equal_cost,
    best_cuts,
    bootstrap,
    calibration,
    chosen_cut,
    errors,
    fit_constant,
    fit_scalar,
    leave_out,
    measured_at,
    predicted,
    regret,
    single_layer_correlation,
    stability,
    step_cost,
)
from scipy.stats import spearmanr

from axolotl_layersel.method.gain import RETENTION_EXPONENT, WEIGHTS, layer_weights, retention

CONTROLS = ("uniform", "ramp", "ramp:squared", "ramp:cubed")  # none of them looks at data
OURS = (
    "remaining", "entering", "drop", "transition", "remaining@logit_lens", "drop@logit_lens",
    "remaining@semantic_loss", "drop@semantic_loss",
)  # fmt: skip
ABLATIONS = (
    "remaining@cosine_without_norm", "drop@cosine_without_norm", "transition@cosine_without_norm",
    "drop:first_raw", "drop:first_next", "drop:first_zero", "transition:first_raw", "transition:first_next",
    "transition:first_min", "transition:first_zero",
    "drop:half", "drop@logit_lens:half", "transition:half", "transition:squared",
    "relative_drop", "relative_drop@logit_lens", "change", "length:first_mean", "turn:first_mean",
)  # fmt: skip
RIVALS = (
    "block_influence", "block_influence:first_mean", "cka", "cka:first_mean", "gradient", "gradient:first_mean",
    "gradient:first_mean:squared", "gradient_128:first_mean", "relative_gradient", "relative_gradient:first_mean",
    "spectrum", "spectrum:first_mean",
)  # fmt: skip


def show_measured(pairs: list[Pair]) -> None:
    print(
        "\n### Measured retention\n\n"
        "| model | task | base | all layers | seeds | retention at cut |\n|---|---|---|---|---|---|"
    )
    for p in pairs:
        curve = ", ".join(f"{k}: {r:.3f}" for k, r in zip(p.cuts, p.measured, strict=True))
        print(f"| {p.model} | {p.task} | {p.base:.3f} | {p.loss(0):.3f} | {len(p.seeds)} | {curve} |")


def show_calibration(pairs: list[Pair], names: tuple[str, ...]) -> None:
    print("\n### Calibration, one exponent fitted on other models or tasks\n")
    print(
        "| weights | exponent | MAE | better than uniform by (95 %) | worst | kept at 0.95: least | mean | step cost |"
    )
    print("|---|---|---|---|---|---|---|---|")
    control = _pair_errors(pairs, "uniform")
    for weight in names:
        c = calibration(pairs, weight, lambda rest, w=weight: fit_constant(rest, w))
        gains = [u - e for u, e in zip(control, _pair_errors(pairs, weight), strict=True)]
        low, high = bootstrap(gains)
        exponent = fit_constant(pairs, weight)(pairs[0])
        print(
            f"| {weight} | {exponent:.3f} | {c['mae']:.4f} | {np.mean(gains):+.4f} ({low:+.4f} to {high:+.4f}) "
            f"| {c['worst']:.3f} | {c['least_kept']:.3f} | {c['mean_kept']:.3f} | {c['cost']:.2f} |",
            flush=True,
        )


def _pair_errors(pairs: list[Pair], weight: str) -> list[float]:
    """Mean absolute held-out error of every pair, over both ways of leaving out."""
    found = []
    for by in ("task", "model"):
        left = leave_out(pairs, by, lambda rest: fit_constant(rest, weight))
        found.append({(p.model, p.task): float(np.abs(errors([p], weight, lambda _, b=b: b)).mean()) for p, b in left})
    return [float(np.mean([table[p.model, p.task] for table in found if table])) for p in pairs]


def show_scalars(pairs: list[Pair], weight: str) -> None:
    print(f"\n### Exponent from a scalar of the same forward pass, weights `{weight}`\n")
    print(
        "| scalar | rank correlation with the pair's own exponent | MAE | worst | least kept | step cost |\n"
        "|---|---|---|---|---|---|"
    )
    own = [fit_constant([p], weight)(p) for p in pairs]
    c = calibration(pairs, weight, lambda rest: fit_constant(rest, weight))
    print(f"| none (constant) | | {c['mae']:.4f} | {c['worst']:.3f} | {c['least_kept']:.3f} | {c['cost']:.2f} |")
    for scalar in scalars(pairs[0]):
        rho = spearmanr([scalars(p)[scalar] for p in pairs], own)[0]
        c = calibration(pairs, weight, lambda rest, s=scalar: fit_scalar(rest, weight, s))
        print(
            f"| {scalar} | {rho:+.2f} | {c['mae']:.4f} | {c['worst']:.3f} | {c['least_kept']:.3f} | {c['cost']:.2f} |",
            flush=True,
        )
    bound = np.mean([np.abs(errors([p], weight, lambda _, b=b: b)).mean() for p, b in zip(pairs, own, strict=True)])
    print(f"\nEvery pair with its own exponent (a bound, not a prediction): MAE {bound:.4f}; exponents: ", end="")
    print(", ".join(f"{p.model}/{p.task} {b:.3f}" for p, b in zip(pairs, own, strict=True)))


def show_choices(pairs: list[Pair], names: tuple[str, ...]) -> None:
    print(
        "\n### What is kept and spent\n\n"
        "| choice | mean kept | least kept | step cost | median regret | worst regret |\n|---|---|---|---|---|---|"
    )
    for name, cut_of in (
        ("all layers", lambda p: 0),
        ("fixed cut at 25 %", lambda p: p.layers // 4),
        ("fixed cut at 50 %", lambda p: p.layers // 2),
        ("fixed cut at 75 %", lambda p: 3 * p.layers // 4),
        ("last 2 layers", lambda p: p.layers - 2),
    ):
        _choice(name, [(p, float(cut_of(p))) for p in pairs])
    random = [(p, float(cut)) for p in pairs for cut in range(p.layers)]
    _choice("random cut", random)
    for weight in names:
        for coverage in (0.9, 0.95):
            left = leave_out(pairs, "task", lambda rest, w=weight: fit_constant(rest, w))
            cuts = [(p, float(chosen_cut(predicted(p, weights(p, weight), b), coverage))) for p, b in left]
            _choice(f"{weight}, coverage {coverage}", cuts)
    print("\n### Equal mean step cost (0.75): the signal decides which model and task gets more layers\n")
    print("| signal | mean kept | least kept |\n|---|---|---|")
    for weight in (*CONTROLS, *names[1:], *RIVALS):
        kept, least = at_equal_cost(pairs, weight, 0.75)
        print(f"| {weight} | {kept:.4f} | {least:.4f} |")
    cuts = best_cuts(pairs, 0.75)
    kept_P = [measured_at(p, cut) for p, cut in zip(pairs, cuts, strict=True)]
    print(
        f"| a bound: the best cuts, known from these very runs ({cuts}) | {np.mean(kept_P):.4f} | {min(kept_P):.4f} |"
    )
    if len(pairs[0].seeds) > 1:
        known, fixed = across_seeds(pairs, 0.75)
        print(f"\nThe best cuts of one seed keep {known:.4f} in the others, a fixed cut at half {fixed:.4f}.")


def _outcome(cuts: list[tuple[Pair, float]]) -> tuple[list[float], float, list[float]]:
    """What is kept of every pair, the mean step cost, and the regret of every pair."""
    kept = [measured_at(p, cut) for p, cut in cuts]
    cost = float(np.mean([step_cost(p, cut) for p, cut in cuts]))
    return kept, cost, [regret(p, cut) for p, cut in cuts]


def _choice(name: str, cuts: list[tuple[Pair, float]]) -> None:
    kept, cost, lost = _outcome(cuts)
    print(f"| {name} | {np.mean(kept):.3f} | {min(kept):.3f} | {cost:.2f} | {np.median(lost):.3f} | {max(lost):.3f} |")


def show_single(pairs: list[Pair]) -> None:
    told = [p for p in pairs if len(p.single) >= p.layers // 2]
    if not told:
        return
    print(
        "\n### Rank correlation with the measured gain of one layer alone\n\n| signal | "
        + " | ".join(f"{p.model}/{p.task}" for p in told)
        + " |"
    )
    print("|---" * (len(told) + 1) + "|")
    for weight in ("remaining", "drop", "transition", "drop@logit_lens", *RIVALS):
        print(f"| {weight} | " + " | ".join(f"{single_layer_correlation(p, weight):+.2f}" for p in told) + " |")


def show_other_runs(pairs: list[Pair]) -> None:
    """Full fine-tuning, longer runs, and the compute that a cut saves spent on more steps."""
    print("\n### Other runs: retention at cut\n\n| model | task | run | retention |\n|---|---|---|---|")
    for p in pairs:
        runs = {"full fine-tuning": p.full} | {f"LoRA, {steps} steps": losses for steps, losses in p.longer.items()}
        for name, losses in runs.items():
            if 0 in losses and len(losses) > 1:
                kept = {k: (p.base - loss) / (p.base - losses[0]) for k, loss in sorted(losses.items())}
                print(
                    f"| {p.model} | {p.task} | {name} | " + ", ".join(f"{k}: {r:.3f}" for k, r in kept.items()) + " |"
                )
    print("\nEqual time (the saved compute spent on more steps), loss relative to all layers in the base steps:\n")
    print("| model | task | cut | steps | retention against all layers |\n|---|---|---|---|---|")
    for p in pairs:
        for steps, losses in p.longer.items():
            for cut, loss in losses.items():
                if 0 not in losses:
                    kept = (p.base - loss) / (p.base - p.losses[0][0])
                    print(f"| {p.model} | {p.task} | {cut} | {steps} | {kept:.3f} |")


def show_shipped(pairs: list[Pair]) -> None:
    """What the package itself predicts from these rows, with its own weights and exponent."""
    print(f"\n### The package's own prediction (exponent {RETENTION_EXPONENT}), coverage 0.95\n")
    print("| gain | MAE | bias | worst | least kept | mean kept | step cost | median regret | worst regret |")
    print("|---|---|---|---|---|---|---|---|---|")
    for gain in WEIGHTS:
        error, cuts = [], []
        for p in pairs:
            weight_L = layer_weights(gain, deviation_S=p.mean("cosine"), miss_L=p.mean("miss"))
            curve = retention(weight_L, exponent=RETENTION_EXPONENT)
            error.append((curve[p.cuts] - p.measured)[1:])
            cuts.append((p, float(chosen_cut(curve, 0.95))))
        e = np.concatenate(error)
        kept, cost, lost = _outcome(cuts)
        print(
            f"| {gain} | {np.abs(e).mean():.4f} | {e.mean():+.4f} | {np.abs(e).max():.3f} | {min(kept):.3f} "
            f"| {np.mean(kept):.3f} | {cost:.2f} | {np.median(lost):.3f} | {max(lost):.3f} |"
        )


def show_transfer(pairs: list[Pair], fitted: list[Pair], names: tuple[str, ...]) -> None:
    """Every choice of weights with the exponent of the fitted evidence: nothing of these pairs has a part in it."""
    print("\n### Exponents fitted on other models, coverage 0.95\n")
    print("| weights | exponent | MAE | better than uniform by (95 %) | least kept | mean kept | step cost |")
    print("|---|---|---|---|---|---|---|")
    control: list[float] = []
    for weight in names:
        exponent = fit_constant(fitted, weight)
        misses = [float(np.abs(errors([p], weight, exponent)).mean()) for p in pairs]
        control = control or misses
        gains = [c - m for c, m in zip(control, misses, strict=True)]
        low, high = bootstrap(gains)
        cuts = [(p, float(chosen_cut(predicted(p, weights(p, weight), exponent(p)), 0.95))) for p in pairs]
        kept, cost, _ = _outcome(cuts)
        print(
            f"| {weight} | {exponent(pairs[0]):.3f} | {np.mean(misses):.4f} | {np.mean(gains):+.4f} "
            f"({low:+.4f} to {high:+.4f}) | {min(kept):.3f} | {np.mean(kept):.3f} | {cost:.2f} |"
        )


def show_stability(pairs: list[Pair], names: tuple[str, ...]) -> None:
    print("\n### Stability: share of resamples with the cut of all rows (spread of the cut, in layers)\n")
    sizes = (16, 32, 64, 128, 256, 512)
    print("| weights | " + " | ".join(f"{size} rows" for size in sizes) + " |\n" + "|---" * (len(sizes) + 1) + "|")
    for weight in names:
        exponent = fit_constant(pairs, weight)(pairs[0])
        cells = []
        for size in sizes:
            found = [stability(p, weight, exponent, size) for p in pairs]
            cells.append(f"{np.mean([f[0] for f in found]):.2f} ({np.mean([f[1] for f in found]):.2f})")
        print(f"| {weight} | " + " | ".join(cells) + " |")


def draw(pairs: list[Pair], names: tuple[str, ...], folder: Path) -> None:
    """Measured curves with the prediction of each choice of weights, and predicted against measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    columns = min(4, len(pairs))
    lines = -(-len(pairs) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3.2 * columns, 2.6 * lines), sharey=True, squeeze=False)
    for axis, p in zip(axes.flat, pairs, strict=False):
        axis.plot(p.cuts, p.measured, "ko-", markersize=4, label="measured")
        for weight in names:
            exponent = {
                (q.model, q.task): b for q, b in leave_out(pairs, "task", lambda rest, w=weight: fit_constant(rest, w))
            }
            axis.plot(predicted(p, weights(p, weight), exponent[p.model, p.task]), linewidth=1, label=weight)
        axis.set_title(f"{p.model} / {p.task}", fontsize=9)
        axis.set_xlabel("first trainable layer")
    axes[0, 0].set_ylabel("retention")
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(folder / "retention.png", dpi=130)


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evidence", type=Path, nargs="?", default=here / "results" / "fitted", help="folder")
    parser.add_argument("--fitted-on", type=Path, help="folder of the evidence that exponents are taken from")
    parser.add_argument("--save", type=Path, help="folder for a compact copy of the evidence")
    parser.add_argument("--figures", type=Path)
    parser.add_argument(
        "--weights", nargs="+", default=["uniform", "transition", "transition:first_min"], help="shown in detail"
    )
    args = parser.parse_args()
    pairs = load(args.evidence)
    if len({p.task for p in pairs}) < 2:
        raise SystemExit(
            f"{len(pairs)} complete pairs in {args.evidence}; leaving one out needs two tasks: run more of the sweep"
        )
    names = tuple(args.weights)
    show_measured(pairs)
    show_calibration(pairs, (*CONTROLS, *OURS, *ABLATIONS, *RIVALS))
    for weight in names[:2]:
        show_scalars(pairs, weight)
    show_choices(pairs, names)
    show_shipped(pairs)
    if args.fitted_on:
        show_transfer(pairs, load(args.fitted_on), (*CONTROLS, *OURS, *ABLATIONS, *RIVALS))
    show_single(pairs)
    show_other_runs(pairs)
    show_stability(pairs, names)
    if args.figures:
        draw(pairs, names, args.figures)
    if args.save:
        compact(args.evidence, args.save)


if __name__ == "__main__":
    main()
