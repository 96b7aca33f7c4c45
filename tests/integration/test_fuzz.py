"""Any option block and any config around it end in one paragraph of our own, or in a plan whose layers are trained.

`pytest tests/integration/test_fuzz.py --hypothesis-profile=long` tries 2,000 examples of each instead of 500.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from axolotl.utils.freeze import freeze_layers_except
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from tiny import PROJECTIONS, VOCABULARY, tiny_llama, token_batch

from axolotl_layersel.config.conflicts import find_conflicts, find_notes
from axolotl_layersel.config.options import LayerSelArgs, LayerSelOptions
from axolotl_layersel.method.calibration import CalibrationError, draw_rows
from axolotl_layersel.method.score_layers import score_layers
from axolotl_layersel.model.adapted_modules import adapted_modules
from axolotl_layersel.model.decoder_stack import find_stack
from axolotl_layersel.model.parameter_names import layer_of
from axolotl_layersel.plan import Plan
from axolotl_layersel.training.adapter_targets import adapter_updates
from axolotl_layersel.training.backward_cut import stop_backward
from axolotl_layersel.training.trainable_parameters import full_patterns

EXAMPLES = max(500, settings.default.max_examples)
SCALARS = st.none() | st.booleans() | st.integers(-5, 200) | st.floats(allow_nan=True) | st.text(max_size=8)
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)
CONFIG_KEYS = [
    "unfrozen_parameters", "peft_layers_to_transform", "peft_layers_pattern", "adapter", "lisa_n_layers", "relora",
    "optimizer", "peft_layer_replication", "reward_model", "process_reward_model", "rl", "activation_offloading",
    "skip_prepare_dataset", "fsdp", "fsdp_config", "deepspeed", "tensor_parallel_size", "context_parallel_size",
    "lora_modules_to_save", "lora_target_modules", "peft_trainable_token_indices", "lora_model_dir",
    "gradient_checkpointing", "gradient_checkpointing_kwargs", "plugins", "layersel", "processor_type", "simpo_gamma",
    "sample_packing", "tokens",
]  # fmt: skip
MODEL = tiny_llama(num_layers=5)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(config=st.dictionaries(st.sampled_from(CONFIG_KEYS), ANYTHING, max_size=6), listed=st.booleans())
def test_a_config_of_any_shape_is_accepted_or_refused_in_sentences(config: dict[str, Any], listed: bool) -> None:
    if listed:
        config = {**config, "plugins": ["layersel"]}
    for sentence in (*find_conflicts(config), *find_notes(config)):
        assert sentence.endswith(".")
        assert "\n" not in sentence
    try:
        LayerSelArgs.model_validate(config)
    except ValidationError as error:
        assert all(e["loc"] == () or e["loc"][0] == "layersel" for e in error.errors())
        assert all(e["msg"] for e in error.errors())


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "num_samples": st.integers(-1, 40),
        "max_tokens": st.integers(-1, 200),
        "deviation": st.sampled_from(["cosine", "logit_lens", "semantic_loss", "euclid"]),
        "pilot": st.sampled_from(["auto", True, False, "never"]),
        "pilot_share": st.floats(-0.1, 1.1),
        "policy": st.sampled_from(["coverage", "peak_gain", "budget", None]),
        "coverage": st.floats(-0.5, 1.5) | st.just("all"),
        "budget": st.integers(-1, 9) | st.floats(-0.5, 2.0),
        "min_layers": st.integers(-1, 8),
        "unknown": st.just(1),
    },
)
ROWS = st.lists(
    st.lists(st.tuples(st.integers(1, VOCABULARY - 1), st.booleans()), max_size=12), min_size=0, max_size=12
)


@pytest.mark.slow
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(block=OPTIONS, rows=ROWS, seed=st.integers(0, 2**31), adapter=st.sampled_from(["lora", None]))
def test_a_block_and_a_data_set_end_in_a_trained_plan_or_in_one_paragraph(
    block: dict[str, Any], rows: list[list[tuple[int, bool]]], seed: int, adapter: str | None
) -> None:
    dataset = [{"input_ids": [t for t, _ in row], "labels": [t if s else -100 for t, s in row]} for row in rows]
    try:
        options = LayerSelOptions(**block)
    except ValidationError as error:
        assert {str(e["loc"][0]) for e in error.errors()} <= set(block)
        return
    try:
        sample = draw_rows(
            dataset,
            num_samples=options.num_samples,
            max_tokens=options.max_tokens,
            seed=seed,
            sequence_len=10,
        )
        chosen = options.model_dump(include={"deviation", "policy", "coverage", "budget", "min_layers"})
        scored = score_layers(MODEL, sample.rows, seed=seed, **chosen)
    except ValueError as error:
        assert isinstance(error, CalibrationError) or str(error).startswith(("budget is", "min_layers is"))
        assert "\n" not in str(error)
        return
    plan = Plan(
        base_model="tiny",
        adapter=adapter,
        num_layers=5,
        first_trainable=scored.first_trainable,
        options=options.model_dump(),
        scores=scored.scores,
    )
    assert Plan.from_json(plan.to_json(), source="itself") == plan
    trained = len(plan.trainable_layers)
    assert trained >= options.min_layers
    assert trained <= (options.budget if isinstance(options.budget, int) else options.budget * 5 + 1e-6)
    assert sample.tokens <= max(options.max_tokens, sample.rows[0].scored)
    assert trained_layers(adapter, plan.first_trainable) == plan.trainable_layers


def trained_layers(adapter: str | None, first_trainable: int) -> list[int | None]:
    """The layers whose weights a training step changes, frozen and cut as a run is; None for the embeddings."""
    model: Any = copy.deepcopy(MODEL)
    stack = find_stack(model)
    stop_backward(model, layers=stack.layers, first_trainable=first_trainable)
    if adapter:
        stock = LoraConfig(r=2, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
        adapters = adapted_modules(model, stock)
        updates = adapter_updates(model, stack, first_trainable=first_trainable, adapters=adapters, named=PROJECTIONS)
        stock.target_modules = set(updates.get("lora_target_modules", PROJECTIONS))
        stock.layers_to_transform = updates["peft_layers_to_transform"]
        stock.layers_pattern = updates.get("peft_layers_pattern")
        model = get_peft_model(model, stock)
        patterns = updates["unfrozen_parameters"]
    else:
        patterns = full_patterns(stack, first_trainable=first_trainable, train_norm_and_head=True)
    freeze_layers_except(model, patterns)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model(**token_batch(), use_cache=False).loss.backward()
    torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1.0).step()
    changed = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    stack = find_stack(model)
    found = {layer_of(name, stack) for name in changed if not name.startswith(("model.norm.", "lm_head."))}
    return sorted(found, key=lambda layer: -1 if layer is None else layer)


def test_the_fuzzed_model_was_never_changed() -> None:
    fresh = tiny_llama(num_layers=5)
    assert all(torch.equal(a, b) for a, b in zip(MODEL.parameters(), fresh.parameters(), strict=True))
    assert MODEL.training


@pytest.mark.parametrize("rows", [[], [{"input_ids": [], "labels": []}]])
def test_an_empty_data_set_is_named(rows: list) -> None:
    with pytest.raises(CalibrationError, match=r"empty after axolotl prepared it|every label masked"):
        draw_rows(rows, num_samples=1, max_tokens=1, seed=0, sequence_len=8)
