"""The `layersel:` block of an axolotl config: every default, bound and option text, once.

`LayerSelArgs` is what axolotl merges into its own config model; the block itself is `LayerSelOptions`.
The README's option table is compared with this file by a test.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, field_validator, model_validator

from axolotl_layersel.config.conflicts import find_conflicts
from axolotl_layersel.config.prefix_cache import cache_conflicts

DeviationName = Literal["cosine", "logit_lens"]
PolicyName = Literal["coverage", "peak_gain", "budget"]


class LayerSelOptions(BaseModel):
    """The options of one run. Unknown keys and values out of range are refused by name."""

    model_config = ConfigDict(extra="forbid", validate_default=True)

    num_samples: int = Field(
        default=128, ge=1, le=1_000_000, description="rows drawn from the training set, seeded by the config's `seed`"
    )
    max_tokens: int = Field(
        default=65_536, ge=1, le=1_000_000_000, description="most scored (supervised) tokens over all drawn rows"
    )
    deviation: DeviationName = Field(
        default="cosine", description="how far a latent state is from the semantics of its label"
    )
    policy: PolicyName = Field(default="coverage", description="how the scores become a suffix of trained layers")
    coverage: float = Field(
        default=0.95,
        gt=0.0,
        le=1.0,
        description="smallest suffix that keeps this share of the improvement of training all layers, 90 % surely",
    )
    pilot: Literal["auto"] | bool = Field(
        default="auto", description="short trainings before the run that measure what a cut keeps; auto: where they pay"
    )
    pilot_share: float = Field(default=0.02, gt=0.0, le=1.0, description="most that the pilot may cost, of the run")
    scale_learning_rate: bool = Field(
        default=False, description="raise the config's `learning_rate` as the best rate rose at such cuts in our runs"
    )
    layer_by_layer: Literal["auto"] | bool = Field(
        default="auto", description="bring one layer after the other to the GPU to score; auto: where not all fit"
    )
    layer_by_layer_gb: float | None = Field(
        default=None, gt=0, description="most GB (1e9 bytes) of states kept between two layers; none: half of free RAM"
    )
    budget: StrictInt | StrictFloat = Field(
        default=1.0,
        gt=0,
        description="most decoder layers to train: a fraction of them (0.5, 1.0) or a count (12)",
    )
    min_layers: int = Field(default=1, ge=1, description="fewest decoder layers to train")
    first_layer: int | None = Field(
        default=None, ge=0, description="a cut chosen by hand: train layers first_layer..L-1, score nothing"
    )
    plan: str | None = Field(default=None, description="path of a saved plan: apply it, score nothing")
    stop_backward: bool = Field(default=True, description="cut the backward pass at the first trainable layer")
    train_head: Literal["auto"] | bool = Field(
        default="auto",
        description="full fine-tuning: final norm and head too, where that does not reach the embeddings",
    )
    prefix_cache: Literal["off", "auto", "ram", "disk"] = Field(
        default="off",
        description="compute the frozen layers once and read their output in every later epoch, evaluation and run",
    )
    prefix_cache_gb: float | None = Field(
        default=None, gt=0, description="most GB (1e9 bytes) that the cache may take; none: four fifths of what is free"
    )
    prefix_cache_dir: str | None = Field(
        default=None,
        min_length=1,
        description="folder of the caches; none: `layersel_prefix_cache` in the prepared data's",
    )
    prefix_cache_dtype: Literal["model", "int8"] = Field(
        default="model", description="`int8`: about half of the room, with a scale for every 64 numbers of a token"
    )
    offload_prefix: Literal["auto"] | bool = Field(
        default="auto", description="frozen weights leave the GPU once everything that needs them is in the cache"
    )
    report: bool = Field(default=True, description="figures and report in `<output_dir>/layersel/`")

    @model_validator(mode="before")
    @classmethod
    def _gain_is_gone(cls, block: Any) -> Any:
        if isinstance(block, dict) and "gain" in block:
            raise ValueError(
                f"gain is {block['gain']!r}, and this option was removed: each layer's share of the descent took its "
                "place, and `pilot` measures the rest. Remove the line; for SALF's reading write `policy: peak_gain`"
            )
        return block

    @field_validator("deviation", mode="before")
    @classmethod
    def _semantic_loss_is_gone(cls, value: Any) -> Any:
        if value == "semantic_loss":
            raise ValueError(
                "deviation is 'semantic_loss', which was removed: it needed a second forward pass and the bases of the "
                "whole vocabulary, and chose no better. Remove the line for cosine, or write logit_lens"
            )
        return value

    @field_validator("prefix_cache", mode="before")
    @classmethod
    def _yaml_reads_off_as_false(cls, value: Any) -> Any:
        return {False: "off", True: "auto"}.get(value, value) if isinstance(value, bool) else value

    @field_validator("budget")
    @classmethod
    def _budget_is_fraction_or_count(cls, value: int | float) -> int | float:
        if isinstance(value, float) and value > 1.0:
            raise ValueError(
                f"budget is {value}; allowed is a fraction of the layers in (0, 1] or a whole number of layers: "
                "write for example 0.5 or 12"
            )
        return value

    @model_validator(mode="after")
    def _one_source_of_the_cut(self) -> LayerSelOptions:
        if self.first_layer is not None and self.plan is not None:
            raise ValueError(
                f"both first_layer ({self.first_layer}) and plan ({self.plan!r}) are given; "
                "a run takes its cut from one of them: remove the other"
            )
        return self


class LayerSelArgs(BaseModel):
    """What axolotl merges into its config model: the block, and the checks on the whole config around it."""

    layersel: LayerSelOptions | None = None
    layersel_written_keys: list[str] | None = Field(
        default=None, description="written by the plugin itself in the driver of a Ray run, for its workers"
    )

    @model_validator(mode="before")
    @classmethod
    def _check_layersel_conflicts(cls, data: Any) -> Any:
        if isinstance(data, dict):
            conflicts = [*find_conflicts(data), *cache_conflicts(data)]
            if conflicts:
                raise ValueError("layersel: " + " ".join(conflicts))
        return data
