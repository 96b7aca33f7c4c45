"""One arm of `step.py`: a model, what is trained of it, and a training step that is timed. Runs in its own process."""

from __future__ import annotations

import itertools
import logging
import random
import time
import traceback
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from axolotl_layersel.cost.cut_cost import Mode, StepShape, measure_mode, price_cuts
from axolotl_layersel.model.adapted_modules import adapted_modules
from axolotl_layersel.model.decoder_stack import DecoderStack, find_stack
from axolotl_layersel.training.backward_cut import stop_backward

# Published shapes; the first three are for a CPU.
PRESETS: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12, "vocab_size": 2048},
    "wide": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "vocab_size": 2048},
    "large-vocabulary": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12, "vocab_size": 32768},
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "vocab_size": 128256,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "vocab_size": 128256,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "llama-3.1-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "vocab_size": 128256,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
ADAPTERS = {"lora": "lora", "qlora": "qlora", "full": None}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SEED = 0


@dataclass(frozen=True)
class Setting:
    """What all arms of a comparison share."""

    model: str
    device: str
    dtype: str
    batch: int
    sequence: int
    rank: int
    mode: str  # "lora", "qlora", "full"
    checkpointing: bool

    def __str__(self) -> str:
        return f"{self.mode}, {'with' if self.checkpointing else 'without'} checkpointing"


@dataclass(frozen=True)
class Arm:
    """One way to train, in a process of its own."""

    name: str  # "all", "again", "stock", "ours", "spectrum"
    first_trainable: int = 0


@dataclass(frozen=True)
class Prediction:
    """Of forward and backward pass."""

    flops: float
    saved: float | None  # bytes


@dataclass(frozen=True)
class Step:
    """One measured training step, in seconds."""

    forward: float
    backward: float
    optimizer: float
    loss: float

    @property
    def passes(self) -> float:
        return self.forward + self.backward

    @property
    def total(self) -> float:
        return self.passes + self.optimizer


def read_config(model: str) -> PretrainedConfig:
    """A preset, or the config of a model, from a `config.json` or a folder with one."""
    if model in PRESETS:
        return LlamaConfig(**{"num_attention_heads": 4, "num_key_value_heads": 2, **PRESETS[model]})
    return AutoConfig.from_pretrained(model).get_text_config()


def random_model(config: PretrainedConfig, *, device: torch.device | str, dtype: torch.dtype) -> Any:
    """A causal language model whose weights are drawn on the device: on a GPU that takes seconds."""
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


class Trainee:
    """A model, its optimizer and its batches."""

    def __init__(self, setting: Setting, arm: Arm) -> None:
        self.setting, self.arm = setting, arm
        self.device = torch.device(setting.device)
        self.cuda = self.device.type == "cuda"
        if self.device.index is not None:
            torch.cuda.set_device(self.device)
        config = read_config(setting.model)
        torch.manual_seed(SEED)
        self.model = random_model(config, device=self.device, dtype=DTYPES[setting.dtype])
        self.model.config.use_cache = False
        self.model.train()
        if setting.mode == "qlora":
            quantise(self.model, find_stack(self.model))
        self.generator = torch.Generator().manual_seed(SEED)
        self.peak = 0

    def predict(self, arms: Sequence[Arm]) -> dict[Arm, Prediction]:
        """What `cut_cost.py` says of every arm, before anything is prepared for training."""
        stack = find_stack(self.model)
        mode = mode_of(self.setting, self.model, stack)
        measured = measure_mode(stack, mode=mode, autocast=self.autocast)
        shape = StepShape(self.setting.batch, self.setting.sequence)
        ours = price_cuts(measured, mode=mode, shape=shape)
        stock = price_cuts(measured, mode=replace(mode, stop_backward=False), shape=shape)
        found: dict[Arm, Prediction] = {}
        for arm in arms:
            stops = arm.name == "ours" or (self.setting.mode == "full" and not self.setting.checkpointing)
            cost = (ours if stops else stock)[arm.first_trainable].cut
            found[arm] = Prediction(cost.flops, cost.saved_activation_bytes)
            if arm.name == "spectrum":  # all layers, without the gradients of the weights that it freezes
                frozen = [
                    layer.get_submodule(name).get_parameter("weight").numel()
                    for index, layer in enumerate(stack.layers)
                    for name in linear_names(layer)
                    if (index, name) not in spectrum_pattern(stack)
                ]
                found[arm] = Prediction(cost.flops - 2.0 * shape.batch * shape.positions * sum(frozen), None)
        return found

    def prepare(self) -> None:
        """Set what is trained, and let gradients flow as the arm does."""
        stack, k = find_stack(self.model), self.arm.first_trainable
        if self.setting.mode == "full":
            train_parameters(self.model, stack, self.arm)
        else:
            self.model = add_adapters(self.model, stack, self.setting, first_trainable=k)
        # Every stock run does this for adapters; transformers does it for full fine-tuning with checkpointing too.
        if self.setting.mode != "full" or self.setting.checkpointing:
            self.model.enable_input_require_grads()
        if self.setting.checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if self.arm.name == "ours":
            stop_backward(self.model, layers=stack.layers, first_trainable=k)
        self.model.train()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6)

    @property
    def autocast(self) -> torch.dtype | None:
        return torch.bfloat16 if self.setting.dtype == "bf16" else None

    def loss(self) -> Tensor:
        """Of the next batch; every arm draws the same ones."""
        size = (self.setting.batch, self.setting.sequence)
        ids = torch.randint(0, self.model.config.vocab_size, size, generator=self.generator).to(self.device)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast is not None):
            loss: Tensor = self.model(input_ids=ids, labels=ids).loss
        return loss

    def step(self) -> Step:
        """One training step, each part timed."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        marks = [self._mark()]
        loss = self.loss()
        marks.append(self._mark())
        loss.backward()
        marks.append(self._mark())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        marks.append(self._mark())
        if self.cuda:
            torch.cuda.synchronize()
            seconds = [one.elapsed_time(two) / 1000 for one, two in itertools.pairwise(marks)]
            self.peak = torch.cuda.max_memory_allocated()
        else:
            seconds = [two - one for one, two in itertools.pairwise(marks)]
        forward, backward, optimizer = seconds
        return Step(forward, backward, optimizer, loss.item())

    def _mark(self) -> Any:
        if not self.cuda:
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def memory(self) -> tuple[int, int | None]:
        """Bytes that autograd holds after a forward pass, parameters excluded; peak of a step on a GPU."""
        held: weakref.WeakSet[Held] = weakref.WeakSet()

        def pack(tensor: Tensor) -> Held:
            held.add(packed := Held(tensor))
            return packed

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed.tensor):
            loss = self.loss()
        weights = itertools.chain(self.model.parameters(), self.model.buffers())
        ours = {tensor.untyped_storage().data_ptr() for tensor in weights}
        storages = [packed.tensor.untyped_storage() for packed in held]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages if storage.data_ptr() not in ours}
        del loss
        return sum(sizes.values()), self.peak if self.cuda else None


class Held:
    """A saved tensor for as long as a graph holds it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def mode_of(setting: Setting, model: nn.Module, stack: DecoderStack) -> Mode:
    """The setting in the cost model's terms."""
    full = setting.mode == "full"
    return Mode(
        adapters=None if full else adapted_modules(model, lora_config(setting, stack)),
        checkpointing=setting.checkpointing,
        train_norm_and_head=full and not stack.tied,
    )


