"""Sides: a side is a child of the module that it serves, and replaces that module's output after each call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

SIDE, TAPS = "lightsft_side", "lightsft_taps"


class Side(nn.Module):
    """Base of sides, which define `forward`."""

    tapped: Tensor | None = None  # the input of the module that it reads, where that is not the one it serves

    def forward(self, served: nn.Module, inputs: Tensor, output: Tensor) -> Tensor:
        """What to use in the place of `output`, which `served` gave; `inputs` is what was read."""
        raise NotImplementedError

    def place(self, model: nn.Module, on: str, reads: str | None = None) -> None:
        """Serve the module called `on`, and read what the module called `reads` is called with: by default the same."""
        served = model.get_submodule(on)
        number = len(sides_of(served))
        if not number:
            served.register_forward_hook(run_sides, with_kwargs=True)
        served.add_module(f"{SIDE}_{number + 1}" if number else SIDE, self)
        if reads is not None:
            reader = model.get_submodule(reads)
            if TAPS not in reader.__dict__:
                reader.__dict__[TAPS] = []  # no children: a tensor has one name
                reader.register_forward_pre_hook(run_taps, with_kwargs=True)
            reader.__dict__[TAPS].append(self)


class Affine(nn.Module):
    """W x + b in the type of x. No linear layer, so that nothing quantizes it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, inputs, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(outputs, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class Norm(nn.Module):
    """A layer norm in fp32, returned in the type of its input."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(size, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) -> (..., size)."""
        size, weight, bias = self.weight.shape, self.weight.float(), self.bias.float()
        return nn.functional.layer_norm(x.float(), size, weight, bias).to(x.dtype)


def sides_of(module: nn.Module) -> list[Any]:
    """The sides on a module, in the order in which they act."""
    return [child for name, child in module._modules.items() if name.startswith(SIDE)]


def run_sides(served: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of a served module; of several outputs, the first tensor is the one that counts."""
    result = next(tensors_in((output,)))
    for side in sides_of(served):
        inputs = next(tensors_in((args, kwargs)), result) if side.tapped is None else side.tapped
        side.tapped = None
        result = side(served, inputs, result)
    return with_first(output, result)


def run_taps(reader: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a module whose input a side reads."""
    for side in reader.__dict__[TAPS]:
        side.tapped = next(tensors_in((args, kwargs)), None)


def tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list | dict):
            yield from tensors_in(value)


def with_first(output: Any, replacement: Tensor) -> Any:
    """The same output with its first tensor replaced."""
    if isinstance(output, Tensor):
        return replacement
    keys = list(output) if isinstance(output, dict) else range(len(output))
    items = [output[key] for key in keys]
    place = next(number for number, item in enumerate(items) if next(tensors_in((item,)), None) is not None)
    items[place] = with_first(items[place], replacement)
    if isinstance(output, dict):
        output[list(output)[place]] = items[place]
        return output
    return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
