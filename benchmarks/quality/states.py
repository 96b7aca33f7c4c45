"""Latent states of a task on disk: one forward pass for a model and task, then every run starts at its cut.

A folder holds `rows.json` (token ids and labels), and for `train` and `heldout` one flat tensor (tokens, D) for each
depth, in the model's own dtype, which is what the layer at that depth receives in a whole run. Files are mapped, so
several processes share them.
"""

import json
from pathlib import Path

import torch
from students import Cached, Row, autocast, by_length, pad
from tasks import Rows
from torch import Tensor
from transformers import PreTrainedModel

from axolotl_layersel.model.decoder_stack import find_stack
from axolotl_layersel.model.latent_states import read_states


def write_rows(folder: Path, data: Rows) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.json").write_text(json.dumps({"train": data.train, "heldout": data.heldout}), encoding="utf-8")


def read_rows(folder: Path) -> Rows:
    found = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    return Rows(**{part: [(ids, labels) for ids, labels in found[part]] for part in ("train", "heldout")})


@torch.no_grad()
def write_states(model: PreTrainedModel, folder: Path, part: str, rows: list[Row], depths: list[int]) -> None:
    """Runs the frozen model once over the rows, in the precision of training, and keeps the states at `depths`."""
    stack, device = find_stack(model), next(model.parameters()).device
    model.eval()
    lengths = [len(ids) for ids, _ in rows]
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    width, dtype = model.get_input_embeddings().weight.shape[1], next(model.parameters()).dtype
    flat = {depth: torch.empty(starts[-1], width, dtype=dtype) for depth in depths}
    for batch in by_length([torch.tensor(label) for _, label in rows], 16):
        ids = pad([torch.tensor(rows[r][0]) for r in batch], 0).to(device)
        mask = pad([torch.ones(lengths[r], dtype=torch.long) for r in batch], 0).to(device)

        def reader(state: int, hidden_BTD: Tensor, batch: list[int] = batch) -> None:
            if state in flat:
                for place, row in enumerate(batch):
                    flat[state][starts[row] : starts[row + 1]] = hidden_BTD[place, : lengths[row]].to(dtype).cpu()

        with autocast(model):
            read_states(stack, input_ids=ids, attention_mask=mask, reader=reader)
    for depth, tensor in flat.items():
        torch.save(tensor, folder / f"{part}-{depth}.part")
        (folder / f"{part}-{depth}.part").rename(folder / f"{part}-{depth}.pt")


def read_cached(folder: Path, part: str, rows: list[Row], depth: int) -> Cached:
    """Rows with the states at one depth, mapped from disk."""
    flat = torch.load(folder / f"{part}-{depth}.pt", mmap=True)
    states = list(flat.split([len(ids) for ids, _ in rows]))
    return Cached(labels=[torch.tensor(label) for _, label in rows], states={depth: states})
