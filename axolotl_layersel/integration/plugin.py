"""axolotl's hooks, thin: when things happen. What happens is in `decide.py`, why in `score_layers.py`.

    register             before validation: remember the config as the user wrote it; how checkpointing recomputes
    load_datasets        called by `train` alone: take the training set that axolotl prepares, so the run is known
    pre_lora_load        the model is whole and has no adapters yet: decide, write the plan, apply it
    post_model_load      adapters are in place, or TRL will add them: say so, and what still reaches below the cut
    add_callbacks_post_trainer   hold the run to its plan (`plan_guard.py`)
    post_train           the model is saved: describe the choice in its model card

Inference, merging, evaluation and preprocessing load models and datasets too, but never call `load_datasets` with
`preprocess=False`: nothing happens there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from axolotl.integrations.base import BasePlugin, PluginManager
from torch import nn

from axolotl_layersel.config.conflicts import names_plugin, zero_stage
from axolotl_layersel.integration import apply
from axolotl_layersel.integration.decide import decide
from axolotl_layersel.integration.log import LOG
from axolotl_layersel.integration.output_folder import claim_folder, release_folders
from axolotl_layersel.integration.prefix_guard import prefix_guards
from axolotl_layersel.integration.processes import Processes, join_processes
from axolotl_layersel.integration.ray_workers import config_as_written
from axolotl_layersel.integration.run_settings import RunSettings, settings_of
from axolotl_layersel.model.decoder_stack import find_stack
from axolotl_layersel.plan import Plan
from axolotl_layersel.report.memory_meter import MemoryMeter
from axolotl_layersel.report.model_card import add_to_model_card
from axolotl_layersel.report.step_timer import StepTimer
from axolotl_layersel.report.trackers import PlanTracker
from axolotl_layersel.training.backward_cut import restore_backward, stop_backward
from axolotl_layersel.training.plan_guard import NoPlanGuard, PlanGuard
from axolotl_layersel.training.trained_below_cut import obstacles


@dataclass
class _Run:
    """What is known of the run that this process trains."""

    settings: RunSettings
    dataset: Any = None
    data_sets: tuple[Any, ...] = ()  # the same, and that of evaluation
    plan: Plan | None = None
    processes: Processes = field(default_factory=Processes)
    loaded: bool = False  # the model to train is; a reference model may follow
    stop_backward: bool = False
    train_norm_and_head: bool = False


class LayerSelPlugin(BasePlugin):
    """Select the decoder layers to fine-tune by semantic transition; see the package's README.

    axolotl makes an instance for each spelling in `plugins:` and keeps those of earlier configs, so what is known of
    configs and of the run belongs to the process, not to an instance.
    """

    written: ClassVar[dict[str | None, dict[str, Any]]] = {}  # by the file of the config, as the user wrote it
    _registered: ClassVar[Any] = None
    _run: ClassVar[_Run | None] = None

    def register(self, cfg: Any) -> None:
        """Remember the raw config; say how checkpointing recomputes where the user did not."""
        path = cfg.get("axolotl_config_path")
        if not names_plugin(cfg) or (cfg is LayerSelPlugin._registered and path in self.written):
            return  # the other instance was first, and has changed the config
        LayerSelPlugin._registered = cfg
        self.written[path] = config_as_written(cfg)
        kwargs = cfg.get("gradient_checkpointing_kwargs") or {}
        if cfg.get("gradient_checkpointing") and isinstance(kwargs, Mapping) and "use_reentrant" not in kwargs:
            # ZeRO-3 partitions what a non-reentrant recomputation would look at.
            cfg["gradient_checkpointing_kwargs"] = {**kwargs, "use_reentrant": zero_stage(cfg) == 3}

    def get_input_args(self) -> str | None:
        """The class of our options, given once: the plugin may be listed under several of its names."""
        return "axolotl_layersel.config.options.LayerSelArgs" if self._acts() else None

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> Any:
        """Let axolotl load the training set, keep a reference for scoring, and return it."""
        if preprocess or not names_plugin(cfg) or not self._acts():
            return None
        LayerSelPlugin._run = current = _Run(settings_of(cfg))
        others = [p for p in PluginManager.get_instance().plugins.values() if not isinstance(p, LayerSelPlugin)]
        if current.settings.cut_is_given and any(type(p).load_datasets is not BasePlugin.load_datasets for p in others):
            return None  # theirs is the training set; nothing is scored on it. Two of them are refused by axolotl
        from axolotl.common.datasets import load_datasets, load_preference_datasets

        meta = (load_preference_datasets if current.settings.rl else load_datasets)(cfg=cfg)
        current.dataset = meta.train_dataset
        current.data_sets = tuple(rows for rows in (meta.train_dataset, meta.eval_dataset) if rows is not None)
        return meta

    def pre_lora_load(self, cfg: Any, model: nn.Module) -> None:
        """Decide which layers to train, write the plan, write the config keys, stop the backward pass at the cut."""
        current = self._current(cfg)
        if current is None or current.plan is not None:  # a reference model is loaded with the same config
            return
        settings = current.settings
        current.processes = processes = join_processes(cpu=settings.use_cpu)
        with processes.stopping_together():
            processes.main_only(lambda: claim_folder(settings.plan_path.parent))
            plan = decide(settings, model, current.dataset, processes=processes)
            plan = apply.complete(settings, model, plan, data_sets=current.data_sets, world_size=processes.world_size)
            written = self.written.get(settings.config_file, {})
            processes.main_only(lambda: apply.publish(settings, plan, config_as_written=written))
        current.plan = plan
        for key, value in plan.config_updates.items():
            cfg[key] = value
        stack = find_stack(model)
        current.train_norm_and_head = settings.train_norm_and_head(stack)
        current.stop_backward = settings.stop_backward
        if current.stop_backward:
            stop_backward(
                model, layers=stack.layers, first_trainable=plan.first_trainable, reentrant=settings.reentrant
            )

    def post_model_load(self, cfg: Any, model: nn.Module) -> None:
        """Adapters are in place: if something below the cut is trainable after all, undo the backward cut."""
        current = self._current(cfg)
        if current is None or current.plan is None or current.loaded:
            return
        current.loaded = True
        if not hasattr(model, "peft_config"):
            frozen = "unfrozen_parameters" in current.plan.config_updates
            if current.settings.adapter and frozen and current.processes.is_main:
                LOG.info(
                    "layersel: this trainer adds the adapters itself, later; until then axolotl rightly says that all "
                    "parameters are frozen. Before the first step the trainable ones are compared with the plan"
                )
            return
        if not current.stop_backward:
            return
        found = obstacles(model, stack=find_stack(model), first_trainable=current.plan.first_trainable)
        # The adapters of a continued one's frozen layers are frozen by name once the model is loaded.
        if found and not current.settings.continued_adapter:
            current.stop_backward = False
            restore_backward(model)
            LOG.warning("layersel: freezing saves no compute in this run: %s", " ".join(found))

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """Hold the run to its plan; without one, evaluation is let through and training is not."""
        if not names_plugin(cfg) or not self._acts():
            return []
        current = self._current(cfg)
        if current is None or current.plan is None:
            return [NoPlanGuard()]
        return [
            PlanGuard(
                current.plan,
                train_norm_and_head=current.train_norm_and_head,
                stop_backward=current.stop_backward,
                reentrant=current.settings.reentrant,
            ),
            *prefix_guards(
                current.settings,
                current.plan,
                trainer=trainer,
                processes=current.processes,
                stop_backward=current.stop_backward,
            ),
            StepTimer(current.plan, trainer=trainer),
            MemoryMeter(current.plan, trainer=trainer),
            PlanTracker(current.plan, current.settings.plan_path.parent, trainer=trainer),
        ]

    def post_train(self, cfg: Any, model: nn.Module) -> None:
        """Describe the choice in the model card; axolotl calls this before and after it writes the card."""
        current = self._current(cfg)
        if current is not None and current.plan is not None and current.processes.is_main:
            add_to_model_card(current.settings.output_dir / "README.md", current.plan)

    def post_train_unload(self, cfg: Any) -> None:
        """Forget the run, and let others train into its folder."""
        LayerSelPlugin._run = None
        release_folders()

    def _current(self, cfg: Any) -> _Run | None:
        """The run of this very config object, or None outside of training."""
        return self._run if self._run is not None and self._run.settings.cfg is cfg else None

    def _acts(self) -> bool:
        """Whether this is the first of the instances that axolotl made, one for each spelling."""
        instances = [p for p in PluginManager.get_instance().plugins.values() if isinstance(p, LayerSelPlugin)]
        return bool(instances) and instances[0] is self
