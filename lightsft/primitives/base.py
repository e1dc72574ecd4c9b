"""What every primitive can do. An Injection is a list of these, and never asks which kind one is."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Primitive(ABC):
    """Something placed on the module called `name`, without changing the tree, class or keys of the model."""

    name: str

    @abstractmethod
    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters it trains, by their full dotted name."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What is saved of it, by full dotted name."""

    @abstractmethod
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `tensors()` gave, bit for bit. Names and shapes have been checked."""

    @abstractmethod
    def enable(self, enabled: bool) -> None:
        """Turn its effect on or off; off leaves the backbone as it was, bit for bit."""

    @abstractmethod
    def remove(self) -> None:
        """Take it off the backbone, which is then as it was, bit for bit."""

    @abstractmethod
    def covers(self) -> set[str]:
        """Names of the backbone's parameters that it serves, for `Injection.coverage`."""

    def shapes(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        """The shapes that `load` accepts, by name; one unless a primitive has several forms on disk."""
        return {name: (tuple(tensor.shape),) for name, tensor in self.tensors().items()}

    @property
    def mergeable(self) -> bool:
        """Whether it can be folded into the backbone's weights."""
        return False

    def merge(self) -> None:
        """Fold it into the weights, in fp32 with one rounding. Called only when `mergeable`, and once."""
        raise NotImplementedError(f"{type(self).__name__} is not mergeable")

    def learning_rate_ratio(self, name: str) -> float:
        """By how much the learning rate of the parameter `name` is multiplied (LoRA+)."""
        return 1.0
