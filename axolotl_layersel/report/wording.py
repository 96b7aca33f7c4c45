"""What a plan says, in words and in numbers: shared by the table, the figures, the page, the card and the trackers.

Everything is made from the `Plan` alone and stays useful where parts of it are missing: a cut that was given by hand
has no scores. Plans are shared as files, so every text that comes out of one here has its control characters removed:
it can be printed on a terminal. Sentences of our own are ASCII.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from axolotl_layersel.plan import Plan
from axolotl_layersel.plan_parts import CacheCosts, PeakMemory, Prediction

UNITS = {"cosine": "1 - cosine", "logit_lens": "logit lens (nats)"}
BAND_95 = 1.96  # standard errors
TALLEST = 3.0  # in a chart of shares, a bar that exceeds the next one by this factor is cut off and labelled
SALF = (
    "Gu, Aleti, Chen, Zhang. A Semantic-Aware Layer-Freezing Approach to Computation-Efficient Fine-Tuning of "
    "Language Models. Findings of ACL 2025. arXiv:2406.11753"
)
COSTS = {  # what a prediction holds -> what people call it
    "step": "FLOPs of a step",
    "backward": "FLOPs of its backward pass",
    "saved_activation_bytes": "activation memory",
    "trainable_parameters": "trainable parameters and optimizer state",
}


def printable(text: object) -> str:
    """The text without control characters, such as the escape that starts a terminal's commands, and on one line."""
    return "".join(c if c.isprintable() else " " for c in str(text))


def per_cut(plan: Plan, name: str) -> list[float] | None:
    """The retention or a predicted cost of every cut 0..L-1, relative to training every layer; None if not known."""
    part = plan.scores if name == "retention" else plan.prediction and plan.prediction.per_cut
    values = None if part is None else getattr(part, name)
    return None if values is None else list(values)


def every_layer(plan: Plan, name: str) -> float | None:
    """The amount of a cost (bytes, a number of parameters) when every layer is trained, or None."""
    if plan.prediction is None or not getattr(plan.prediction, name):
        return None
    return float(getattr(plan.prediction.absolute, name) / getattr(plan.prediction, name))


def shares(counts: Mapping[Any, float] | None) -> dict[int, float]:
    """Shares by cut, sum 1, from counts or shares by cut; empty where there are none."""
    total = sum((counts or {}).values())
    return {int(cut): value / total for cut, value in sorted((counts or {}).items(), key=lambda c: int(c[0])) if total}


def mode_name(plan: Plan) -> str:
    """How the layers are trained, in words."""
    return {"lora": "LoRA", "qlora": "QLoRA", None: "full fine-tuning"}[plan.adapter]


def model_name(plan: Plan) -> str:
    """The base model; for a folder on this machine, its last part."""
    return _without_place(plan.base_model)


def dataset_name(plan: Plan) -> str:
    """The data that the layers were scored on, or an empty string; for a file on this machine, its last part."""
    return ", ".join(_without_place(path) for path in plan.sample.datasets) if plan.sample else ""


def subject(plan: Plan) -> str:
    """Model, kind of training and data on one line."""
    return ", ".join(part for part in (model_name(plan), mode_name(plan), dataset_name(plan)) if part)


def _without_place(path: object) -> str:
    name = printable(path).rstrip("/")
    return name.rsplit("/", 1)[-1] if name.startswith(("/", "./", "../", "~")) else name


def layer_range(first: int, last: int) -> str:
    """Layers `first` to `last`, both included, in words."""
    return f"layer {first}" if first == last else f"layers {first} to {last}"


def summary(plan: Plan) -> dict[str, str]:
    """The lines under the table: the cut, what is trained, what it saves, what it holds, how to have it again."""
    cache, memory = (plan.prediction.cache, plan.prediction.memory) if plan.prediction else (None, None)
    lines = {
        "cut": _cut(plan),
        "trained": _trained(plan),
        "predicted": _predicted(plan),
        **({"cache": cache_line(cache, without=plan.prediction.step)} if cache and plan.prediction else {}),
        **({"memory": memory_line(memory)} if memory else {}),
        "again": f"{recipe(plan)}   (scores nothing)",
    }
    return {name: printable(text) for name, text in lines.items()}


