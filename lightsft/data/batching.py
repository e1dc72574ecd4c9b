"""Batches of rows of similar length, in an order that depends on (seed, epoch) alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

IGNORED = -100  # the label of a position that carries no loss
MULTIPLE = 8  # lengths are padded to a multiple of this, which kernels like


class SimilarLengths(Sampler[int]):
    """Shuffles, then sorts windows of 32 batches by length, then shuffles the batches.

    Neither the strategy nor what ran before changes the order: each epoch has a generator of its own, so that
    strategies are compared on the same batches and a resumed run continues the same sequence.
    """

    window = 32

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = list(lengths), batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=random).tolist()
        step = self.window * self.batch_size
        windows = [sorted(order[i : i + step], key=self.lengths.__getitem__) for i in range(0, len(order), step)]
        grouped = [index for window in windows for index in window]
        batches = [grouped[i : i + self.batch_size] for i in range(0, len(grouped), self.batch_size)]
        last = batches.pop() if batches and len(batches[-1]) < self.batch_size else []
        for number in torch.randperm(len(batches), generator=random).tolist():
            yield from batches[number]
        yield from last


class TokenBudget(Sampler[list[int]]):
    """Batches of rows of similar length whose padded size, rows times the longest, is at most `budget` tokens.

    Rows are sorted by length, rows of the same length in an order that depends on (seed, epoch); the batches are then
    shuffled. So the number of batches is the same in every epoch. A row longer than the budget is a batch by itself.
    """

    batch_size = None  # there is no such number; accelerate asks

    def __init__(self, lengths: Sequence[int], budget: int, seed: int) -> None:
        self.lengths, self.budget, self.seed, self.epoch = list(lengths), budget, seed, 0
        self.batches = len(self._batches(sorted(range(len(lengths)), key=self.lengths.__getitem__)))

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=random).tolist()
        batches = self._batches(sorted(order, key=self.lengths.__getitem__))
        for number in torch.randperm(len(batches), generator=random).tolist():
            yield batches[number]

    def _batches(self, order: Sequence[int]) -> list[list[int]]:
        """Sorted rows cut where the next one would exceed the budget."""
        batches: list[list[int]] = []
        for index in order:
            padded = -(-self.lengths[index] // MULTIPLE) * MULTIPLE
            if not batches or (len(batches[-1]) + 1) * padded > self.budget:
                batches.append([])
            batches[-1].append(index)
        return batches


def pad(rows: Sequence[Sequence[int]], value: int, *, left: bool = False) -> Tensor:
    """(rows, longest length rounded up to MULTIPLE), filled with `value`."""
    longest = -(-max(len(row) for row in rows) // MULTIPLE) * MULTIPLE
    padded = [
        [value] * (longest - len(row)) + list(row) if left else list(row) + [value] * (longest - len(row))
        for row in rows
    ]
    return torch.tensor(padded)


def pad_features(features: Sequence[dict[str, Any]], padding_id: int, *, left: bool = False) -> dict[str, Tensor]:
    """Batch token features: ids padded with `padding_id`, masks and token types with 0, label rows with IGNORED.

    What starts with `_` is left out."""
    fill = {"input_ids": padding_id, "labels": IGNORED}
    return {
        name: pad([feature[name] for feature in features], fill.get(name, 0), left=left)
        if isinstance(features[0][name], list)
        else torch.tensor([feature[name] for feature in features])
        for name in features[0]
        if not name.startswith("_")
    }
