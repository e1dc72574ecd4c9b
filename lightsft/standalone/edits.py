"""LoReFT: h <- h + R^T (W h + b - R h) on the residual stream, at some positions of the prompt (2404.03592)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .calls import READER
from .sides import Side


class Edits(Side):
    """The edit of one block's output h (..., size): one for all places, or one for each end of the prompt.

    `ends`: how many of the first and of the last tokens; None for every token. `axis` is where the features of h lie;
    counted without it, `batch` and `token` are the axes of rows and tokens, `token` None where all others are tokens.
    """

    def __init__(
        self, rank: int, size: int, number: int, ends: list[int] | None, axis: int, batch: int, token: int | None
    ) -> None:
        super().__init__()
        self.ends, self.axis, self.batch, self.token = ends, axis, batch, token
        self.edits = nn.ModuleList(Subspace(rank, size) for _ in range(number))

    def forward(self, served: nn.Module, inputs: Tensor, output: Tensor) -> Tensor:
        """The edited output."""
        states = output.movedim(self.axis, -1)
        places = self._places(served, inputs, states)
        if places is None:
            return output
        changes = [edit(states, place) for edit, place in zip(self.edits, places, strict=True)]
        change: Tensor = sum(changes[1:], start=changes[0])
        return output + change.movedim(-1, self.axis).to(output.dtype)

    def _places(self, served: nn.Module, inputs: Tensor, states: Tensor) -> list[Tensor | None] | None:
        """For each edit what is true where it applies, None for everywhere; None alone: nowhere."""
        if self.ends is None:
            return [None]
        rows, length = states.shape[self.batch], states.shape[:-1].numel() // states.shape[self.batch]
        tokens = length if self.token is None else states.shape[self.token]
        prompt = self.__dict__[READER].prompt(rows, tokens, inputs.device)
        if prompt is None:
            return None
        first, last = ends_of(prompt, *self.ends)
        chosen = [first | last] if len(self.edits) == 1 else [first, last]
        return [self._spread(place, states) for place in chosen]

    def _spread(self, place: Tensor, states: Tensor) -> Tensor:
        """(rows or 1, tokens), to be multiplied with `states`."""
        if self.token is None:
            return place.reshape(len(place), *states.shape[1:-1], 1)
        shape = [1] * states.ndim
        shape[self.batch], shape[self.token] = place.shape
        return (place.T if self.token < self.batch else place).reshape(shape)

    def place(self, model: nn.Module, on: str, reads: str | None = None) -> None:
        """Serve the module called `on`; edits at some positions ask the model's prompt reader for them."""
        super().place(model, on, reads)
        self.__dict__[READER] = model.__dict__.get(READER)


class Subspace(nn.Module):
    """`rotation` is R (rank, size), `rest` is W - R, `bias` is b."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rotation = nn.Parameter(torch.zeros(rank, size, dtype=torch.float32))
        self.rest = nn.Parameter(torch.zeros(rank, size, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(rank, dtype=torch.float32))

    def forward(self, states: Tensor, place: Any) -> Tensor:
        """R^T (W h + b - R h) where `place` is true, zero elsewhere."""
        low = nn.functional.linear(states, self.rest.to(states.dtype), self.bias.to(states.dtype))
        if place is not None:
            low = low * place
        return low @ self.rotation.to(states.dtype)


def ends_of(prompt: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
    """(the first tokens of the prompt, the last ones), each (batch, length); a token belongs to the nearer end."""
    index, count = prompt.cumsum(1) - 1, prompt.sum(1, keepdim=True)
    among_first, among_last = prompt & (index < first), prompt & (index >= count - last)
    among_first = among_first & ((2 * index < count) | ~among_last)
    return among_first, among_last & ~among_first
