"""Every kind of row and precision that axolotl hands over gives the same scores, or a refusal that says why."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_datasets
from axolotl_runs import instruction_rows, make_dataset, write_config
from datasets import Dataset, IterableDataset
from image_data import image_options, make_image_model
from models import CASES, VOCABULARY
from PIL import Image
from torch import nn
from transformers import AutoProcessor, BitsAndBytesConfig, PreTrainedModel

from axolotl_layersel.method.calibration import CalibrationError, Row, Sample, draw_rows
from axolotl_layersel.method.score_layers import score_layers
from axolotl_layersel.method.scoring_pass import ScoringError
from axolotl_layersel.plan_parts import Scores

IGNORED = -100
LLAMA = next(case for case in CASES if case.name == "Llama")


def samples(count: int = 6, *, seed: int = 1) -> list[Row]:
    """Rows of odd lengths with a prompt in front."""
    random = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        ids = [int(i) for i in random.integers(3, VOCABULARY, 5 + 3 * index)]
        rows.append(Row(tuple(ids), (IGNORED, IGNORED, *ids[2:])))
    return rows


def record(row: Row, *, left: int = 0, right: int = 0) -> dict[str, list[int]]:
    """A dataset row with padding on either side."""
    return {
        "input_ids": [0] * left + [*row.input_ids] + [0] * right,
        "attention_mask": [0] * left + [1] * len(row.input_ids) + [0] * right,
        "labels": [IGNORED] * left + [*row.labels] + [IGNORED] * right,
    }


def packed(rows: Sequence[Row]) -> dict[str, list[int]]:
    """Several samples in one row, as `sample_packing` in a stream makes it."""
    return {
        "input_ids": [token for row in rows for token in row.input_ids],
        "labels": [label for row in rows for label in row.labels],
        "position_ids": [position for row in rows for position in range(len(row.input_ids))],
    }


def draw(dataset: Any, **options: Any) -> Sample:
    return draw_rows(dataset, **{"num_samples": 64, "max_tokens": 10_000, "seed": 0, "sequence_len": 64, **options})


def by_length(sample: Sample) -> list[Row]:
    return sorted(sample.rows, key=lambda row: (len(row.input_ids), row.input_ids))


def score(rows: Sequence[Row], model: nn.Module | None = None, **options: Any) -> Scores:
    return score_layers(model if model is not None else LLAMA.model(), rows, **options).scores


# ---- rows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("left", "right"), [(0, 0), (7, 0), (0, 7), (3, 4)])
def test_padding_on_either_side_is_taken_off(left: int, right: int) -> None:
    rows = samples()
    assert by_length(draw([record(row, left=left, right=right) for row in rows])) == rows
    assert by_length(draw(Dataset.from_list([record(row, left=left, right=right) for row in rows]))) == rows


def test_packed_rows_are_split_where_positions_start_again() -> None:
    rows = samples()
    sample = draw([packed(rows[:4]), packed(rows[4:])])
    assert by_length(sample) == rows


def test_samples_packed_into_a_row_do_not_see_each_other() -> None:
    rows = samples(2)
    alone = [score([row]) for row in rows]
    both = score(by_length(draw([packed(rows)])))
    mean = np.average([s.deviation for s in alone], axis=0, weights=[row.scored for row in rows])
    np.testing.assert_allclose(both.deviation, mean, atol=1e-6)


def test_long_rows_are_cut_as_training_would() -> None:
    row = samples()[-1]
    (cut,) = draw([record(row)], sequence_len=8).rows
    assert cut == Row(row.input_ids[:8], row.labels[:8])


def test_one_row_is_enough() -> None:
    row = samples(1)[0]
    sample = draw([record(row)], num_samples=128)
    assert sample.rows == (row,) and sample.notes == (
        "1 rows were scored, all that have a supervised token; num_samples was 128",
    )
    scores = score(sample.rows)
    assert scores.deviation_stderr == [0.0] * 5 and list(scores.stability.values()) == [1.0]


def test_a_single_scored_token_is_enough() -> None:
    scores = score([Row((5, 6, 7), (IGNORED, IGNORED, 7))])
    assert scores.tokens == 1 and np.isfinite(scores.deviation).all()


@pytest.mark.parametrize(
    "records",
    [
        [{"input_ids": [3, 4, 5], "labels": [IGNORED] * 3}] * 4,
        [{"input_ids": [3], "labels": [3]}],  # nothing predicts the first token
        [{"input_ids": [3, 4], "labels": [3, IGNORED]}],
    ],
    ids=["all masked", "one token", "only the first label"],
)
def test_rows_without_a_supervised_position_are_refused(records: list[dict[str, Any]]) -> None:
    with pytest.raises(CalibrationError, match=rf"all {len(records)} rows of the training set have every label masked"):
        draw(records)


def test_masked_rows_among_others_are_left_out() -> None:
    rows = samples(3)
    masked = {"input_ids": [9, 9, 9], "labels": [IGNORED] * 3}
    assert by_length(draw([masked, *(record(row) for row in rows), masked])) == rows


def test_a_stream_gives_its_first_rows_and_can_be_read_again() -> None:
    rows = samples()

    def endless() -> Iterator[dict[str, Any]]:
        while True:
            yield from (record(row) for row in rows)

    stream = IterableDataset.from_generator(endless)
    assert draw(stream, num_samples=4).rows == tuple(rows[:4])
    assert draw(stream, num_samples=4).rows == tuple(rows[:4])


def test_a_stream_of_tensors_with_a_batch_axis_is_read() -> None:
    row = samples(1)[0]
    tensors = {name: torch.tensor([values]) for name, values in record(row).items()}
    assert draw(iter([tensors])).rows == (row,)


def test_an_empty_set_and_a_raw_one_are_refused() -> None:
    with pytest.raises(CalibrationError, match="the training set is empty"):
        draw([])
    with pytest.raises(CalibrationError, match=r"have the columns \['text'\]; scoring needs `input_ids` and `labels`"):
        draw([{"text": "raw"}])


@pytest.mark.parametrize("batch_tokens", [1, 30, 64, 10_000])
def test_batching_and_order_do_not_change_scores(batch_tokens: int) -> None:
    """Only the order of float32 sums differs: far below 1e-5 of deviations near 1."""
    rows = samples()
    reference = score(rows, batch_tokens=1)
    for given in (rows, rows[::-1]):
        other = score(given, batch_tokens=batch_tokens)
        np.testing.assert_allclose(other.deviation, reference.deviation, atol=1e-5)
        np.testing.assert_allclose(other.descent, reference.descent, atol=1e-5)
        np.testing.assert_allclose(other.retention, reference.retention, atol=1e-4)
        assert other.tokens == reference.tokens


# ---- what axolotl prepares -----------------------------------------------------------------------------------------


def _chat(row: dict[str, str]) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": row["instruction"]},
            {"role": "assistant", "content": row["output"]},
        ]
    }


def _segments(row: dict[str, str]) -> dict[str, Any]:
    return {"segments": [{"label": False, "text": row["instruction"]}, {"label": True, "text": row["output"] + "</s>"}]}


PREPARED: dict[str, dict[str, Any]] = {
    "alpaca": {"type": "alpaca"},
    "train_on_inputs": {"type": "alpaca", "train_on_inputs": True},
    "completion": {"type": "completion", "field": "output"},
    "chat_template": {"type": "chat_template", "chat_template": "chatml", "make": _chat},
    "input_output": {"type": "input_output", "make": _segments},
    "user-defined": {
        "type": {
            "field_instruction": "instruction",
            "field_output": "output",
            "format": "Q: {instruction} A: ",
            "no_input_format": "Q: {instruction} A: ",
        }
    },
    "group_by_length": {"type": "alpaca", "group_by_length": True},
    "sample_packing": {"type": "alpaca", "sample_packing": True, "pad_to_sequence_len": True, "attn": True},
    "short sequence_len": {
        "type": "alpaca",
        "train_on_inputs": True,
        "sequence_len": 48,
        "excess_length_strategy": "truncate",
    },
}


def prepare(folder: Path, run_inputs: dict[str, Path], options: dict[str, Any]) -> Any:
    """The training set of that config, prepared by axolotl, and the config."""
    options = {"sequence_len": 512, **options}
    make = options.pop("make", dict)
    dataset = {"type": options.pop("type"), "ds_type": "json", "path": str(folder / "rows.jsonl")}
    for key in ("field", "chat_template"):
        if key in options:
            dataset[key] = options.pop(key)
    if options.pop("attn", False):
        options["flash_attention"] = False
        options["sdp_attention"] = True
    (folder / "rows.jsonl").write_text("".join(json.dumps(make(row)) + "\n" for row in instruction_rows(12)))
    config = write_config(
        folder, model=run_inputs["model"], data=folder, plugins=None, layersel=None, datasets=[dataset], **options
    )
    cfg = load_cfg(str(config))
    return load_datasets(cfg=cfg).train_dataset, cfg


@pytest.mark.slow
@pytest.mark.parametrize("name", PREPARED)
def test_every_dataset_type_gives_rows_with_its_own_mask(
    name: str, run_inputs: dict[str, Path], tmp_path: Path
) -> None:
    dataset, cfg = prepare(tmp_path, run_inputs, PREPARED[name])
    sample = draw_rows(dataset, num_samples=64, max_tokens=10_000, seed=42, sequence_len=cfg.sequence_len)
    assert len(sample.rows) == len(dataset) == 12
    assert max(len(row.input_ids) for row in sample.rows) <= cfg.sequence_len
    masked = any(label == IGNORED for row in sample.rows for label in row.labels)
    assert masked == (name not in ("train_on_inputs", "completion", "short sequence_len"))
    assert all(
        label in (IGNORED, token) for row in sample.rows for token, label in zip(row.input_ids, row.labels, strict=True)
    )


@pytest.mark.parametrize("packing", [False, True], ids=["plain", "packed"])
def test_a_pre_training_stream_is_read_without_its_packing(
    packing: bool, run_inputs: dict[str, Path], tmp_path: Path
) -> None:
    """A packed stream gives one long row a step, packed in an order that it draws."""
    folder = tmp_path / "stream"
    folder.mkdir()
    texts = [{"text": row["instruction"] + row["output"]} for row in instruction_rows(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts), encoding="utf-8")
    config = write_config(
        tmp_path,
        model=run_inputs["model"],
        data=folder,
        plugins=None,
        layersel=None,
        datasets=None,
        pretraining_dataset=[{"path": str(folder), "type": "pretrain", "text_column": "text", "split": "train"}],
        streaming=True,
        sample_packing=packing,
        pad_to_sequence_len=packing or None,
        sdp_attention=True,
    )
    cfg = load_cfg(str(config))
    stream = load_datasets(cfg=cfg).train_dataset
    options: dict[str, Any] = {"num_samples": 8, "max_tokens": 10_000, "seed": 1, "sequence_len": cfg.sequence_len}
    sample = draw_rows(stream, **options)
    before = torch.get_rng_state()
    assert len(sample.rows) == 8 and draw_rows(stream, **options) == sample
    assert torch.equal(torch.get_rng_state(), before), "packing draws from the run's own generator"
    assert all(8 < len(row.input_ids) < 80 for row in sample.rows)
    assert all(row.scored == len(row.input_ids) - 1 for row in sample.rows)


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True], ids=["plain", "packed"])
def test_a_stream_of_instructions_has_its_own_mask(packing: bool, run_inputs: dict[str, Path], tmp_path: Path) -> None:
    """`streaming: true` with `datasets:`; axolotl shuffles a stream within a buffer, here the whole of it."""
    path = make_dataset(tmp_path, 12)
    source = {"path": "json", "data_files": [str(path)]} if packing else {"path": str(path), "ds_type": "json"}
    config = write_config(
        tmp_path,
        model=run_inputs["model"],
        data=path,
        plugins=None,
        layersel=None,
        datasets=[{**source, "split": "train", "type": "alpaca"}],
        streaming=True,
        sample_packing=packing,
        pad_to_sequence_len=packing or None,
        attn_implementation="sdpa",
        sequence_len=512,
    )
    options: dict[str, Any] = {"num_samples": 64, "max_tokens": 10_000, "seed": 1, "sequence_len": 512}
    stream = load_datasets(cfg=load_cfg(str(config))).train_dataset
    assert isinstance(stream, IterableDataset)
    sample = draw_rows(stream, **options)
    whole, _ = prepare(tmp_path, run_inputs, PREPARED["alpaca"])
    assert by_length(sample) == by_length(draw_rows(whole, **options))
    assert len(sample.rows) == 12 and draw_rows(stream, **options) == sample


def test_a_processor_s_text_is_read_and_its_images_are_refused(tmp_path: Path) -> None:
    model = make_image_model(tmp_path / "model")
    options = image_options(tmp_path, model, images=False)
    dataset = load_datasets(
        cfg=load_cfg(str(write_config(tmp_path, plugins=None, layersel=None, **options)))
    ).train_dataset
    assert len(draw(dataset, sequence_len=512).rows) == len(dataset) == 12
    made = AutoProcessor.from_pretrained(model)(text="<start_of_image> Which?", images=Image.new("RGB", (20, 12)))
    row = {**{name: values[0] for name, values in made.items()}, "labels": made["input_ids"][0]}
    with pytest.raises(CalibrationError, match=r"images or sound \(column `pixel_values`\).*plan: ...}`.*first_layer"):
        draw([row])


def test_several_datasets_are_drawn_from_together(run_inputs: dict[str, Path], tmp_path: Path) -> None:
    paths = []
    for part in range(2):
        path = make_dataset(tmp_path, 6, first=6 * part, name=f"part{part}.jsonl")
        paths.append({"path": str(path), "ds_type": "json", "type": "alpaca"})
    config = write_config(
        tmp_path,
        model=run_inputs["model"],
        data=tmp_path,
        plugins=None,
        layersel=None,
        datasets=paths,
        sequence_len=512,
    )
    cfg = load_cfg(str(config))
    sample = draw_rows(
        load_datasets(cfg=cfg).train_dataset, num_samples=64, max_tokens=10_000, seed=1, sequence_len=512
    )
    assert len(sample.rows) == len({row.input_ids for row in sample.rows}) == 12


# ---- precision -----------------------------------------------------------------------------------------------------


def quantised(folder: Path, **options: Any) -> PreTrainedModel:
    LLAMA.model().save_pretrained(folder)
    config = BitsAndBytesConfig(**options)
    return type(LLAMA.model()).from_pretrained(folder, quantization_config=config, dtype=torch.float32)


def mixed() -> PreTrainedModel:
    """As axolotl leaves a bf16 full fine-tuning run when it is scored: embeddings, norms and head in float32."""
    model = LLAMA.model().to(torch.bfloat16)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or "norm" in name or name == "lm_head":
            module.float()
    return model


@pytest.mark.parametrize(
    ("change", "autocast", "epsilon"),
    [
        (lambda model: model.to(torch.bfloat16), torch.bfloat16, 2**-8),
        (lambda model: model.to(torch.bfloat16), None, 2**-8),
        (lambda model: model.to(torch.float16), torch.float16, 2**-11),
        (lambda model: model, torch.bfloat16, 2**-8),
        (lambda model: model, torch.float16, 2**-11),
        (lambda model: mixed(), torch.bfloat16, 2**-8),
        (lambda model: model.double(), None, 2**-24),
    ],
    ids=["bf16", "bf16 without autocast", "fp16", "bf16 autocast", "fp16 autocast", "mixed", "fp64"],
)
def test_low_precision_moves_deviations_by_its_own_rounding(change: Any, autocast: Any, epsilon: float) -> None:
    """A state is the sum of some twenty rounded terms, each within epsilon: a cosine moves by less than 20 of them."""
    reference = score(samples())
    scores = score(samples(), change(LLAMA.model()), autocast=autocast)
    np.testing.assert_allclose(scores.deviation, reference.deviation, atol=20 * epsilon)
    assert scores.tokens == reference.tokens


@pytest.mark.parametrize(
    "options", [{"load_in_8bit": True}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}], ids=["8 bit", "4 bit"]
)
def test_quantised_models_are_scored(options: dict[str, Any], tmp_path: Path) -> None:
    model = quantised(tmp_path, **options)
    scores = score(samples(), model)
    again = score(samples(), model)
    assert scores.deviation == again.deviation
    # State 0 is the embedding, which is not quantised; head and norm neither.
    assert scores.deviation[0] == pytest.approx(score(samples()).deviation[0], abs=1e-6)
    assert np.isfinite(scores.deviation).all()


# ---- vocabulary ----------------------------------------------------------------------------------------------------


def test_added_tokens_after_a_resize_are_scored() -> None:
    model = LLAMA.model()
    model.resize_token_embeddings(VOCABULARY + 3)
    new = VOCABULARY + 2
    scores = score([Row((5, new, 6, new), (IGNORED, new, 6, new))], model)
    assert scores.tokens == 3 and np.isfinite(scores.deviation).all()


def test_rows_that_pad_the_vocabulary_change_nothing() -> None:
    """Up to the ridge, which is relative to the mean of the Gram matrix; zero rows leave that alone."""
    reference = score(samples())
    model = LLAMA.model()
    model.resize_token_embeddings(VOCABULARY, pad_to_multiple_of=64, mean_resizing=False)
    padded = LLAMA.model()
    padded.resize_token_embeddings(VOCABULARY + 64, mean_resizing=False)
    with torch.no_grad():
        padded.lm_head.weight[VOCABULARY:] = 0
    np.testing.assert_allclose(score(samples(), padded).deviation, reference.deviation, atol=1e-6)


def test_token_ids_beyond_the_vocabulary_are_refused() -> None:
    """The embedding would raise IndexError on a CPU, and stop the whole process on a GPU."""
    with pytest.raises(ScoringError, match=r"row 0 .* token id 168, and the model has 128 embeddings"):
        score([Row((5, VOCABULARY + 40, 6), (IGNORED, IGNORED, 6))])