def notes(plan: Plan) -> list[str]:
    """What the user should know about this choice."""
    return [printable(note) for note in plan.notes]


def recipe(plan: Plan) -> str:
    """The line of YAML that gives this cut without scoring."""
    return f"layersel: {{first_layer: {plan.first_trainable}}}"


def _cut(plan: Plan) -> str:
    k, last = plan.first_trainable, plan.num_layers - 1
    if plan.scores is None:
        return f"first trainable layer {k} of 0 to {last}; given, nothing was scored."
    policy = plan.options.get("policy")
    by = f", by {policy}" + (f" {plan.options.get('coverage')}" if policy == "coverage" else "") if policy else ""
    text = f"first trainable layer {k} of 0 to {last}{by}; predicted to keep "
    text += f"{plan.scores.retention[k]:.3f} of the improvement"
    if plan.scores.retention_low and plan.scores.retention_high:
        text += f" ({plan.scores.retention_low[k]:.3f} to {plan.scores.retention_high[k]:.3f})"
    resampled = shares(plan.scores.stability)
    if not resampled:
        return f"{text}."
    own = resampled.pop(k, 0.0)
    rivals = sorted(resampled.items(), key=lambda c: (-c[1], c[0]))[:2]
    others = " (" + ", ".join(f"{share:.2f} choose {cut}" for cut, share in rivals) + ")" if rivals else ""
    return f"{text}. {own:.2f} of the resamples choose it{others}."


def _trained(plan: Plan) -> str:
    k, count = plan.first_trainable, plan.num_layers
    if k == 0:
        return f"every decoder layer ({count} of {count}), {mode_name(plan)}."
    return (
        f"{layer_range(k, count - 1)} ({count - k} of {count}), {mode_name(plan)}; {layer_range(0, k - 1)} "
        f"{'is' if k == 1 else 'are'} frozen."
    )


def _predicted(plan: Plan) -> str:
    if plan.prediction is None:
        return "no cost is known for this plan."
    costs = ", ".join(f"{label} {getattr(plan.prediction, name):.2f}" for name, label in COSTS.items())
    floor = f" No cut brings a step below {plan.prediction.floor:.2f}."
    why = f" {plan.prediction.why}" if plan.prediction.why else ""
    return f"{costs} of training every layer, {checkpointing(plan.prediction)}.{floor}{why}"


def cache_line(cache: CacheCosts, *, without: float) -> str:
    """What a prefix cache saves and takes, in a sentence or two.

    Args:
        without: the step ratio, and so that of the whole run, without a cache.
    """
    size = (
        f"{cache.bytes_per_token} bytes for each token" if cache.state_bytes is None else gigabytes(cache.state_bytes)
    )
    where = {"ram": " in memory", "disk": " on disk", "auto": ""}[cache.asked]
    leaves = f" {gigabytes(cache.offloaded_bytes)} of frozen weights leave the device." if cache.offloaded_bytes else ""
    return (
        f"FLOPs of the whole run {cache.whole_run:.2f} of training every layer ({without:.2f} without a prefix cache): "
        f"{cache.first_epoch:.2f} in the first epoch, filling included, {cache.later_epochs:.2f} in later ones, "
        f"{cache.epochs:.3g} epochs. States take {size}{where}.{leaves}"
    )


def memory_line(memory: PeakMemory) -> str:
    """What a training step holds on its device, in a sentence."""
    away = f" ({gigabytes(memory.offloaded)} more left the device)" if memory.offloaded else ""
    return (
        f"{gigabytes(memory.total)} at the peak of a step, {gigabytes(memory.all_layers)} when every layer is trained: "
        f"weights {gigabytes(memory.weights)}{away}, gradients {gigabytes(memory.gradients)}, optimizer "
        f"{gigabytes(memory.optimizer)}, activations {gigabytes(memory.activations)}, logits or recomputation "
        f"{gigabytes(memory.passing)}."
    )


def gigabytes(count: float) -> str:
    """An amount in GB (1e9 bytes), or in MB where it is small."""
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def checkpointing(prediction: Prediction) -> str:
    """Under which gradient checkpointing a prediction holds."""
    return f"{'with' if prediction.gradient_checkpointing else 'without'} gradient checkpointing"
