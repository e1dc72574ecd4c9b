"""Spans of tokens: where characters lie among them, and the best one by two scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def within(
    characters: tuple[int, int] | None, offsets: Sequence[tuple[int, int]], first: int, last: int
) -> tuple[int, int] | None:
    """The first and the last token among first..last with a part of characters [start, end).

    None where the window does not hold all of them. Several tokens may stand for one character (its bytes).
    """
    if characters is None:
        return None
    start, end = characters
    if offsets[first][0] > start or offsets[last][1] < end:
        return None
    touched = [i for i in range(first, last + 1) if offsets[i][1] > start and offsets[i][0] < end]
    return (touched[0], touched[-1]) if touched else None


def best_spans(start: Tensor, end: Tensor, first: Tensor, last: Tensor, longest: int) -> tuple[Tensor, Tensor, Tensor]:
    """(score, begin, end) of the span with the highest start[i] + end[j], first <= i <= j <= last, j - i < longest.

    start, end: (batch, tokens) in fp32. Only diagonals are added, (batch, tokens, longest) numbers.
    """
    tokens = start.shape[1]
    places = torch.arange(tokens, device=start.device)
    inside = (places >= first[:, None]) & (places <= last[:, None])
    start, end = (x.masked_fill(~inside, -torch.inf) for x in (start, end))
    longest = min(longest, tokens)
    ends = torch.nn.functional.pad(end, (0, longest - 1), value=-torch.inf).unfold(1, longest, 1)
    score, flat = (start[:, :, None] + ends).flatten(1).max(dim=1)
    begin = flat // longest
    return score, begin, begin + flat % longest
