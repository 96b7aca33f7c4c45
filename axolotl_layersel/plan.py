"""The plan: which layers to train and why, as a value that can be saved, read, shared and applied.

Computing a plan (`method/`, `cost/`) and applying it (`training/`, `integration/`) meet only here. The file is
versioned JSON with a stable key order, written atomically; a reader never sees half of one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

SCHEMA_VERSION = 2
PLAN_FILE = "plan.json"
PLAN_FOLDER = "layersel"
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)  # for a file that was edited by hand


class PlanError(ValueError):
    """A plan cannot be read, or it was made for something else than what it is applied to."""


@dataclass(frozen=True)
class PilotCut:
    """One training of a pilot, at the best rate that it tried."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    first_trainable: int  # k: layers k..L-1 were trained
    learning_rate: float
    loss: float  # on the held-out rows afterwards, nats per token
    retention: float  # share of the improvement of training all layers
    retention_stderr: float  # over the held-out rows


@dataclass(frozen=True)
class Pilot:
    """Short trainings on the calibration rows, from which the exponent of the retention comes."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    steps: int
    rows_per_step: int
    rows: int  # trained on
    heldout_rows: int
    base_loss: float  # on the held-out rows before training, nats per token
    cuts: list[PilotCut]  # all layers first
    exponent: float  # of the pilot's own retentions
    cost_share: float  # of the run, as planned: tokens times trained layers
    seconds: float


@dataclass(frozen=True)
class Scores:
    """What scoring found. Lists are by decoder layer (L) or latent state (L + 1), input side first."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    deviation: list[float]  # L + 1
    deviation_stderr: list[float]  # L + 1, rows as the independent units
    descent: list[float]  # L, >= 0, sum 1: each layer's share of the fall of the deviation
    retention: list[float]  # L; entry k: predicted share of the improvement when layers k..L-1 are trained
    stability: dict[int, float]  # cut -> share of the bootstrap resamples that choose it
    row_cuts: dict[int, int]  # cut -> number of single rows that would choose it
    tokens: int  # scored tokens
    loss: float | None = None  # cross-entropy before training, nats per token; no logit scale, no soft-cap
    retention_low: list[float] | None = None  # L; lower end of a 90 % band around the retention; what coverage asks
    retention_high: list[float] | None = None  # L; upper end
    gain_source: Literal["forward", "pilot"] = "forward"  # where the exponent of the retention comes from
    exponent: float | None = None  # retention(k) = (sum of descent over i >= k) ** exponent
    pilot: Pilot | None = None


@dataclass(frozen=True)
class CostOfCuts:
    """Ratios to training every layer in the same mode, for every cut k = 0..L-1."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    forward: list[float]  # FLOPs
    backward: list[float]  # FLOPs
    step: list[float]  # FLOPs
    saved_activation_bytes: list[float]
    trainable_parameters: list[float]
    frozen_forward: list[float] | None = None  # FLOPs that a prefix cache saves in later epochs; None in older files


@dataclass(frozen=True)
class StepAmounts:
    """What one micro batch of the run takes, with the plan's cut."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    rows: int
    positions: int
    forward_flops: float
    backward_flops: float
    all_layers_backward_flops: float  # when every layer is trained
    saved_activation_bytes: float
    trainable_parameters: int


@dataclass(frozen=True)
class Prediction:
    """What a training step will cost; ratios are to training every layer in the same mode."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    forward: float  # FLOPs
    backward: float  # FLOPs
    step: float  # FLOPs
    saved_activation_bytes: float
    trainable_parameters: float  # and of the optimizer state, which is proportional to them
    head_share: float  # share of this cut's step that the unembedding takes, whatever the cut
    floor: float  # step ratio that no cut can go below
    gradient_checkpointing: bool
    why: str | None  # why nothing below the cut is saved, or None
    per_cut: CostOfCuts
    absolute: StepAmounts


@dataclass(frozen=True)
class ScoredSample:
    """The rows that were scored."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    rows: int
    seed: int
    dataset_fingerprint: str
    tokenizer_fingerprint: str
    datasets: list[str]  # their paths or names


