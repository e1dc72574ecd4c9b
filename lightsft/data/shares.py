"""What each of several processes takes of the batches that they train on together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

from torch.utils.data import Dataset, Sampler

from lightsft.data.batching import SimilarLengths, TokenBudget

Item = TypeVar("Item")
ABSENT = "absent"  # in a batch that stands in for none: what is computed on it counts nothing


class Shares(Sampler[list[int]]):
    """The batches of process `rank` of `processes`; one step of all of them is what one process would do in one.

    Of rows in batches of equal size, each step has a batch of the common size, split row by row: the sampler is made
    for the common size, so that `processes` times b rows give the updates of one process with that many. Of batches by
    tokens, a step has as many as there are processes: the updates of one process that accumulates as many.
    Every process has the same number of steps. One that gets nothing of a step reads a row as -1 - its number.
    """

    batch_size = None

    def __init__(self, sampler: SimilarLengths | TokenBudget, rank: int, processes: int) -> None:
        self.sampler, self.rank, self.processes = sampler, rank, processes

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader before each epoch."""
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return -(-len(self.sampler) // (self.sampler.batch_size or self.processes))

    def __iter__(self) -> Iterator[list[int]]:
        if isinstance(self.sampler, TokenBudget):
            for group in _groups(self.sampler, self.processes):
                yield group[self.rank] if self.rank < len(group) else _stand_in(group[0])
            return
        for rows in _groups(self.sampler, self.sampler.batch_size):
            yield list(rows[self.rank :: self.processes]) or _stand_in(rows)


def _groups(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    rest = iter(items)
    while group := list(islice(rest, size)):
        yield group


def _stand_in(rows: Sequence[int]) -> list[int]:
    return [-1 - rows[0]]


class StandIns(Dataset[dict[str, Any]]):
    """A data set in which the row -1 - n is row n, marked as absent."""

    def __init__(self, rows: Dataset[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index] if index >= 0 else {**self.rows[-1 - index], f"_{ABSENT}": True}
