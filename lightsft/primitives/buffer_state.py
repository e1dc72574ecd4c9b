"""Buffers that training moves by itself (BatchNorm's running statistics): part of what was trained, saved with it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightsft.primitives.base import Arrangement, copy_values
from lightsft.row_changes import RowChange, Values


class BufferState(Arrangement):
    """The buffers called `names`. They move in training mode whatever is trained; the originals are kept."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self.name, self.model, self.names = "buffers", model, tuple(sorted(names))
        self.originals = {name: model.get_buffer(name).detach().clone() for name in self.names}
        self._given: dict[str, Tensor] = {}  # to buffers without values
        self._hidden: dict[str, Tensor] | None = None  # the moved values, while the originals are in place

    def tensors(self) -> dict[str, Tensor]:
        """Their values."""
        if self._hidden is not None:
            return dict(self._hidden)
        return {name: self.model.get_buffer(name).detach() for name in self.names}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Copy saved values into the buffers."""
        self._given = copy_values(self.tensors(), tensors)

    def row_changes(self) -> Mapping[str, RowChange]:
        """Their values."""
        return {name: Values(tensor) for name, tensor in (self.tensors() | self._given).items()}

    @torch.no_grad()
    def enable(self, enabled: bool) -> None:
        """Swap the originals in, or the moved values back."""
        if enabled == (self._hidden is None):
            return
        if not enabled:
            self._hidden = {name: self.model.get_buffer(name).detach().clone() for name in self.names}
        for name, value in (self._hidden if enabled else self.originals or {}).items():  # type: ignore[union-attr]
            self.model.get_buffer(name).copy_(value)
        if enabled:
            self._hidden = None

    @torch.no_grad()
    def remove(self) -> None:
        """Put the originals back."""
        for name, value in self.originals.items():
            self.model.get_buffer(name).copy_(value)
