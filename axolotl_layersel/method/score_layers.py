"""The method on one page: rows -> latent states -> deviations -> gains -> a suffix of layers.

    find the decoder stack; prove that norm and unembedding reproduce the logits     decoder_stack.py, verify_stack.py
    the semantics of the labels: bases in latent space                                              label_semantics.py
    one forward pass over the calibration sample, state by state                   scoring_pass.py, latent_states.py
        how far is each state from the semantics of its label                                       transition.py
    deviations -> each layer's share of the descent: the shape of the retention                     gain.py
    short trainings on the same rows -> how steep it is; without them a wide band      pilot.py, retention.py
    policy, coverage, budget -> the cut, and how stable it is over rows                             selection.py

Sources and what is our own: the docstrings there. Nothing here knows axolotl.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from axolotl_layersel.method import gain as gains
from axolotl_layersel.method import selection
from axolotl_layersel.method.calibration import Row
from axolotl_layersel.method.pilot import PilotSettings, run_pilot
from axolotl_layersel.method.pilot_training import PilotError
from axolotl_layersel.method.retention import (
    RetentionLaw,
    family_of,
    forward_exponent,
    forward_law,
    mostly_noise,
    pilot_law,
    unlike_the_known,
)
from axolotl_layersel.method.scoring_pass import Progress, measure
from axolotl_layersel.method.streamed_pass import measure_streamed
from axolotl_layersel.method.transition import RowStatistics
from axolotl_layersel.model.decoder_stack import find_stack
from axolotl_layersel.model.latent_states import left_as_found
from axolotl_layersel.model.layer_by_layer import LayerByLayer
from axolotl_layersel.model.weights_here import places
from axolotl_layersel.plan_parts import Pilot, Scores

Array = NDArray[np.float64]
Together = Callable[[Callable[[], RowStatistics]], list[RowStatistics]]  # do it everywhere, get everybody's result


@dataclass(frozen=True)
class ScoredCut:
    """The cut that the scores choose."""

    first_trainable: int  # k
    scores: Scores
    notes: tuple[str, ...] = ()  # what the user should know about this choice


def score_layers(
    model: nn.Module,
    rows: Sequence[Row],
    *,
    deviation: str = "cosine",
    policy: str = "coverage",
    coverage: float = 0.95,
    budget: int | float = 1.0,
    min_layers: int = 1,
    pilot: PilotSettings | None = None,
    seed: int = 42,
    batch_tokens: int = 4096,
    autocast: torch.dtype | None = None,
    way: LayerByLayer | None = None,
    share: tuple[int, int] | None = (0, 1),
    together: Together = lambda work: [work()],
    main_only: Callable[[Callable[[], Pilot | str]], Pilot | str] = lambda work: work(),
    progress: Progress = lambda rows, tokens: None,
) -> ScoredCut:
    """Score every decoder layer on `rows` and choose the suffix to train.

    Args:
        model: a causal language model as transformers loads it, quantised or not, on the device to run on, or
            wherever `way` finds it.
        rows: the calibration sample, the same on every process.
        deviation, policy, coverage, budget, min_layers: see `options.LayerSelOptions`.
        pilot: what a pilot needs to know of the run; None: the forward pass alone has to do.
        seed: of the bootstrap and the pilot.
        batch_tokens: padded tokens in one forward pass.
        autocast: the trainer's autocast dtype, None for full precision.
        way: how to run a model that does not fit the device; None: in whole forward passes.
        share: (rank, world size); this process runs rows rank, rank + world size, ...; None: it has no weights, and
            waits for the others.
        together: does the measuring on all processes and collects what they measured, or the error of one.
        main_only: does the pilot on one process and gives its result to all.
        progress: called after each batch with the rows and tokens done here.

    Raises:
        StackError, ScoringError, ValueError: the run must stop; nothing was changed.
    """
    stack = find_stack(model)
    selection.most_layers(budget, num_layers=stack.num_layers, min_layers=min_layers)

    def measured() -> RowStatistics:
        if share is None:
            return RowStatistics.empty(stack.num_layers)
        with left_as_found(model, autocast=autocast, device=way.device if way else None):
            return (partial(measure_streamed, way=way) if way else measure)(
                model,
                stack,
                rows,
                range(share[0], len(rows), share[1]),
                deviation=deviation,
                batch_tokens=batch_tokens,
                transitions=policy == "peak_gain",
                progress=progress,
            )

    parts = together(measured)
    statistics = RowStatistics.merge(parts)
    share_L = gains.descent(statistics.mean(statistics.deviation_RS))
    loss = float(statistics.mean(statistics.loss_R[:, None])[0])

    def piloted() -> Pilot | str:
        if pilot is None:
            return "no pilot was asked for"
        if way is not None and places(model, way.device) != {"here"}:
            return "a pilot trains all layers at once, and this model runs one layer at a time"
        try:
            return run_pilot(
                model, stack, rows, settings=pilot, seed=seed, batch_tokens=batch_tokens, autocast=autocast
            )
        except PilotError as error:
            return str(error)

    found = main_only(piloted)
    if isinstance(found, str) and pilot is not None and pilot.required:
        raise ValueError(f"no pilot can be run: {found}. Set `pilot: auto` to go on with the forward pass alone")
    done = None if isinstance(found, str) else found
    unlike = unlike_the_known(loss=loss, num_layers=stack.num_layers, family=family_of(model), pilot=done)
    law = (pilot_law(done) if done else forward_law(loss)).widened(unlike)

    def select(low_L: Array, gain_L: Array) -> int:
        return selection.select_cut(
            policy=policy,
            retention_L=low_L,
            gain_L=gain_L,
            coverage=coverage,
            budget=budget,
            min_layers=min_layers,
        )

    def cuts(counts_BR: Array) -> list[int]:
        """The cut of each resample, where rows count as often as is said."""
        share_BL = gains.descent(statistics.mean(statistics.deviation_RS, counts_BR))
        low_BL = law.low(share_BL)
        gain_BL = gains.transition_gain(statistics.mean(statistics.miss_RL, counts_BR))
        return [select(low_L, gain_L) for low_L, gain_L in zip(low_BL, gain_BL, strict=True)]

    num_rows = len(statistics.rows_R)
    resampled = cuts(selection.bootstrap_counts(num_rows, seed=seed))
    low_L = law.low(share_L)
    cut = select(low_L, gains.transition_gain(statistics.mean(statistics.miss_RL)))
    scores = Scores(
        deviation=statistics.mean(statistics.deviation_RS).tolist(),
        deviation_stderr=statistics.stderr(statistics.deviation_RS).tolist(),
        descent=share_L.tolist(),
        retention=law.curve(share_L).tolist(),
        retention_low=low_L.tolist(),
        retention_high=law.high(share_L).tolist(),
        gain_source="pilot" if done else "forward",
        exponent=None if done else forward_exponent(loss),
        pilot=done,
        stability={k: count / len(resampled) for k, count in selection.tally(resampled).items()},
        row_cuts=selection.tally(cuts(np.eye(num_rows))),
        tokens=int(statistics.tokens_R.sum()),
        loss=loss,
    )
    notes = [
        *_source(found, law, unlike, asked=pilot is not None),
        *_doubts(cut, scores, coverage=coverage, policy=policy),
    ]
    return ScoredCut(first_trainable=cut, scores=scores, notes=tuple(notes))


def _source(found: Pilot | str, law: RetentionLaw, unlike: Mapping[str, float], *, asked: bool) -> Iterator[str]:
    """Sentences that say where the retention comes from, what that cost, and why its band is as wide as it is."""
    if isinstance(found, str):
        why = f": {found}" if asked else ""
        yield f"how steep the retention is comes from the forward pass alone{why}; so its band is wide"
    else:
        kept = (f"{p.first_trainable}.. kept {p.retention:.2f} +- {p.retention_stderr:.2f}" for p in found.cuts[1:])
        yield (
            f"how steep the retention is comes from a pilot of {found.steps} steps of {found.rows_per_step} rows, "
            f"{found.cost_share:.3f} of the run: layers {', '.join(kept)}"
        )
        if mostly_noise(found):
            yield (
                f"the {found.heldout_rows} rows that the pilot held out gained so little, or so unequally, that their "
                "noise is most of the band: raise num_samples and pilot_share, and it holds out more"
            )
    if unlike:
        yield (
            f"the band was measured on other models than this one, which has {' and '.join(unlike)}: it is made "
            f"wider, to a factor of {law.factor:.1f} on the logarithm of the retention"
        )


def _doubts(cut: int, scores: Scores, *, coverage: float, policy: str) -> Iterator[str]:
    """Sentences that say why this choice may not hold."""
    stability = scores.stability
    if stability.get(cut, 0.0) < 0.5:
        likely = max(stability, key=lambda k: stability[k])
        rival = f" (layer {likely} in {stability[likely]:.2f})" if likely != cut else ""
        yield (
            f"the cut at layer {cut} holds in {stability.get(cut, 0.0):.2f} of the bootstrap resamples{rival}: raise "
            "num_samples for a cut that depends less on the rows drawn"
        )
    low_L = scores.retention_low or scores.retention
    if policy == "coverage" and low_L[cut] < coverage:
        yield (
            f"budget keeps the cut at layer {cut}, where the retention is {scores.retention[cut]:.3f} and may be as "
            f"low as {low_L[cut]:.3f}, and coverage asks for {coverage}: raise budget to keep the promise"
        )
