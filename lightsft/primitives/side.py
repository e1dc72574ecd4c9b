"""A side module: a child of the module it serves, and a forward hook `side(served, inputs, output) -> output`.

The hook finds the side on the module that it is called with, so deepcopy, pickling and fork work. Since only the
input and the output matter, one side serves any layer type, and the served module keeps its class, its weight and
its place in the state dict.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightsft.errors import InjectionError
from lightsft.primitives.base import Primitive

SIDE, TAP = "lightsft_side", "lightsft_tap"


class Side(nn.Module):
    """Base of side modules. Subclasses define `forward`, and `delta` when they are linear in the input."""

    mergeable: ClassVar[bool] = False
    enabled: bool = True
    tapped: Tensor | None = None  # the input of the module it reads, when that is not the one it serves

    def forward(self, served: nn.Module, inputs: Tensor, output: Tensor) -> Tensor:
        """The output to use instead of the served module's `output`; both (batch, ..., features)."""
        raise NotImplementedError

    def delta(self, served: nn.Module) -> Tensor:
        """What to add to `served.weight` for the same effect (fp32, its shape). Only of `mergeable` sides."""
        raise NotImplementedError(f"{type(self).__name__} is not linear in its input")

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

    def learning_rate_ratio(self, name: str) -> float:
        """By how much this parameter's learning rate is multiplied."""
        return 1.0


class PlacedSide(Primitive):
    """A side on `model.get_submodule(name)`; with `reads`, its input is taken where that other module takes its own."""

    def __init__(self, model: nn.Module, name: str, side: Side, reads: str | None = None) -> None:
        self.name, self.reads, self.model = name, reads, model
        if SIDE in self.served._modules:
            raise InjectionError(
                f"{name} already carries a side module",
                expected="one side per module",
                todo="name each target once",
            )
        reference = next((parameter for parameter in self.served.parameters()), None)
        if reference is not None:
            side.to(reference.device)
        self.served.add_module(SIDE, side.train(self.served.training))
        self.served.register_forward_hook(run_side, with_kwargs=True)
        if reads is not None:
            reader = model.get_submodule(reads)
            reader.add_module(TAP, side)
            reader.register_forward_pre_hook(run_tap, with_kwargs=True)

    @property
    def served(self) -> nn.Module:
        """The module that carries the side."""
        return self.model.get_submodule(self.name)

    @property
    def side(self) -> Side:
        """The side module."""
        side = self.served._modules[SIDE]
        assert isinstance(side, Side)
        return side

    def trainable(self) -> dict[str, nn.Parameter]:
        """The side's parameters."""
        return {f"{self.name}.{name}": parameter for name, parameter in self.side.named_parameters()}

    def tensors(self) -> dict[str, Tensor]:
        """What the side saves."""
        return {f"{self.name}.{name}": tensor for name, tensor in self.side.tensors().items()}

    def shapes(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        """What the side accepts."""
        return {f"{self.name}.{name}": shapes for name, shapes in self.side.shapes().items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Give the side its tensors back."""
        self.side.load({name.removeprefix(f"{self.name}."): tensor for name, tensor in tensors.items()})

    def enable(self, enabled: bool) -> None:
        """A disabled side is not called at all."""
        self.side.enabled = enabled

    def covers(self) -> set[str]:
        """The parameters of the served module."""
        return {f"{self.name}.{name}" for name, _ in self.served.named_parameters() if not name.startswith((SIDE, TAP))}

    @property
    def mergeable(self) -> bool:
        """Whether the side is linear in its input."""
        return self.side.mergeable

    @torch.no_grad()
    def merge(self) -> None:
        """W <- round(fp32(W) + delta), then remove the side."""
        weight = self.served.weight
        assert isinstance(weight, Tensor)
        weight.copy_((weight.float() + self.side.delta(self.served)).to(weight.dtype))
        self.remove()

    def remove(self) -> None:
        """Take the hooks and the child module off again."""
        _drop_hook(self.served._forward_hooks, self.served._forward_hooks_with_kwargs, run_side)
        del self.served._modules[SIDE]
        if self.reads is not None:
            reader = self.model.get_submodule(self.reads)
            _drop_hook(reader._forward_pre_hooks, reader._forward_pre_hooks_with_kwargs, run_tap)
            del reader._modules[TAP]

    def learning_rate_ratio(self, name: str) -> float:
        """What the side says of its parameter."""
        return self.side.learning_rate_ratio(name.removeprefix(f"{self.name}."))


def run_side(served: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
    """Forward hook of a served module."""
    side = served._modules[SIDE]
    assert isinstance(side, Side)
    if not side.enabled:
        return None
    inputs = side.tapped if side.tapped is not None else first_tensor(args, kwargs)
    side.tapped = None
    result: Tensor = side(served, inputs, output)
    return result


def run_tap(reader: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a module whose input a side reads."""
    side = reader._modules[TAP]
    assert isinstance(side, Side)
    side.tapped = first_tensor(args, kwargs) if side.enabled else None


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The first tensor among a module's arguments."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise InjectionError("a served module was called without a tensor", expected="a module that takes a tensor")


def _drop_hook(hooks: dict[int, Any], with_kwargs: dict[int, bool], function: Any) -> None:
    for key in [key for key, hook in hooks.items() if hook is function]:
        del hooks[key]
        with_kwargs.pop(key, None)
