"""A side module: a child of the module it serves, and a forward hook `side(served, inputs, output) -> output`.

The hook finds its sides on the module that it is called with, so deepcopy, pickling and fork work. Since only the
input and the output matter, one side serves any layer type, and the served module keeps its class, its weight and
its place in the state dict. Several sides on one module apply in the order in which they were placed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightsft.dry_run import tensors_in
from lightsft.low_rank import LowRank, rewrite, rewritten
from lightsft.plain_layers import plain_twin, unquantize
from lightsft.primitives.base import Change, Part, PlacedPart, drop_hook, drop_pre_hook, free_name
from lightsft.quantization import device_of, parameter_names
from lightsft.row_changes import RowChange

SIDE, TAP = "lightsft_side", "lightsft_tap"


class Side(Part):
    """Base of side modules. Subclasses define `forward`, and `merged` or `delta` when a weight can express them."""

    tapped: Tensor | None = None  # the input of the module it reads, when that is not the one it serves

    def forward(self, served: nn.Module, inputs: Tensor, output: Tensor) -> Tensor:
        """The output to use instead of the served module's `output`; both (batch, ..., features)."""
        raise NotImplementedError

    def delta(self, served: nn.Module) -> Tensor:
        """What to add to `served.weight` for the same effect (fp32, its shape). Only of `mergeable` sides."""
        raise NotImplementedError(f"{type(self).__name__} is not linear in its input")

    def low_rank(self, served: nn.Module) -> LowRank | None:
        """The same as a low-rank change of `served.weight` as it is stored, where it is one: made by rows, in tiles."""
        return None

    def row_changes(self, served: nn.Module) -> Mapping[str, RowChange] | None:
        """What `merged` gives, by rows, for a merge from disk; None where that takes the weight whole."""
        change = self.low_rank(served)
        return None if change is None else {"weight": change}

    def merged(self, served: nn.Module) -> dict[str, Tensor]:
        """The served module's parameters, by name, as they must be without this side (fp32)."""
        change, weight = self.low_rank(served), served.weight
        assert isinstance(weight, Tensor)
        return {"weight": weight.float() + self.delta(served) if change is None else rewritten(weight, change)}


class PlacedSide(PlacedPart):
    """A side on `model.get_submodule(name)`; with `reads`, its input is taken where that other module takes its own."""

    def __init__(self, model: nn.Module, name: str, side: Side, reads: str | None = None) -> None:
        self.name, self.reads, self.model = name, reads, model
        served = self.served
        device = device_of(served)
        if device is not None:
            side.to(device)
        if not sides_of(served, SIDE):
            served.register_forward_hook(run_sides, with_kwargs=True)
        self.child = free_name(served, SIDE)
        served.add_module(self.child, side.train(served.training))
        if reads is not None:
            reader = model.get_submodule(reads)
            if not sides_of(reader, TAP):
                reader.register_forward_pre_hook(run_taps, with_kwargs=True)
            self.tap = free_name(reader, TAP)
            reader.add_module(self.tap, side)

    @property
    def served(self) -> nn.Module:
        """The module that carries the side."""
        return self.model.get_submodule(self.name)

    @property
    def side(self) -> Side:
        """The side module."""
        side = self.served._modules[self.child]
        assert isinstance(side, Side)
        return side

    @property
    def part(self) -> Part:  # type: ignore[override]
        """The side module."""
        return self.side

    def covers(self) -> set[str]:
        """The parameters of the served module; of a quantized one the weight that its codes stand for."""
        return {f"{self.name}.{name}" for name in parameter_names(self.served)}

    @torch.no_grad()
    def changes(self) -> Iterator[Change]:
        """W and what the side makes of it."""
        served = plain_twin(self.served)
        for name, value in self.side.merged(served).items():
            yield Change(f"{self.name}.{name}", served.get_parameter(name).float(), value)

    def _place(self) -> dict[str, Any]:
        return {"on": self.name, "reads": self.reads}

    def row_changes(self) -> Mapping[str, RowChange] | None:
        """Those of the side."""
        found = self.side.row_changes(self.served)
        return None if found is None else {f"{self.name}.{name}": change for name, change in found.items()}

    @torch.no_grad()
    def merge(self) -> None:
        """W <- round(what the side says, in fp32), then remove the side; a quantized layer becomes plain, in fp32."""
        unquantize(self.served)
        change = self.side.low_rank(self.served)
        if change is not None:
            rewrite(self.served.get_parameter("weight"), change)
        else:
            for name, value in self.side.merged(self.served).items():
                parameter = self.served.get_parameter(name)
                parameter.copy_(value.to(parameter.dtype))
        self.remove()

    def remove(self) -> None:
        """Take the child module off again, and the hooks with the last one."""
        served = self.served
        del served._modules[self.child]
        if not sides_of(served, SIDE):
            drop_hook(served, run_sides)
        if self.reads is not None:
            reader = self.model.get_submodule(self.reads)
            del reader._modules[self.tap]
            if not sides_of(reader, TAP):
                drop_pre_hook(reader, run_taps)


def sides_of(module: nn.Module, kind: str) -> list[Side]:
    """The sides (or taps) on a module, in the order in which they were placed."""
    return [child for name, child in module._modules.items() if name.startswith(kind) and isinstance(child, Side)]


def run_sides(served: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of a served module; of a tuple or dict of outputs, the first tensor is the one that counts."""
    active = [side for side in sides_of(served, SIDE) if side.enabled]
    if not active:
        return None
    result = first_output(output)
    for side in active:
        inputs = side.tapped if side.tapped is not None else next(tensors_in((args, kwargs)), result)
        side.tapped = None
        result = side(served, inputs, result)
    return with_first_output(output, result)


def run_taps(reader: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a module whose input a side reads."""
    for side in sides_of(reader, TAP):
        side.tapped = next(tensors_in((args, kwargs)), None) if side.enabled else None


def first_output(output: Any) -> Tensor:
    """The output itself, or the first tensor in a tuple, list or dict of outputs."""
    if isinstance(output, Tensor):
        return output
    return next(tensors_in((output,)))


def with_first_output(output: Any, replacement: Tensor) -> Any:
    """The same outputs with the first tensor replaced; dicts (a ModelOutput too) are changed in place."""
    if isinstance(output, Tensor):
        return replacement
    keys = list(output) if isinstance(output, dict) else range(len(output))
    items = [output[key] for key in keys]
    place = next(index for index, value in enumerate(items) if next(tensors_in((value,)), None) is not None)
    items[place] = with_first_output(items[place], replacement)
    if isinstance(output, dict):
        output[list(output)[place]] = items[place]
        return output
    return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
