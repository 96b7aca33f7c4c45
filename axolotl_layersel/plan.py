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

from axolotl_layersel.plan_parts import STRICT, Prediction, ScoredSample, Scores

SCHEMA_VERSION = 2
PLAN_FILE = "plan.json"
PLAN_FOLDER = "layersel"


class PlanError(ValueError):
    """A plan cannot be read, or it was made for something else than what it is applied to."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One choice of layers, its fields in the order of the file. What was not scored is None."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    schema_version: int = SCHEMA_VERSION
    created_by: dict[str, str] = field(default_factory=dict)  # package -> version
    base_model: str
    revision: str | None = None
    adapter: Literal["lora", "qlora"] | None  # None for full fine-tuning
    num_layers: int  # L
    first_trainable: int  # k: layers k..L-1 are trained
    options: dict[str, Any] = field(default_factory=dict)  # the `layersel:` block in force
    scores: Scores | None = None
    prediction: Prediction | None = None
    sample: ScoredSample | None = None
    config_updates: dict[str, Any] = field(default_factory=dict)  # the config keys that were written
    notes: list[str] = field(default_factory=list)  # what the user should know about this choice
    seconds: float | None = None  # spent on scoring

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
        values = {}
        for name, value in dataclasses.asdict(self).items():
            values[name] = value
            if name == "first_trainable":
                values["trainable_layers"] = self.trainable_layers
        return json.dumps(values, indent=2, allow_nan=False, ensure_ascii=False) + "\n"

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
    reasons = []
    for entry in error.errors(include_url=False):
        if entry["type"] == "value_error":  # our own
            reasons.append(str(entry["ctx"]["error"]))
            continue
        got = "" if entry["type"] == "missing" else f", got {str(entry['input'])[:60]!r}"
        reasons.append(f"{'.'.join(map(str, entry['loc']))}: {entry['msg']}{got}")
    return "; ".join(reasons)


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
