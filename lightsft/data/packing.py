"""Packing: the sequences of a batch side by side in as few rows as hold them, instead of each padded in its own.

Nothing else changes: the batch holds the same sequences, positions start again with each of them, none sees another,
and the loss is divided by the same number of tokens. So a packed step is the unpacked step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightsft.data.batching import IGNORED, MULTIPLE


@dataclass(frozen=True)
class Layout:
    """How a model is told where sequences begin.

    first_position: the number of a sequence's first position, None for a model that is not told positions. blocks: a
    mask (rows, 1, tokens, tokens) in which a token sees its own sequence; without it the positions alone tell.
    causal: whether a token sees those before it alone. dtype: of the mask.
    """

    first_position: int | None
    blocks: bool
    causal: bool
    dtype: torch.dtype = torch.float32


def assign(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of indices whose lengths sum to at most `capacity`: first fit, the longest first.

    At most 11/9 of the fewest rows possible, and 6/9 more (Dósa, 2007).
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = next((n for n, free in enumerate(room) if free >= lengths[index]), None)
        if place is None:
            rows.append([])
            room.append(capacity)
            place = len(rows) - 1
        rows[place].append(index)
        room[place] -= lengths[index]
    return rows


def pack(features: Sequence[dict[str, Any]], layout: Layout, padding_id: int, *, shifts: bool) -> dict[str, Tensor]:
    """(rows, tokens) of every key that is a list per token, and what tells sequences apart.

    The rows are as long as the longest sequence, rounded up. shifts: whether a token's logits predict the next token;
    the first label of each sequence is then IGNORED, since it would be predicted by the end of another.
    """
    lengths = [len(feature["input_ids"]) for feature in features]
    capacity = -(-max(lengths) // MULTIPLE) * MULTIPLE
    rows = assign(lengths, capacity)
    fill = {"input_ids": padding_id, "labels": IGNORED}
    names = [name for name in features[0] if not name.startswith("_") and name != "attention_mask"]
    batch = {name: _laid(features, name, rows, capacity, fill.get(name, 0)) for name in names}
    places = [[place for index in row for place in range(lengths[index])] for row in rows]
    if shifts:
        firsts = torch.tensor([[place == 0 for place in _filled(row, capacity, 1)] for row in places])
        batch["labels"] = batch["labels"].masked_fill(firsts, IGNORED)
    if layout.first_position is not None:
        # padding goes on counting: it begins no sequence
        batch["position_ids"] = torch.tensor([_counted(row, capacity, layout.first_position) for row in places])
    if layout.blocks:
        owners = [[number for number, index in enumerate(row) for _ in range(lengths[index])] for row in rows]
        batch["attention_mask"] = block_mask(torch.tensor([_filled(row, capacity, -1) for row in owners]), layout)
    return batch


def block_mask(owners: Tensor, layout: Layout) -> Tensor:
    """(rows, 1, tokens, tokens): 0 where both tokens have the same owner (-1: padding), the lowest number elsewhere.

    owners: (rows, tokens), the sequence that each token is of.
    """
    seen = owners[:, :, None] == owners[:, None, :]
    if layout.causal:
        seen &= torch.ones(owners.shape[1], owners.shape[1], dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape, dtype=layout.dtype).masked_fill(~seen, torch.finfo(layout.dtype).min)
    return mask[:, None]


def _laid(
    features: Sequence[dict[str, Any]], name: str, rows: Sequence[Sequence[int]], capacity: int, fill: int
) -> Tensor:
    laid = [[value for index in row for value in features[index][name]] for row in rows]
    return torch.tensor([_filled(row, capacity, fill) for row in laid])


def _filled(row: list[int], capacity: int, fill: int) -> list[int]:
    return row + [fill] * (capacity - len(row))


def _counted(places: list[int], capacity: int, first: int) -> list[int]:
    following = places[-1] + 1
    return [first + place for place in (*places, *range(following, following + capacity - len(places)))]
