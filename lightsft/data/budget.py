"""How many tokens each update of a training reads, in the order in which it reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, count

from lightsft.data.batching import SimilarLengths, TokenBudget


def tokens_of_updates(
    sampler: SimilarLengths | TokenBudget, lengths: Sequence[int], batches_per_update: int
) -> Iterator[int]:
    """Real tokens of update 1, 2, ..., over as many epochs as are asked for; padding is not counted.

    batches_per_update: gradient accumulation times processes; the last update of an epoch may have fewer.
    """
    for epoch in count():
        sampler.set_epoch(epoch)
        batches = list(_batches(sampler))
        for first in range(0, len(batches), batches_per_update):
            yield sum(lengths[row] for batch in batches[first : first + batches_per_update] for row in batch)


def updates_for(budget: int, tokens: Iterator[int]) -> int:
    """The fewest updates that read at least `budget` tokens."""
    return next(number for number, read in enumerate(accumulate(tokens), 1) if read >= budget)


def _batches(sampler: SimilarLengths | TokenBudget) -> Iterator[list[int]]:
    if isinstance(sampler, TokenBudget):
        yield from sampler
        return
    rows = list(sampler)
    for first in range(0, len(rows), sampler.batch_size):
        yield rows[first : first + sampler.batch_size]