def linear_names(layer: nn.Module) -> list[str]:
    return [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]


def quantise(model: Any, stack: DecoderStack) -> None:
    """The linear modules of all decoder layers in 4 bits, as QLoRA trains them, and what PEFT does to such a model."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for layer in stack.layers:
        for name in linear_names(layer):
            old: Any = layer.get_submodule(name)
            device, dtype = old.weight.device, old.weight.dtype
            with torch.device("meta"):  # its own weight is replaced at once
                new = Linear4bit(old.in_features, old.out_features, bias=old.bias is not None, compute_dtype=dtype)
            new.weight = Params4bit(old.weight.detach(), requires_grad=False, quant_type="nf4")
            new.bias = old.bias
            parent, _, leaf = name.rpartition(".")
            setattr(layer.get_submodule(parent), leaf, new.to(device))
    model.is_loaded_in_4bit = True
    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def lora_config(setting: Setting, stack: DecoderStack) -> LoraConfig:
    """LoRA on every linear module of every layer."""
    return LoraConfig(
        r=setting.rank,
        lora_alpha=2 * setting.rank,
        target_modules=sorted({name.rpartition(".")[2] for name in linear_names(stack.layers[0])}),
        task_type="CAUSAL_LM",
    )


def add_adapters(model: Any, stack: DecoderStack, setting: Setting, *, first_trainable: int) -> Any:
    """LoRA on every linear module of layers k..L-1."""
    config = lora_config(setting, stack)
    config.layers_to_transform = list(range(first_trainable, stack.num_layers))
    torch.manual_seed(SEED + 1)
    return get_peft_model(model, config)


def train_parameters(model: nn.Module, stack: DecoderStack, arm: Arm) -> None:
    """Full fine-tuning: everything for `all`, a suffix with norm and head, or Spectrum's pattern."""
    everything = arm.name in ("all", "again")
    model.requires_grad_(everything)
    if everything:
        return
    if not stack.tied or arm.name == "spectrum":
        stack.head.requires_grad_(True)
    if arm.name == "spectrum":
        stack.embeddings.requires_grad_(True)
        for index, name in spectrum_pattern(stack):
            stack.layers[index].get_submodule(name).get_parameter("weight").requires_grad_(True)
        return
    if not stack.tied:
        stack.final_norm.requires_grad_(True)
    for layer in stack.layers[arm.first_trainable :]:
        layer.requires_grad_(True)


def spectrum_pattern(stack: DecoderStack) -> set[tuple[int, str]]:
    """(layer, module) of half of the layers for each kind of matrix, drawn with a seed."""
    draw = random.Random(SEED)
    size = stack.num_layers // 2
    return {(i, name) for name in linear_names(stack.layers[0]) for i in draw.sample(range(stack.num_layers), size)}


def serve(connection: Connection, setting: Setting, arm: Arm) -> None:
    """Answer the parent until it says stop; an error goes to the parent as text."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    if setting.device == "cpu":
        torch.set_num_threads(1)
    try:
        trainee = Trainee(setting, arm)
        while (message := connection.recv()) != ("stop",):
            connection.send(("answer", getattr(trainee, message[0])(*message[1:])))
    except BaseException:
        connection.send(("error", traceback.format_exc()))
        raise SystemExit(1) from None
