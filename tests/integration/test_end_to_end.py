"""Real axolotl runs, from the config to the weights: what is chosen is trained, and nothing else changes.

Most runs share this process, because nearly all the time of a run is imports; the launchers are tested as commands.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from axolotl.cli.config import load_cfg
from axolotl.integrations.base import PluginManager
from axolotl.train import train as axolotl_train
from axolotl_runs import axolotl, plan_of, train, write_config
from safetensors.torch import load_file

import axolotl_layersel._startup  # noqa: F401  # the alias, where the package is not installed
from axolotl_layersel.plan import PlanError
from axolotl_layersel.training.backward_cut import BackwardCutError

pytestmark = pytest.mark.slow

LAYERS = 6
PLAIN = {"layersel": {"num_samples": 16, "coverage": 0.85, "report": False}}


@pytest.fixture(autouse=True)
def _no_plugin_left_behind() -> Iterator[None]:
    PluginManager.get_instance().plugins.clear()
    yield
    PluginManager.get_instance().plugins.clear()


@dataclasses.dataclass
class Run:
    """A finished run of this process."""

    model: Any
    trainer: Any
    cfg: Any
    out: Path

    @property
    def plan(self) -> dict[str, Any]:
        return plan_of(self.out)


def _run(folder: Path, inputs: dict[str, Path], **overrides: Any) -> Run:
    """What `axolotl.cli.train` does, in this process, but with the model returned."""
    torch.manual_seed(0)
    config = write_config(folder, **inputs, **{**PLAIN, **overrides})
    cfg = load_cfg(str(config))
    meta = PluginManager.get_instance().load_datasets(cfg, preprocess=False)
    model, _tokenizer, trainer = axolotl_train(cfg=cfg, dataset_meta=meta)
    return Run(model, trainer, cfg, folder / "out")


def _frozen_and_changed(model: Any, base: dict[str, torch.Tensor]) -> tuple[set[str], set[str]]:
    """Names of base parameters that are bit-identical to the file, and of those that are not."""
    now = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): value
        for name, value in model.state_dict().items()
    }
    same = {name for name, value in base.items() if torch.equal(now[name], value)}
    return same, set(base) - same


def test_lora_trains_adapters_on_the_chosen_layers_and_nothing_else(
    tmp_path: Path, run_inputs: dict[str, Path]
) -> None:
    run = _run(tmp_path, run_inputs)
    k = run.plan["first_trainable"]
    assert 0 < k < LAYERS
    assert run.plan["trainable_layers"] == list(range(k, LAYERS))
    adapters = load_file(run.out / "adapter_model.safetensors")
    layers = {int(name.split("layers.")[1].split(".")[0]) for name in adapters}
    assert layers == set(range(k, LAYERS))
    assert any(value.abs().sum() > 0 for name, value in adapters.items() if "lora_B" in name)
    same, changed = _frozen_and_changed(run.model, load_file(run_inputs["model"] / "model.safetensors"))
    assert changed == set()
    assert len(same) > 0
    assert run.cfg.unfrozen_parameters == run.plan["config_updates"]["unfrozen_parameters"]
    assert run.cfg.peft_layers_to_transform == run.plan["trainable_layers"]


@pytest.mark.parametrize(
    "targets", [["q_proj", "down_proj"], r".*layers\.\d+\.self_attn\.(q|v)_proj"], ids=["list", "regex"]
)
def test_other_ways_to_name_targets_reach_the_chosen_layers_alone(
    tmp_path: Path, run_inputs: dict[str, Path], targets: Any
) -> None:
    run = _run(tmp_path, run_inputs, lora_target_linear=None, lora_target_modules=targets, max_steps=1)
    adapters = load_file(run.out / "adapter_model.safetensors")
    layers = {int(name.split("layers.")[1].split(".")[0]) for name in adapters}
    assert layers == set(run.plan["trainable_layers"])


def test_qlora_scores_and_trains_the_4_bit_model(tmp_path: Path, run_inputs: dict[str, Path]) -> None:
    run = _run(tmp_path, run_inputs, adapter="qlora", load_in_4bit=True)
    assert run.plan["adapter"] == "qlora"
    linears = [m for m in run.model.modules() if type(m).__module__.startswith("bitsandbytes")]
    assert len(linears) == 7 * LAYERS
    trained = {name for name, p in run.model.named_parameters() if p.requires_grad}
    assert {int(n.split("layers.")[1].split(".")[0]) for n in trained} == set(run.plan["trainable_layers"])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_full_fine_tuning_leaves_frozen_weights_bit_identical(
    tmp_path: Path, run_inputs: dict[str, Path], checkpointing: bool
) -> None:
    run = _run(tmp_path, run_inputs, adapter=None, gradient_checkpointing=checkpointing)
    k = run.plan["first_trainable"]
    same, changed = _frozen_and_changed(run.model, load_file(run_inputs["model"] / "model.safetensors"))
    assert {n for n in same | changed if "layers." in n and int(n.split(".")[2]) < k} <= same
    assert "model.embed_tokens.weight" in same
    assert {n for n in same | changed if "layers." in n and int(n.split(".")[2]) >= k} <= changed
    assert {"model.norm.weight", "lm_head.weight"} <= changed


def test_full_fine_tuning_without_the_head_trains_layers_alone(tmp_path: Path, run_inputs: dict[str, Path]) -> None:
    run = _run(tmp_path, run_inputs, adapter=None, layersel={"first_layer": 4, "train_head": False})
    _same, changed = _frozen_and_changed(run.model, load_file(run_inputs["model"] / "model.safetensors"))
    assert {n.split(".")[2] for n in changed if "layers." in n} == {"4", "5"}
    assert all("layers." in n for n in changed)


def test_reentrant_checkpointing_is_kept_and_still_stops_at_the_cut(
    tmp_path: Path, run_inputs: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("axolotl").propagate = True
    with caplog.at_level(logging.INFO):
        run = _run(tmp_path, run_inputs, gradient_checkpointing_kwargs={"use_reentrant": True})
    assert run.trainer.args.gradient_checkpointing_kwargs["use_reentrant"] is True
    assert any("`use_reentrant: true` is kept" in note for note in run.plan["notes"])
    assert "proved in the first step: the backward pass stops at layer" in caplog.text


def test_equal_inputs_give_byte_equal_plans(tmp_path: Path, run_inputs: dict[str, Path]) -> None:
    texts = []
    for name in ("one", "two"):
        _run(tmp_path / name, run_inputs, output_dir=str(tmp_path / name / "out"), max_steps=1)
        values = plan_of(tmp_path / name / "out")
        values.pop("seconds")
        texts.append(json.dumps(values))
    assert texts[0] == texts[1]


def test_a_saved_plan_and_a_cut_by_hand_score_nothing(tmp_path: Path, run_inputs: dict[str, Path]) -> None:
    first = _run(tmp_path / "a", run_inputs, max_steps=1)
    again = _run(tmp_path / "b", run_inputs, max_steps=1, layersel={"plan": str(first.out)})
    assert again.plan["first_trainable"] == first.plan["first_trainable"]
    assert again.plan["scores"] == first.plan["scores"]
    scored = first.plan
    by_hand = _run(tmp_path / "a", run_inputs, max_steps=1, layersel={"first_layer": 4})
    assert by_hand.out == first.out
    assert by_hand.plan["trainable_layers"] == [4, 5]
    assert by_hand.plan["scores"] is None
    assert json.loads((first.out / "layersel" / "plan.scored.json").read_text(encoding="utf-8")) == scored


@pytest.mark.parametrize(("adapter", "power"), [("lora", 1 / 4), (None, 3 / 4)])
def test_the_learning_rate_is_raised_for_the_cut_on_request(
    adapter: str | None, power: float, tmp_path: Path, run_inputs: dict[str, Path]
) -> None:
    """Two of six layers: the optimizer steps with the raised rate; without the option a note names the ratio."""
    rates = {}
    for asked in (False, True):
        options = {"first_layer": 4, "scale_learning_rate": asked, "report": False}
        same = {"adapter": adapter, "learning_rate": 1e-3, "lr_scheduler": "constant", "warmup_steps": 0}
        run = _run(tmp_path / str(asked), run_inputs, layersel=options, **same)
        rates[asked] = run.trainer.optimizer.param_groups[0]["lr"]
        said = "is raised by" if asked else "the best learning rate was about"
        assert any(said in note and f"{3**power:.2f}" in note for note in run.plan["notes"])
    assert rates[False] == 1e-3
    assert rates[True] == pytest.approx(1e-3 * 3**power)


def test_training_every_layer_changes_nothing_for_axolotl(tmp_path: Path, run_inputs: dict[str, Path]) -> None:
    """`first_layer: 0` gives the losses of a run without the plugin, to the digit."""
    stock = _run_stock(tmp_path / "stock", run_inputs)
    whole = _run(tmp_path / "whole", run_inputs, layersel={"first_layer": 0}).trainer
    assert _losses(whole) == _losses(stock)


def test_stop_backward_false_is_stock_and_gives_the_same_losses(tmp_path: Path, run_inputs: dict[str, Path]) -> None:
    stock = _run(tmp_path / "a", run_inputs, layersel={"first_layer": 3, "stop_backward": False}).trainer
    ours = _run(tmp_path / "b", run_inputs, layersel={"first_layer": 3}).trainer
    assert _losses(ours) == _losses(stock)


def _run_stock(folder: Path, inputs: dict[str, Path]) -> Any:
    from axolotl.common.datasets import load_datasets

    torch.manual_seed(0)
    cfg = load_cfg(str(write_config(folder, **inputs, plugins=None, layersel=None)))
    return axolotl_train(cfg=cfg, dataset_meta=load_datasets(cfg=cfg))[2]


def _losses(trainer: Any) -> list[float]:
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4
    return losses


def test_both_spellings_together_act_once(tmp_path: Path, run_inputs: dict[str, Path]) -> None:
    run = _run(
        tmp_path,
        run_inputs,
        plugins=["layersel", "axolotl_layersel.LayerSelPlugin"],
        layersel={"first_layer": 5},
        max_steps=1,
    )
    names = [type(callback).__name__ for callback in run.trainer.callback_handler.callbacks]
    assert names.count("PlanGuard") == 1


def test_trained_embeddings_cost_the_saving_and_the_plan_says_so(tmp_path: Path, run_inputs: dict[str, Path]) -> None:
    run = _run(tmp_path, run_inputs, lora_modules_to_save=["embed_tokens", "lm_head"], layersel={"first_layer": 4})
    assert any("`lora_modules_to_save` trains embeddings" in note for note in run.plan["notes"])
    assert run.plan["prediction"]["why"].startswith("`lora_modules_to_save` trains embeddings")
    layers = {n.split("layers.")[1][0] for n, p in run.model.named_parameters() if p.requires_grad and "layers." in n}
    assert layers == {"4", "5"}


def test_measured_times_are_logged_beside_the_prediction(
    tmp_path: Path, run_inputs: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("axolotl").propagate = True
    with caplog.at_level(logging.INFO):
        run = _run(tmp_path, run_inputs, layersel={"first_layer": 4}, max_steps=21)
    said = re.search(r"measured over 10 passes: forward ([\d.]+) s, backward ([\d.]+) s; (.+)", caplog.text)
    assert said is not None, caplog.text
    forward, backward, compared = float(said[1]), float(said[2]), said[3]
    ratio = float(compared.removeprefix("backward / forward ").partition(" in time, predicted ")[0])
    assert ratio == pytest.approx(backward / forward, abs=0.02)
    assert "step" not in compared, "a step with every layer was not measured"
    assert "compute_loss" not in vars(run.trainer)
    assert "backward" not in vars(run.trainer.accelerator)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"layersel": {"first_layer": 99}}, "first_layer is 99; the model has 6 decoder layers"),
        ({"layersel": {"budget": 0.1}}, "budget is 0.1, which is 0 of 6 decoder layers"),
        ({"layersel": {"min_layers": 7}}, "min_layers is 7; the model has 6 decoder layers"),
        ({"layersel": {"plan": "nowhere.json"}}, "'nowhere.json' cannot be read"),
        ({"roles_to_train": [], "datasets": "masked"}, "every label masked"),
    ],
)
def test_bad_input_stops_the_run_before_training(
    tmp_path: Path, run_inputs: dict[str, Path], overrides: dict, message: str
) -> None:
    if overrides.get("datasets") == "masked":
        path = tmp_path / "masked.jsonl"
        row = {"segments": [{"label": False, "text": "nothing is to be learned here"}]}
        path.write_text("".join(json.dumps(row) + "\n" for _ in range(20)), encoding="utf-8")
        overrides = {"datasets": [{"path": str(path), "ds_type": "json", "type": "input_output"}]}
    with pytest.raises(ValueError, match=message):
        _run(tmp_path, run_inputs, **overrides)
    assert {path.name for path in (tmp_path / "out" / "layersel").iterdir()} <= {".lock"}
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_plan_of_another_adapter_is_refused_with_both_values(tmp_path: Path, run_inputs: dict[str, Path]) -> None:
    first = _run(tmp_path / "a", run_inputs, max_steps=1)
    with pytest.raises(PlanError, match="adapter 'lora', this run has None"):
        _run(tmp_path / "b", run_inputs, adapter=None, layersel={"plan": str(first.out)})


def test_a_trainable_set_other_than_the_plan_s_stops_the_run(tmp_path: Path, run_inputs: dict[str, Path]) -> None:
    """Somebody unfreezes a parameter between loading and training: the run names it and stops."""
    from transformers import TrainerCallback

    from axolotl_layersel.training.plan_guard import PlanGuard

    config = write_config(tmp_path, **run_inputs, layersel={"first_layer": 4}, max_steps=1)
    cfg = load_cfg(str(config))
    meta = PluginManager.get_instance().load_datasets(cfg, preprocess=False)

    class Meddler(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
            next(p for n, p in model.named_parameters() if "norm" in n).requires_grad_(True)

    original = PlanGuard.on_train_begin
    plugin = next(iter(PluginManager.get_instance().plugins.values()))
    callbacks = plugin.add_callbacks_post_trainer
    plugin.add_callbacks_post_trainer = lambda cfg, trainer: [Meddler(), *callbacks(cfg, trainer)]
    with pytest.raises(BackwardCutError, match="unexpected, 1: .*norm"):
        axolotl_train(cfg=cfg, dataset_meta=meta)
    assert PlanGuard.on_train_begin is original


def test_training_that_never_asked_the_plugin_is_refused(tmp_path: Path, run_inputs: dict[str, Path]) -> None:
    from axolotl.common.datasets import load_datasets

    cfg = load_cfg(str(write_config(tmp_path, **run_inputs, max_steps=1)))
    with pytest.raises(RuntimeError, match="no layers were selected.*do_train"):
        axolotl_train(cfg=cfg, dataset_meta=load_datasets(cfg=cfg))


@pytest.mark.parametrize("launcher", ["accelerate", "axolotl", "torchrun"])
def test_the_bare_name_works_with_every_launcher(tmp_path: Path, run_inputs: dict[str, Path], launcher: Any) -> None:
    config = write_config(tmp_path, **run_inputs, max_steps=1)
    finished = train(config, launcher=launcher).check()
    k = plan_of(tmp_path / "out")["first_trainable"]
    assert f"the backward pass stops at layer {k}" in finished.log or k == 0
    assert {"plan.json", "recipe.yml", "report.html", "deviation.png", "deviation.svg"} <= {
        path.name for path in (tmp_path / "out" / "layersel").iterdir()
    }


def test_overrides_on_the_command_line_reach_the_options(tmp_path: Path, run_inputs: dict[str, Path]) -> None:
    config = write_config(tmp_path, **run_inputs, max_steps=1)
    train(config, "--layersel__first_layer=4", launcher="python").check()
    assert plan_of(tmp_path / "out")["trainable_layers"] == [4, 5]


def test_preprocess_scores_nothing(tmp_path: Path, run_inputs: dict[str, Path]) -> None:
    config = write_config(tmp_path, **run_inputs)
    finished = axolotl("preprocess", str(config), log=tmp_path / "preprocess.log").check()
    assert "scoring" not in finished.log
    assert not (tmp_path / "out" / "layersel").exists()