@dataclass(frozen=True)
class Plan:
    """One choice of layers. What was not scored is None."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    base_model: str
    adapter: Literal["lora", "qlora"] | None  # None for full fine-tuning
    num_layers: int  # L
    first_trainable: int  # k: layers k..L-1 are trained
    created_by: dict[str, str] = field(default_factory=dict)  # package -> version
    revision: str | None = None
    options: dict[str, Any] = field(default_factory=dict)  # the `layersel:` block in force
    scores: Scores | None = None
    prediction: Prediction | None = None
    sample: ScoredSample | None = None
    config_updates: dict[str, Any] = field(default_factory=dict)  # the config keys that were written
    notes: list[str] = field(default_factory=list)  # what the user should know about this choice
    seconds: float | None = None  # spent on scoring
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if not 0 <= self.first_trainable < self.num_layers:
            raise PlanError(
                f"first_trainable is {self.first_trainable}; a model of {self.num_layers} decoder layers "
                f"allows 0 to {self.num_layers - 1}"
            )
        for part in (self.scores, self.prediction and self.prediction.per_cut):
            for name, values in vars(part).items() if part is not None else ():
                length = self.num_layers + (name in ("deviation", "deviation_stderr"))
                if isinstance(values, list) and len(values) != length:
                    raise PlanError(f"{name} has {len(values)} numbers; {self.num_layers} layers need {length}")

    @property
    def trainable_layers(self) -> list[int]:
        """Indices of the decoder layers that are trained, input side first."""
        return list(range(self.first_trainable, self.num_layers))

    def to_json(self) -> str:
        """The plan file's text: stable key order, two-space indent, finite numbers only."""
        values = dataclasses.asdict(self)
        ordered = {
            "schema_version": values.pop("schema_version"),
            "created_by": values.pop("created_by"),
            **{name: values.pop(name) for name in ("base_model", "revision", "adapter", "num_layers")},
            "first_trainable": values.pop("first_trainable"),
            "trainable_layers": self.trainable_layers,
            **values,
        }
        return json.dumps(ordered, indent=2, allow_nan=False, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, source: str) -> Plan:
        """Read a plan's text.

        Args:
            source: named in errors.

        Raises:
            PlanError: not JSON, not a plan, another schema version, or values that contradict each other.
        """
        try:
            values = json.loads(text)
        except ValueError as error:
            raise PlanError(f"{source} is not a plan: {error}. Score again to write a new one") from error
        if not isinstance(values, dict) or "schema_version" not in values:
            raise PlanError(f"{source} is not a plan: it has no schema_version. Give the path of a plan.json")
        if values["schema_version"] == 1:
            values = _from_version_1(values)
        if values["schema_version"] != SCHEMA_VERSION:
            raise PlanError(
                f"{source} has schema_version {values['schema_version']!r}; this version reads 1 and {SCHEMA_VERSION}. "
                "Score again, or install the version of axolotl-layersel that wrote it: "
                f"{values.get('created_by', {})}"
            )
        listed = values.pop("trainable_layers", None)
        try:
            plan = TypeAdapter(cls).validate_json(json.dumps(values))
        except ValidationError as error:
            raise PlanError(f"{source} was cut off or edited: {_reasons(error)}. Score again") from error
        if listed != plan.trainable_layers:
            raise PlanError(
                f"{source} was edited: trainable_layers is {listed}, but first_trainable {plan.first_trainable} of "
                f"{plan.num_layers} layers means {plan.trainable_layers}"
            )
        return plan

    def check_fits(self, *, base_model: str, adapter: str | None, num_layers: int, source: str) -> None:
        """Refuse to apply a plan to anything but what it was made for.

        Raises:
            PlanError: with the plan's value and the run's.
        """
        pairs = {
            "base_model": (self.base_model, base_model),
            "adapter": (self.adapter, adapter),
            "num_layers": (self.num_layers, num_layers),
        }
        for name, (planned, actual) in pairs.items():
            if planned != actual:
                raise PlanError(
                    f"{source} was made for {name} {planned!r}, this run has {actual!r}. Score again, or give the cut "
                    "alone with `layersel: {first_layer: ...}`"
                )


def _from_version_1(values: dict[str, Any]) -> dict[str, Any]:
    """The keys of a version 1 file as this version has them."""
    values = {**values, "schema_version": SCHEMA_VERSION}
    scored = {name: values.pop(name, None) for name in ("retention", "stability", "row_cuts")}
    scored["descent"] = values.pop("weight", None)  # they played its part in the retention
    values.pop("gain", None)
    deviation, sample = values.pop("deviation", None), values.get("sample")
    if isinstance(deviation, dict) and isinstance(sample, dict):
        scored |= {"deviation": deviation.get("mean"), "deviation_stderr": deviation.get("stderr")}
        values["scores"] = {**scored, "tokens": sample.get("tokens"), "loss": sample.get("loss")}
        values["sample"] = {name: value for name, value in sample.items() if name not in ("tokens", "loss")}
    if isinstance(prediction := values.get("prediction"), dict):
        values["prediction"] = _without(prediction, "explanation", "optimizer_bytes")
    return values


def _without(values: dict[str, Any], *names: str) -> dict[str, Any]:
    """The mapping without some keys, there and in mappings inside."""
    return {
        name: _without(value, *names) if isinstance(value, dict) else value
        for name, value in values.items()
        if name not in names
    }


def _reasons(error: ValidationError) -> str:
    """What is wrong, key by key."""
    told = []
    for entry in error.errors(include_url=False):
        if entry["type"] == "value_error":  # our own
            told.append(str(entry["ctx"]["error"]))
            continue
        got = "" if entry["type"] == "missing" else f", got {str(entry['input'])[:60]!r}"
        told.append(f"{'.'.join(map(str, entry['loc']))}: {entry['msg']}{got}")
    return "; ".join(told)


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old text or the new one, never a part: same folder, flush, rename.

    Raises:
        OSError: the folder cannot be written; the old file, if any, is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_plan(path: str | Path) -> Plan:
    """Read a plan file, or the plan in a run's output folder or checkpoint.

    Raises:
        PlanError: no such file, or not a plan.
    """
    path = Path(path)
    if path.is_dir():
        path = path / PLAN_FILE if (path / PLAN_FILE).exists() else path / PLAN_FOLDER / PLAN_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(
            f"the plan {str(path)!r} cannot be read ({error}); give the path of a plan.json, or remove `plan:` to score"
        ) from error
    return Plan.from_json(text, source=str(path))
