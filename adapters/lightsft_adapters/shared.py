"""Tensors that several parts share: held once, by a part on the base model, and referred to by the others.

They are trained, saved and moved to a device once. A part that uses them keeps a plain reference, not a child, so
that copies of the model share among themselves and no tensor has two names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lightsft.primitives import Part, PlacedPart
from lightsft.primitives.base import free_name
from lightsft.primitives.standalone import Standalone
from lightsft.row_changes import RowChange


class PlacedShared(PlacedPart):
    """`part` as a child of the base model: what lies outside counts as task head.

    Its tensors are called `<name>.<tensor>`.
    """

    def __init__(self, model: PreTrainedModel, name: str, part: Part) -> None:
        self.name, self.model = name, model
        self.child = free_name(self.holder, f"lightsft_{name}")
        self.holder.add_module(self.child, part.to(model.device).train(model.training))

    @property
    def holder(self) -> nn.Module:
        """The base model, without the task head."""
        base: nn.Module = self.model.base_model
        return base

    @property
    def part(self) -> Part:  # type: ignore[override]
        """The part that holds the tensors."""
        part = self.holder._modules[self.child]
        assert isinstance(part, Part)
        return part

    def sites(self) -> dict[str, str]:
        """The model itself: whichever of the parts that share them runs."""
        return dict.fromkeys(self.trainable(), "")

    def covers(self) -> set[str]:
        """No parameter: the parts that share them do."""
        return set()

    def row_changes(self) -> Mapping[str, RowChange]:
        """None: the parts that share them change weights."""
        return {}

    def standalone(self) -> Sequence[Standalone]:
        """None: the parts that share them bring them along."""
        return ()

    def merge(self) -> None:
        """The parts that share them merge; here there is nothing to do but go."""
        self.remove()

    def remove(self) -> None:
        """Take the child off again."""
        del self.holder._modules[self.child]


def refer(module: nn.Module, name: str, shared: Any) -> None:
    """`module.name` is `shared`, without `module` owning it."""
    module.__dict__[name] = shared
