"""What the plugin does with each architecture of `models.py`: scored, trained in each mode, stopped at the cut.

`python tests/helpers/model_outcomes.py` prints the table of `tests/README.md`.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from axolotl.loaders.adapter import load_lora
from axolotl.utils.dict import DictDefault
from axolotl.utils.freeze import freeze_layers_except, freeze_mm_modules
from models import CASES, NUM_LAYERS, VOCABULARY, Case, markdown
from peft import prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from axolotl_layersel.integration import apply
from axolotl_layersel.integration.run_settings import settings_of
from axolotl_layersel.method.calibration import Row
from axolotl_layersel.method.score_layers import score_layers
from axolotl_layersel.method.scoring_pass import measure
from axolotl_layersel.model.decoder_stack import find_stack
from axolotl_layersel.model.latent_states import left_as_found
from axolotl_layersel.model.parameter_names import normalise
from axolotl_layersel.plan import Plan
from axolotl_layersel.training.backward_cut import BackwardCutError, stop_backward
from axolotl_layersel.training.first_step_check import FirstStepCheck, check_trainable
from axolotl_layersel.training.trainable_parameters import expected_trainable, resolve_train_head

CUT = 2


def rows(*, seed: int = 3, lengths: Sequence[int] = (5, 12, 9, 12, 7, 3)) -> list[Row]:
    """Rows of different lengths; the first third of each is a prompt without labels."""
    random = np.random.default_rng(seed)
    drawn = []
    for length in lengths:
        ids = tuple(int(i) for i in random.integers(3, VOCABULARY, length))
        prompt = length // 3
        drawn.append(Row(ids, (-100,) * prompt + ids[prompt:]))
    return drawn


def batch(*, seed: int = 4, size: tuple[int, int] = (2, 11)) -> dict[str, Tensor]:
    """A training batch, (B, T), its first row right-padded by two."""
    ids = torch.randint(3, VOCABULARY, size, generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    ids[0, -2:], mask[0, -2:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def config(case: Case, adapter: str | None) -> DictDefault:
    """What axolotl would hold after validating this case's config."""
    options: dict[str, Any] = {"base_model": "tiny", "output_dir": "out", "layersel": {"first_layer": CUT}}
    if adapter:
        options |= {"adapter": adapter, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
        options |= {"lora_target_modules": case.targets} if case.targets else {"lora_target_linear": True}
    return DictDefault(options)


def prepared(model: PreTrainedModel, case: Case, *, adapter: str | None, stock: bool) -> nn.Module:
    """The model as axolotl hands it to the trainer, with the plugin's keys in the config.

    Args:
        stock: gradients enter at the embeddings, as axolotl leaves it; otherwise the backward pass stops at the cut.
    """
    cfg = config(case, adapter)
    plan = Plan(base_model="tiny", num_layers=NUM_LAYERS, first_trainable=CUT, adapter=adapter)
    settings = settings_of(cfg)
    adapters = apply.adapters_of(settings, model)
    cfg = DictDefault({**cfg, **apply.config_updates(settings, model, plan, adapters)})
    layers = find_stack(model).layers
    whole: nn.Module = model
    if adapter:
        torch.manual_seed(5)
        whole, _ = load_lora(model, cfg)
        for name, parameter in whole.named_parameters():
            if "lora_B" in name:  # zero at the start, which would leave lora_A without a gradient
                torch.nn.init.normal_(parameter, std=0.1)
    freeze_layers_except(whole, cfg.unfrozen_parameters)
    freeze_mm_modules(whole)
    if stock:
        model.enable_input_require_grads()
    else:
        stop_backward(whole, layers=layers, first_trainable=CUT)
        if model.supports_gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    return whole.train()


def step(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """One forward and backward pass: the loss, with its graph, and the gradients by name."""
    torch.manual_seed(6)
    loss = model(**batch(), use_cache=False).loss
    loss.backward(retain_graph=True)
    grads = {normalise(n): p.grad for n, p in model.named_parameters() if p.grad is not None}
    return loss, grads


def leaves(loss: Tensor) -> Iterable[Tensor]:
    """Everything that the backward pass of `loss` would accumulate a gradient into."""
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        waiting += [following for following, _ in node.next_functions]


def check_scored(case: Case) -> str:
    """Scores are finite, the same for every batching, and the model is left as it was."""
    model = case.model()
    before = copy.deepcopy(model.state_dict())
    sample = rows()
    stack = find_stack(model)
    assert stack.num_layers == NUM_LAYERS, stack
    with left_as_found(model):
        alone = measure(model, stack, sample, range(len(sample)), deviation="cosine", batch_tokens=1)
        padded = measure(model, stack, sample, range(len(sample)), deviation="cosine", batch_tokens=1000)
    # Other batch shapes add up in another order: float32 rounding, over some ten thousand operations a token.
    for name in ("deviation_RS", "miss_RL", "loss_R"):
        np.testing.assert_allclose(getattr(alone, name), getattr(padded, name), rtol=1e-3, atol=1e-4, err_msg=name)
    scores = score_layers(model, sample).scores
    assert np.isfinite(scores.deviation).all() and abs(sum(scores.descent) - 1.0) < 1e-9
    assert scores.tokens == sum(row.scored for row in sample)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    return "yes"


def check_step(case: Case, model: PreTrainedModel, *, adapter: str | None) -> str:
    """Exactly the plan's parameters train, the backward pass stops, and its gradients are those of the stock run."""
    twin = copy.deepcopy(model)
    whole = prepared(model, case, adapter=adapter, stock=False)
    stack = find_stack(whole)
    expected = expected_trainable(
        [name for name, _ in whole.named_parameters()],
        stack,
        first_trainable=CUT,
        adapter=adapter,
        train_norm_and_head=resolve_train_head("auto", tied=stack.tied),
    )
    check_trainable(whole, expected=expected)
    below = [n for n, _ in whole.named_parameters() for i in range(CUT) if f"{stack.layers_name}.{i}." in n]
    assert below and not [name for name in below if "lora_" in name]
    watched = FirstStepCheck(whole, layers=stack.layers, first_trainable=CUT, expected_trainable=expected)
    loss, grads = step(whole)
    without = watched.check()
    trained = {id(p) for p in whole.parameters() if p.requires_grad}
    assert {id(leaf) for leaf in leaves(loss)} <= trained, "the backward pass goes below the cut"

    stock = prepared(twin, case, adapter=adapter, stock=True)
    _, expected_grads = step(stock)
    assert set(expected_grads) == set(grads) and len(grads) + len(without) == len(expected)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
    assert any(grad.abs().sum() > 0 for grad in grads.values())
    return "yes"


def load_4bit(case: Case) -> PreTrainedModel:
    """The model as axolotl loads it for QLoRA, on the CPU."""
    model = case.model()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        loaded = type(model).from_pretrained(folder, quantization_config=quantization, dtype=torch.float32)
    return prepare_model_for_kbit_training(loaded, use_gradient_checkpointing=False)


@functools.cache
def outcome(case_name: str) -> dict[str, str]:
    """The cells of a model's row; only errors of our own (`ValueError`, `BackwardCutError`) count as a refusal."""
    case = next(c for c in CASES if c.name == case_name)
    checks: dict[str, Callable[[], str]] = {
        "scored": lambda: check_scored(case),
        "LoRA": lambda: check_step(case, case.model(), adapter="lora"),
        "QLoRA": lambda: check_step(case, load_4bit(case), adapter="qlora"),
        "full": lambda: check_step(case, case.model(), adapter=None),
    }
    cells = {}
    for column, check in checks.items():
        try:
            cells[column] = check()
        except (ValueError, BackwardCutError) as error:
            reason = case.refused.get(column)
            if reason is None or reason not in str(error):
                raise
            cells[column] = f"refused: {reason}"
    trained = [column for column in ("LoRA", "QLoRA", "full") if cells[column] == "yes"]
    return {**cells, "backward stops": "yes" if trained else "no"}


def table() -> str:
    """The table in `tests/README.md`; runs what has not run yet."""
    return markdown({case.name: outcome(case.name) for case in CASES})


if __name__ == "__main__":
    import contextlib
    import sys

    with contextlib.redirect_stdout(sys.stderr):  # PEFT prints
        made = table()
    print(made)
