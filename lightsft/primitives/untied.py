"""A weight of its own for a module that shared one: what is trained on it then leaves the other module alone."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightsft.dry_run import text_config
from lightsft.primitives.base import Arrangement


class Untied(Arrangement):
    """The module called `name` gets a copy of the weight it shares, for others to train on; the configuration knows."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.name, self.model = name, model
        self.shared = self._weight
        self.own = nn.Parameter(self.shared.detach().clone(), requires_grad=False)
        self.tied_before: dict[int, bool] = {}
        self._use(self.own, tied=False)

    @property
    def _weight(self) -> nn.Parameter:
        weight = self.model.get_submodule(self.name)._parameters["weight"]
        assert weight is not None
        return weight

    def _use(self, weight: nn.Parameter, *, tied: bool) -> None:
        self.model.get_submodule(self.name)._parameters["weight"] = weight
        config: Any = self.model.config
        for part in {id(part): part for part in (config, text_config(self.model))}.values():
            before = bool(getattr(part, "tie_word_embeddings", False))
            self.tied_before.setdefault(id(part), before)
            part.tie_word_embeddings = self.tied_before[id(part)] if tied else False

    def copies(self) -> dict[str, str]:
        """The weight, of one that shares what it shared."""
        others = (name for name, p in self.model.named_parameters(remove_duplicate=False) if p is self.shared)
        return {f"{self.name}.weight": next(others)}

    def remove(self) -> None:
        """Share the weight again."""
        self._use(self.shared, tied=True)
