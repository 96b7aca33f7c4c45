"""A model trains on states from the cache as it would without: other batches, packing, refusals, weights that left."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from frozen_layers import CUT, count_calls, full, lora, step
from models import CASES, GEMMA_3N, Case
from tiny import tiny_llama, tiny_llama_4bit
from torch import Tensor, nn

from axolotl_layersel.model.decoder_stack import DecoderStack, find_stack
from axolotl_layersel.model.latent_states import left_as_found
from axolotl_layersel.prefix_cache.bypass import compute_states
from axolotl_layersel.prefix_cache.cached_prefix import CachedPrefix
from axolotl_layersel.prefix_cache.fill import Sample, fill_store, gather_samples, padded
from axolotl_layersel.prefix_cache.fingerprint import below_the_cut, prefix_fingerprint
from axolotl_layersel.prefix_cache.obstacles import find_obstacles, probe, rounding_tolerance
from axolotl_layersel.prefix_cache.offload import OffloadedWeights
from axolotl_layersel.prefix_cache.state_files import FileStore
from axolotl_layersel.prefix_cache.state_store import MemoryStore, PrefixCacheError, StateStore
from axolotl_layersel.training.backward_cut import stop_backward

LENGTHS = (5, 9, 12, 7, 16, 3)


def rows(lengths: Sequence[int] = LENGTHS, *, vocabulary: int = 61) -> list[dict[str, list[int]]]:
    draw = np.random.default_rng(0)
    return [{"input_ids": draw.integers(3, vocabulary, n).tolist()} for n in lengths]


def no_collator(_: Any) -> dict[str, Any]:
    raise AssertionError("rows with input_ids need none")


def samples_of(data: list[dict[str, list[int]]]) -> list[Sample]:
    return list(gather_samples(data, of="the training set", collate=no_collator))


def padded_batch(data: list[dict[str, list[int]]], side: str = "right") -> dict[str, Tensor]:
    longest = max(len(row["input_ids"]) for row in data)
    ids, mask, labels = [], [], []
    for row in data:
        own, gap = row["input_ids"], longest - len(row["input_ids"])
        one = [1] * len(own)
        ids.append(own + [0] * gap if side == "right" else [0] * gap + own)
        mask.append(one + [0] * gap if side == "right" else [0] * gap + one)
        labels.append(own + [-100] * gap if side == "right" else [-100] * gap + own)
    return {name: torch.tensor(v) for name, v in (("input_ids", ids), ("attention_mask", mask), ("labels", labels))}


def packed_batch(data: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    ids = [i for row in data for i in row["input_ids"]]
    positions = [p for row in data for p in range(len(row["input_ids"]))]
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "labels": torch.tensor([[-100 if p == 0 else i for i, p in zip(ids, positions, strict=True)]]),
    }


def cache(
    model: nn.Module, data: list[dict[str, list[int]]], *, store: StateStore | None = None, **options: Any
) -> CachedPrefix:
    stack = find_stack(model)
    store = MemoryStore(width=32, dtype=torch.float32) if store is None else store
    samples = samples_of(data)
    fill_store(
        *(model, stack, store, samples), first_trainable=CUT, batch_tokens=24, autocast=None, show_progress=False
    )
    return CachedPrefix(
        stack=stack,
        store=store,
        first_trainable=CUT,
        where={s.key: s.where for s in samples},
        tolerance=rounding_tolerance(stack, first_trainable=CUT, autocast=None),
        **options,
    )


def same(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]], tolerance: float) -> None:
    """Losses, and gradients by their norm: rounding of single entries is relative to the largest of a matrix."""
    assert one[0].isclose(other[0], rtol=tolerance)
    assert one[1].keys() == other[1].keys() and one[1]
    for name, gradient in one[1].items():
        assert (gradient - other[1][name]).norm() <= tolerance * gradient.norm(), name


@pytest.mark.parametrize("prepare", [lora, full])
def test_losses_and_gradients_are_those_of_the_whole_model_whatever_the_batch(prepare: Any) -> None:
    model, data = prepare(tiny_llama(use_cache=False)), rows()
    batches = [
        padded_batch(data[:3]),
        padded_batch([data[5], data[0]]),
        packed_batch(data[1:4]),
        packed_batch(data[::-1]),
    ]
    whole = [step(model, batch) for batch in batches]
    cached = cache(model, data)
    cached.install()
    # What a sample's states may be off, through twice as many layers forward and backward.
    for batch, expected in zip(batches, whole, strict=True):
        same(step(model, batch), expected, 4 * cached.tolerance)
    assert (cached.hits, cached.misses, cached.checked) == (4, 0, True)
    assert cached.worst_error <= cached.tolerance < 1e-5


def test_the_frozen_layers_run_once_for_the_check_and_for_what_is_unknown() -> None:
    model, data = lora(tiny_llama()), rows()
    cached = cache(model, data[:4])
    cached.install()
    calls = count_calls(model)
    for _ in range(3):
        step(model, padded_batch(data[:4]))
    assert [calls[i] for i in range(6)] == [1, 1, 1, 3, 3, 3]
    step(model, padded_batch(data[3:]))  # two of its three rows are unknown
    assert [calls[i] for i in range(6)] == [2, 2, 2, 4, 4, 4]
    model.eval()
    with torch.no_grad():
        model(**padded_batch(data[1:3]))
    assert [calls[i] for i in range(6)] == [2, 2, 2, 5, 5, 5]
    assert (cached.hits, cached.misses) == (4, 1)


def test_padding_on_the_left_is_a_miss_and_not_a_wrong_state() -> None:
    model, data = lora(tiny_llama()), rows()
    batch = padded_batch(data[:2], side="left")
    whole = step(model, batch)
    cached = cache(model, data)
    cached.install()
    same(step(model, batch), whole, 0.0)
    assert (cached.hits, cached.misses) == (0, 1)


def test_wrong_states_stop_the_run_and_name_the_sample() -> None:
    model, data = lora(tiny_llama()), rows()
    cached = cache(model, data)
    with torch.no_grad():
        find_stack(model).layers[1].mlp.up_proj.weight.mul_(1.01)  # another model than the one that was cached
    cached.install()
    with pytest.raises(PrefixCacheError, match="row 2 of the training set: in the first training batch"):
        step(model, padded_batch(data[2:4]))


@pytest.mark.parametrize("why", ["attention mask", "key-value cache"])
def test_attention_that_reaches_over_packed_samples_stops_the_run(why: str) -> None:
    """With either, transformers takes the row for one sample, whatever the positions say."""
    model, data = lora(tiny_llama(use_cache=why == "key-value cache")), rows()
    cached = cache(model, data)
    cached.install()
    batch = packed_batch(data[:3])
    if why == "attention mask":
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    with pytest.raises(PrefixCacheError, match=r"row 1 of the training set.*\s.* from one packed sample to another"):
        step(model, batch)


def test_noise_in_training_stops_the_run() -> None:
    model, data = lora(tiny_llama(attention_dropout=0.0)), rows()
    cached = cache(model, data)
    for layer in find_stack(model).layers[:CUT]:
        layer.self_attn.attention_dropout = 0.5
    cached.install()
    with pytest.raises(PrefixCacheError, match="acts in training alone"):
        step(model, padded_batch(data[:3]))


# ---- models --------------------------------------------------------------------------------------------------------


def _run_both_ways(model: nn.Module, stack: DecoderStack, *, cut: int) -> None:
    data = rows(vocabulary=128)
    with left_as_found(model):
        probe(
            *(model, stack, samples_of(data)),
            first_trainable=cut,
            tolerance=rounding_tolerance(stack, first_trainable=cut, autocast=None),
        )


@pytest.mark.parametrize("case", [c for c in CASES if not c.refused], ids=lambda case: case.name)
def test_every_model_of_the_table_is_cached_exactly_or_refused_by_name(case: Case) -> None:
    model = case.model().train()
    model.requires_grad_(False)
    stack, data = find_stack(model), rows(vocabulary=128)
    found = find_obstacles(stack, first_trainable=2, preference=False, max_tokens=64)
    if case.name in REFUSED:
        with pytest.raises(PrefixCacheError, match=REFUSED[case.name]):
            _run_both_ways(model, stack, cut=2)
        return
    if found:
        assert "training is random" in found[0] and len(found) == 1
        for _, module in below_the_cut(stack, first_trainable=2):
            for name in [n for n, v in vars(module).items() if "dropout" in n and isinstance(v, float)]:
                setattr(module, name, 0.0)
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    _run_both_ways(model, stack, cut=2)
    batch = {k: v for k, v in padded_batch(data[:4]).items() if k != "labels"}
    model.eval()
    with torch.no_grad():
        whole = model(**batch).logits
        cached = cache_of(model, stack, data, cut=2)
        cached.install()
        upper = model(**batch).logits
    assert cached.hits == 1
    real = batch["attention_mask"] == 1
    assert (upper - whole)[real].norm() <= 4 * cached.tolerance * whole[real].norm()


REFUSED = {"Gemma 3 multimodal": "Gemma3TextModel is not given token ids"}


def cache_of(model: nn.Module, stack: DecoderStack, data: list[dict[str, list[int]]], *, cut: int) -> CachedPrefix:
    store = MemoryStore(width=32, dtype=torch.float32)
    fill_store(
        *(model, stack, store, samples_of(data)),
        first_trainable=cut,
        batch_tokens=24,
        autocast=None,
        show_progress=False,
    )
    tolerance = rounding_tolerance(stack, first_trainable=cut, autocast=None)
    return CachedPrefix(stack=stack, store=store, first_trainable=cut, where={}, tolerance=tolerance)


def test_several_streams_are_refused() -> None:
    model = GEMMA_3N.model()
    with pytest.raises(PrefixCacheError, match="several streams"):
        _run_both_ways(model, find_stack(model), cut=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_dropout": 0.1}, r"layers.0.self_attn.attention_dropout is 0.1"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "depend on the longest row"),
    ],
)
def test_what_forbids_a_cache_is_named(options: dict[str, Any], message: str) -> None:
    model = tiny_llama(**options)
    model.requires_grad_(False)
    (found,) = find_obstacles(find_stack(model), first_trainable=CUT, preference=False, max_tokens=100)
    assert message in found


def test_a_trained_parameter_below_the_cut_forbids_a_cache() -> None:
    model = lora(tiny_llama())
    assert not find_obstacles(find_stack(model), first_trainable=CUT, preference=True, max_tokens=64)
    find_stack(model).layers[0].input_layernorm.weight.requires_grad_(True)
    (found,) = find_obstacles(find_stack(model), first_trainable=CUT, preference=True, max_tokens=64)
    assert "layers.0.input_layernorm lies below the cut and is trained" in found


# ---- fingerprints --------------------------------------------------------------------------------------------------


def test_a_fingerprint_changes_with_what_states_depend_on_and_with_nothing_else(tmp_path: Path) -> None:
    def of(model: nn.Module, cut: int = CUT, **facts: Any) -> str:
        return prefix_fingerprint(find_stack(model), first_trainable=cut, facts=facts)[0]

    base = of(tiny_llama())
    assert of(tiny_llama()) == base == of(tiny_llama().eval()) == of(lora(tiny_llama()))
    above = tiny_llama()
    with torch.no_grad():
        find_stack(above).layers[CUT].mlp.up_proj.weight.mul_(2)
        find_stack(above).final_norm.weight.mul_(2)
    assert of(above) == base, "what is trained is no part of it, so a resumed run finds its cache"
    below = tiny_llama()
    with torch.no_grad():
        find_stack(below).layers[CUT - 1].mlp.up_proj.weight[0, 0] += 1e-3
    four_bit = tiny_llama_4bit(tmp_path)
    others = [
        of(below),
        of(tiny_llama(seed=1)),
        of(tiny_llama(), cut=CUT - 1),
        of(tiny_llama(rope_theta=5e5)),
        of(tiny_llama(rms_norm_eps=1e-5)),
        of(tiny_llama(attn_implementation="eager")),
        of(tiny_llama().bfloat16()),
        of(tiny_llama(), autocast="torch.bfloat16"),
        of(four_bit),
    ]
    assert len({base, *others}) == len(others) + 1
    state = find_stack(four_bit).layers[0].mlp.up_proj.weight.quant_state
    state.absmax[0] += 1
    assert of(four_bit) not in others


# ---- filling and offloading ----------------------------------------------------------------------------------------


def test_what_was_filled_before_a_kill_is_kept(tmp_path: Path) -> None:
    model, data = lora(tiny_llama()), rows()
    options: dict[str, Any] = {"fingerprint": "0" * 32, "width": 32, "dtype": torch.float32, "file_bytes": 1}

    class Killed(FileStore):
        def add(self, key: bytes, states_nD: Tensor) -> None:
            if len(self) == 3:
                raise KeyboardInterrupt
            super().add(key, states_nD)

    with pytest.raises(KeyboardInterrupt):
        cache(model, data, store=Killed(tmp_path, **options))
    again = FileStore(tmp_path, **options)
    again.load(clean=True)
    samples = samples_of(data)
    assert len(again) == 3
    filled = fill_store(
        *(model, find_stack(model), again, [s for s in samples if s.key not in again]),
        first_trainable=CUT,
        batch_tokens=24,
        autocast=None,
        show_progress=False,
    )
    assert filled.rows == 3 and all(sample.key in again for sample in samples)


@pytest.mark.parametrize("most", [1, 0])
def test_memory_that_runs_out_while_filling_halves_batches_until_one_sample_is_too_much(most: int) -> None:
    """The error is raised by a hook where a batch of more rows enters, as an allocator would."""
    model, data = lora(tiny_llama()), rows((5, 5, 5, 5))

    def allocate(_module: nn.Module, args: tuple[Tensor]) -> None:
        if len(args[0]) > most:
            raise torch.OutOfMemoryError("no memory")

    hook = find_stack(model).layers[0].register_forward_pre_hook(allocate)
    try:
        if most:
            assert all(sample.key in cache(model, data).store for sample in samples_of(data))
        else:
            with pytest.raises(
                PrefixCacheError, match="row . of the training set with 5 tokens is too much .*no memory"
            ):
                cache(model, data)
    finally:
        hook.remove()


def test_processes_share_the_filling() -> None:
    model, samples = lora(tiny_llama()), samples_of(rows())
    stores = [MemoryStore(width=32, dtype=torch.float32) for _ in range(2)]
    for rank, store in enumerate(stores):
        fill_store(
            *(model, find_stack(model), store, samples),
            first_trainable=CUT,
            batch_tokens=24,
            autocast=None,
            share=(rank, 2),
            show_progress=False,
        )
    assert all((s.key in stores[0]) != (s.key in stores[1]) for s in samples)


@pytest.mark.parametrize("kind", ["float32", "4 bit"])
def test_weights_leave_after_the_check_and_come_back_for_a_miss(kind: str, tmp_path: Path) -> None:
    """The host's memory stands in for the GPU's: weights go to files that are mapped."""
    base = tiny_llama() if kind == "float32" else tiny_llama_4bit(tmp_path / "model")
    model, data = lora(base), rows()
    stack = find_stack(model)
    modules = [m for layer in stack.layers[:CUT] for m in layer.modules()]
    weights = OffloadedWeights(modules, kept=[], folder=tmp_path)
    cached = cache(model, data[:4], weights=weights)
    before = {name: p.clone() for name, p in model.named_parameters()}
    homes = {name: p.data_ptr() for name, p in model.named_parameters()}
    whole = [step(model, padded_batch(data[:3])), step(model, padded_batch(data[3:]))]
    cached.install()

    step(model, padded_batch(data[:3]))
    assert not weights.are_away, "the check needs them"
    same(step(model, padded_batch(data[:3])), whole[0], 4 * cached.tolerance)
    assert weights.are_away
    moved = {name for name, p in model.named_parameters() if p.data_ptr() != homes[name]}
    assert moved == {n for n in homes if any(f"layers.{i}." in n for i in range(CUT))}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters()), "saving sees what it saw"
    assert weights.bytes == sum(before[name].nbytes for name in moved)
    assert {p.name for p in tmp_path.iterdir()} <= {"model"}, "the files have no name"

    same(step(model, padded_batch(data[3:])), whole[1], 4 * cached.tolerance)
    assert not weights.are_away
    cached.remove()
    same(step(model, padded_batch(data[:3])), whole[0], 0.0)


def test_on_a_hit_nothing_below_the_cut_is_read() -> None:
    model, data = lora(tiny_llama()), rows()
    whole = step(model, padded_batch(data[:3]))
    cached = cache(model, data)
    cached.install()
    step(model, padded_batch(data[:3]))
    with torch.no_grad():
        for module in [*find_stack(model).layers[:CUT], find_stack(model).embeddings]:
            for parameter in module.parameters():
                parameter.fill_(float("nan"))
    same(step(model, padded_batch(data[:3])), whole, 4 * cached.tolerance)


def test_states_are_what_layer_k_is_given() -> None:
    model, (sample, *_) = lora(tiny_llama()).eval(), samples_of(rows())
    seen: list[Tensor] = []
    stack = find_stack(model)
    stack.layers[CUT].register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    inputs = padded([sample], torch.device("cpu"))
    with torch.no_grad():
        model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask)
    assert torch.equal(compute_states(stack, first_trainable=CUT, inputs=inputs), seen[0])


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_model_trains_on_cached_states(checkpointing: bool) -> None:
    """In float64: in float32 one row here turns rounding of 5e-8 in its states into 3e-5 of a gradient."""
    model, data = lora(tiny_llama(use_cache=False)).double(), rows()
    stack = find_stack(model)
    stop_backward(model, layers=stack.layers, first_trainable=CUT)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batches = [padded_batch(data[:3]), padded_batch(data[3:]), padded_batch(data[1:4]), packed_batch(data[2:5])]
    whole = [step(model, batch) for batch in batches]
    cached = cache(model, data, store=MemoryStore(width=32, dtype=torch.float64))
    cached.install()
    calls = count_calls(model)
    compiled = torch.compile(model, backend="aot_eager")
    try:
        for batch, expected in zip(batches, whole, strict=True):
            loss, gradients = step(compiled, batch)
            same(
                (loss, {n.removeprefix("_orig_mod."): g for n, g in gradients.items()}), expected, 4 * cached.tolerance
            )
    finally:
        torch.compiler.reset()
    assert (cached.hits, cached.misses) == (4, 0)
    assert calls[0] == calls[CUT - 1] == 1, "the check of the first batch"
