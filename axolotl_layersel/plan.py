"""The plan: which layers to train and why, as a value that can be saved, read, shared and applied.

Computing a plan (`method/`) and applying it (`training/`, `integration/`) meet only here. The file is versioned
JSON with a stable key order, written atomically; a reader never sees half of one.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
PLAN_FILE = "plan.json"
PLAN_FOLDER = "layersel"


class PlanError(ValueError):
    """A plan cannot be read, or it was made for something else than what it is applied to."""


@dataclass(frozen=True)
class Plan:
    """One choice of layers. What was not scored is None."""

    base_model: str
    adapter: str | None  # "lora", "qlora", or None for full fine-tuning
    num_layers: int  # L
    first_trainable: int  # k: layers k..L-1 are trained
    created_by: dict[str, str] = field(default_factory=dict)  # package -> version
    revision: str | None = None
    options: dict[str, Any] = field(default_factory=dict)  # the `layersel:` block in force
    deviation: dict[str, list[float]] | None = None  # mean and stderr, L+1 numbers each, by latent state
    weight: list[float] | None = None  # L numbers >= 0
    gain: list[float] | None = None  # L numbers, sum 1
    retention: list[float] | None = None  # entry j: predicted share kept when layers j..L-1 are trained
    stability: dict[str, float] | None = None  # cut -> share of bootstrap resamples that chose it
    row_cuts: dict[str, int] | None = None  # cut -> number of single rows that would choose it
    prediction: dict[str, Any] | None = None  # cost of the cut in the run's mode, as ratios to training every layer
    sample: dict[str, Any] | None = None  # rows, tokens, seed, fingerprints
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
        if values["schema_version"] != SCHEMA_VERSION:
            raise PlanError(
                f"{source} has schema_version {values['schema_version']!r}; this version reads {SCHEMA_VERSION}. "
                "Score again, or install the version of axolotl-layersel that wrote it: "
                f"{values.get('created_by', {})}"
            )
        listed = values.pop("trainable_layers", None)
        known = {f.name for f in dataclasses.fields(cls)}
        required = {"base_model", "adapter", "num_layers", "first_trainable"}
        if unknown := sorted(set(values) - known):
            raise PlanError(f"{source} has the unknown keys {unknown}; a plan has {sorted(known)}")
        if missing := sorted(required - set(values)):
            raise PlanError(f"{source} lacks the keys {missing}; it was cut off or edited. Score again")
        _check_types(values, source)
        plan = cls(**values)
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


def _check_types(values: dict[str, Any], source: str) -> None:
    """Types and lengths of what a plan carries: a file may have been edited by hand."""

    def refuse(name: str, allowed: str) -> None:
        raise PlanError(f"{source}: {name} is {values.get(name)!r}; allowed is {allowed}. Score again")

    for name in ("num_layers", "first_trainable"):
        if not isinstance(values[name], int) or isinstance(values[name], bool):
            refuse(name, "a whole number")
    if not isinstance(values["base_model"], str):
        refuse("base_model", "a string")
    if values["adapter"] not in ("lora", "qlora", None):
        refuse("adapter", '"lora", "qlora" or null')
    for name in ("weight", "gain", "retention"):
        numbers = values.get(name)
        if numbers is not None and not _numbers(numbers, values["num_layers"]):
            refuse(name, f"{values['num_layers']} finite numbers or null")
    for name in ("created_by", "options", "config_updates"):
        if not isinstance(values.get(name, {}), dict):
            refuse(name, "a mapping")
    for name in ("deviation", "stability", "row_cuts", "prediction", "sample"):
        if not isinstance(values.get(name), dict | None):
            refuse(name, "a mapping or null")
    for name in ("stability", "row_cuts"):
        cuts = values.get(name) or {}
        if not all(cut.isdecimal() and _finite(share) for cut, share in cuts.items()):
            refuse(name, "a number for each cut")
    for name, numbers in (values.get("deviation") or {}).items():
        if not _numbers(numbers, values["num_layers"] + 1):
            raise PlanError(f"{source}: deviation {name} is not {values['num_layers'] + 1} finite numbers. Score again")


def _numbers(values: Any, length: int) -> bool:
    return isinstance(values, list) and len(values) == length and all(_finite(value) for value in values)


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


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
