"""A weight delta: W' in place of W wherever W is read, for weights that are used without calling a layer.

Experts kept as one tensor, a layer whose weight another module multiplies with, convolutions, and weights that
several modules share: there is no call to hook. While the module that reads the weight runs, its attribute is
shadowed by the changed weight (an entry in the owner's `__dict__`, found before the parameter). The parameter
itself, the class and the state-dict keys stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightsft.anatomy import Weight
from lightsft.low_rank import LowRank, rewrite, rewritten
from lightsft.primitives.base import Change, Part, PlacedPart, drop_hook, drop_pre_hook
from lightsft.row_changes import RowChange

DELTA = "lightsft_delta_"


class WeightDelta(Part):
    """Base of weight deltas. Subclasses define `forward`."""

    mergeable = True

    def forward(self, weight: Tensor) -> Tensor:
        """The weight to use instead of `weight`, of its shape and type."""
        raise NotImplementedError

    def low_rank(self) -> LowRank | None:
        """The same as a low-rank change, where it is one: made by rows, in tiles."""
        return None

    def row_change(self, shape: torch.Size) -> RowChange | None:
        """What it makes of a weight of this shape, by rows, for a merge from disk; None where that takes it whole."""
        return self.low_rank()

    def merged(self, weight: Tensor) -> Tensor:
        """W' in fp32."""
        change = self.low_rank()
        return self(weight.float()) if change is None else rewritten(weight, change)


class PlacedDelta(PlacedPart):
    """A delta on one weight, wherever it is read and under whatever names it is shared."""

    def __init__(self, model: nn.Module, weight: Weight, delta: WeightDelta) -> None:
        self.name, self.model, self.weight = weight.name, model, weight
        delta.to(self.parameter.device)
        for owner in dict.fromkeys(owner for owner, _ in weight.places):
            module, _, attribute = owner.rpartition(".")
            holder = model.get_submodule(module)
            holder.add_module(DELTA + attribute, delta.train(holder.training))
        for owner, reader in weight.places:
            path, reading = _relative(owner, reader), model.get_submodule(reader)
            reading.register_forward_pre_hook(_Shadow(path))
            reading.register_forward_hook(_Unshadow(path), always_call=True)

    @property
    def parameter(self) -> nn.Parameter:
        """The weight that is changed."""
        return self.model.get_parameter(self.weight.owners[0])

    @property
    def part(self) -> Part:  # type: ignore[override]
        """The delta."""
        return self.delta

    @property
    def delta(self) -> WeightDelta:
        """The delta."""
        module, _, attribute = self.weight.places[0][0].rpartition(".")
        delta = self.model.get_submodule(module)._modules[DELTA + attribute]
        assert isinstance(delta, WeightDelta)
        return delta

    def sites(self) -> dict[str, str]:
        """The first module that reads the weight."""
        return dict.fromkeys(self.trainable(), self.weight.places[0][1])

    def covers(self) -> set[str]:
        """The weight, by each of its names."""
        return set(self.weight.owners)

    @torch.no_grad()
    def changes(self) -> Iterator[Change]:
        """W and W'."""
        yield Change(self.weight.owners[0], self.parameter.float(), self.delta.merged(self.parameter))

    def row_changes(self) -> Mapping[str, RowChange] | None:
        """That of the delta."""
        change = self.delta.row_change(self.parameter.shape)
        return None if change is None else {self.weight.owners[0]: change}

    @torch.no_grad()
    def merge(self) -> None:
        """W <- round(W'(fp32(W))), then remove the delta."""
        parameter, change = self.parameter, self.delta.low_rank()
        if change is not None:
            rewrite(parameter, change)
        else:
            parameter.copy_(self.delta.merged(parameter).to(parameter.dtype))
        self.remove()

    def remove(self) -> None:
        """Take delta and hooks off again."""
        for owner, reader in self.weight.places:
            module, path = self.model.get_submodule(reader), _relative(owner, reader)
            drop_pre_hook(module, _Shadow(path))
            drop_hook(module, _Unshadow(path))
        for owner in dict.fromkeys(owner for owner, _ in self.weight.places):
            holder, _, attribute = owner.rpartition(".")
            del self.model.get_submodule(holder)._modules[DELTA + attribute]


def _relative(owner: str, reader: str) -> str:
    """The dotted name of the parameter `owner`, seen from the module `reader` around it."""
    return owner.removeprefix(f"{reader}.") if reader else owner


@dataclass(frozen=True)
class _Shadow:
    """Forward pre-hook: the weight at `path` is replaced by the changed one."""

    path: str

    def __call__(self, reader: nn.Module, args: Any) -> None:
        module, _, attribute = self.path.rpartition(".")
        owner = reader.get_submodule(module)
        delta = owner._modules[DELTA + attribute]
        assert isinstance(delta, WeightDelta)
        if delta.enabled:
            owner.__dict__[attribute] = delta(owner._parameters[attribute])


@dataclass(frozen=True)
class _Unshadow:
    """Forward hook: the parameter shows again."""

    path: str

    def __call__(self, reader: nn.Module, args: Any, output: Any) -> None:
        module, _, attribute = self.path.rpartition(".")
        reader.get_submodule(module).__dict__.pop(attribute, None)
