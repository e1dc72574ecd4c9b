"""What every primitive can do. An Injection is a list of these, and never asks which kind one is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lightsft.primitives.standalone import Standalone
from lightsft.row_changes import RowChange


class Change(NamedTuple):
    """What merging does to one weight: before and after, in fp32."""

    name: str
    before: Tensor
    after: Tensor


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

    def sites(self) -> dict[str, str]:
        """For each trainable parameter, the module that must run for it to get a gradient."""
        return dict.fromkeys(self.trainable(), self.name)

    def leave(self, names: list[str]) -> None:
        """Stop training these parameters, which a forward pass never uses; some, never all, of its own."""
        raise NotImplementedError(f"{type(self).__name__} is placed as a whole: {', '.join(names)} cannot be left out")

    def shapes(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        """The shapes that `load` accepts, by name; one unless a primitive has several forms on disk."""
        return {name: (tuple(tensor.shape),) for name, tensor in self.tensors().items()}

    @property
    def mergeable(self) -> bool:
        """Whether it can be folded into the backbone's weights."""
        return False

    def changes(self) -> Iterator[Change]:
        """What `merge` would do, weight by weight and before any rounding; nothing is touched."""
        yield from ()

    def row_changes(self) -> Mapping[str, RowChange] | None:
        """The same of stored weights, by rows and by the parameter's name: what a merge from disk does.

        None where merging takes the model in memory.
        """
        return None

    def copies(self) -> Mapping[str, str]:
        """Parameters that it gives the model, each a copy of another of the model's own: by name, that one's name."""
        return {}

    def store_as(self, dtype: torch.dtype) -> None:  # noqa: B027 - most keep nothing
        """Before a merge: the backbone's weights are in this type now, which what was kept of them is to be in too."""

    def merge(self) -> None:
        """Fold it into the weights, in fp32 with one rounding. Called only when `mergeable`, and once."""
        raise NotImplementedError(f"{type(self).__name__} is not mergeable")

    def standalone(self) -> Sequence[Standalone] | None:
        """What does the same in an exported model; none where others bring it along, None where nothing does."""
        return None

    def learning_rate_ratio(self, name: str) -> float:
        """By how much the learning rate of the parameter `name` is multiplied (LoRA+)."""
        return 1.0


class Arrangement(Primitive):
    """A primitive without trained parameters: it arranges the backbone for others. A merge keeps what it did."""

    def trainable(self) -> dict[str, nn.Parameter]:
        """Nothing."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Nothing to load."""

    def enable(self, enabled: bool) -> None:
        """It changes no value."""

    def covers(self) -> set[str]:
        """No parameter."""
        return set()

    @property
    def mergeable(self) -> bool:
        """It stays."""
        return True

    def row_changes(self) -> Mapping[str, RowChange] | None:
        """None of a weight."""
        return {}

    def merge(self) -> None:
        """Nothing to do."""


class Part(nn.Module):
    """Base of the modules that are placed on a backbone: what is saved of them, and how."""

    mergeable: ClassVar[bool] = False
    enabled: bool = True

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name: those that require a gradient when it is built."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def tensors(self) -> dict[str, Tensor]:
        """What is saved: the parameters, detached."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def shapes(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        """The shapes `load` accepts for each saved tensor."""
        return {name: (tuple(tensor.shape),) for name, tensor in self.tensors().items()}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Copy saved tensors into the parameters of the same names."""
        for name, parameter in self.named_parameters():
            parameter.copy_(tensors[name])

    def standalone(self) -> Standalone | None:
        """What computes the same in an exported model, as it evaluates; None where nothing does."""
        return None

    def make_again(self) -> None:
        """Give values to what is neither trained nor saved, in a part that was built without any."""

    def learning_rate_ratio(self, name: str) -> float:
        """By how much this parameter's learning rate is multiplied."""
        return 1.0


class PlacedPart(Primitive):
    """A primitive whose tensors are those of one part, under `<name>.`."""

    part: Part

    def trainable(self) -> dict[str, nn.Parameter]:
        """The part's trained parameters."""
        return {f"{self.name}.{name}": parameter for name, parameter in self.part.trained().items()}

    def tensors(self) -> dict[str, Tensor]:
        """What the part saves."""
        return {f"{self.name}.{name}": tensor for name, tensor in self.part.tensors().items()}

    def shapes(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        """What the part accepts."""
        return {f"{self.name}.{name}": shapes for name, shapes in self.part.shapes().items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Give the part its tensors back."""
        self.part.load({name.removeprefix(f"{self.name}."): tensor for name, tensor in tensors.items()})

    def enable(self, enabled: bool) -> None:
        """A disabled part is not called at all."""
        self.part.enabled = enabled

    @property
    def mergeable(self) -> bool:
        """Whether the part can be written into the weight."""
        return self.part.mergeable

    def standalone(self) -> Sequence[Standalone] | None:
        """What the part says, at its place."""
        found = self.part.standalone()
        return None if found is None else (replace(found, place=self._place()),)

    def _place(self) -> dict[str, Any]:
        """Where it is, as the stand-in's `place` takes it."""
        return {"on": self.name}

    def learning_rate_ratio(self, name: str) -> float:
        """What the part says of its parameter."""
        return self.part.learning_rate_ratio(name.removeprefix(f"{self.name}."))


@torch.no_grad()
def copy_values(into: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy values into the tensors of the same names; returned are those for tensors that can hold none."""
    for name, tensor in into.items():
        if not tensor.is_meta:
            tensor.copy_(values[name])
    return {name: values[name] for name, tensor in into.items() if tensor.is_meta}


def free_name(module: nn.Module, wanted: str) -> str:
    """A name that no child of `module` has: `wanted`, or `wanted` with a number."""
    name, number = wanted, 1
    while name in module._modules:
        number += 1
        name = f"{wanted}_{number}"
    return name


def drop_hook(module: nn.Module, function: Any) -> None:
    """Take every forward hook equal to `function` off a module."""
    _drop(function, module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called)


def drop_pre_hook(module: nn.Module, function: Any) -> None:
    """The same of the hooks that are called before it."""
    _drop(function, module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs)


def _drop(function: Any, hooks: dict[int, Any], *notes: dict[int, bool]) -> None:
    for key in [key for key, hook in hooks.items() if hook == function]:
        del hooks[key]
        for table in notes:
            table.pop(key, None)
