"""The sublayers of each block: the modules that write to the residual stream, and where each branch begins.

A writer is a module whose output is added to what entered the module around it, as seen in the trace. Where no such
sum is seen for an attention, or for the rest of a block, the last linear layer called in it counts as one if its output
is as wide as the block's input; and where there is none at all, the block itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from lightsft.anatomy import CONVOLUTIONS, Anatomy, is_layer, is_within
from lightsft.backbone import Backbone
from lightsft.trace import Call, Trace


@dataclass(frozen=True)
class Sublayer:
    """One attention or feed-forward of one block."""

    attention: bool
    layer: int  # index of the block in its stack
    reads: str  # the module that is called first
    writes: str  # the module whose output joins the residual stream
    size: int  # width of the residual stream
    axis: int = -1  # of the writer's output, along which that width lies
    alike: bool = True  # whether what is read has the shape of what is written; a convolution's may differ


def find_sublayers(backbone: Backbone) -> list[Sublayer]:
    """Every attention and feed-forward sublayer, in the order in which they run."""
    anatomy, seen = backbone.anatomy, backbone.anatomy.trace
    if seen is None:
        return []
    modules = dict(backbone.model.named_modules())
    return list(_Finder(anatomy, seen, modules).sublayers())


class _Finder:
    def __init__(self, anatomy: Anatomy, seen: Trace, modules: dict[str, nn.Module]) -> None:
        self.anatomy, self.seen, self.modules = anatomy, seen, modules
        self.layers = [name for name in seen.calls if name in modules and is_layer(modules[name])]

    def sublayers(self) -> Iterator[Sublayer]:
        for stack in self.anatomy.blocks:
            for index, block in enumerate(stack):
                if block in self.seen.calls or any(is_within(name, block) for name in self.seen.calls):
                    for writer in self.writers(block):
                        yield self.sublayer(writer, block, index)

    def writers(self, block: str) -> list[str]:
        """The modules that write the residual stream in this block."""
        seen = [self.whole(name, block) for name in self.seen.writers if is_within(name, block) and name != block]
        widths = set(self.call(block).input_shape) | set(self.call(block).output_shape)
        wide = [name for name in seen if not widths or self.call(name).output_shape[self.feature_axis(name)] in widths]
        found = list(dict.fromkeys(wide))
        served = {self.group(name) for name in found}
        found += [name for group, name in self.last_layers(block).items() if group not in served]
        return sorted(found, key=list(self.seen.calls).index) or [block]

    def group(self, writer: str) -> str | None:
        """The attention that a writer ends, None for a feed-forward."""
        held = (attention for attention in self.anatomy.attention if is_within(attention, writer))
        return self.anatomy.attention_of(writer) or next(held, None)

    def whole(self, writer: str, block: str) -> str:
        """The writer, or the mixture of experts that it is but one expert of."""
        parts = writer.split(".")
        for end in range(len(parts) - 1, block.count(".") + 1, -1):
            parent = self.modules[".".join(parts[:end])]
            if isinstance(parent, nn.ModuleList | nn.ModuleDict) and len(parent) in self.anatomy.expert_counts:
                return self.called(".".join(parts[: end - 1]))
        return writer

    def called(self, name: str) -> str:
        while name not in self.seen.calls:
            name = name.rpartition(".")[0]
        return name

    def last_layers(self, block: str) -> dict[str | None, str]:
        """The last layer as wide as the block's input, of each attention and of the rest (None)."""
        width = self.call(block).input_shape[-1:]
        groups: dict[str | None, str] = {}
        for name in self.layers:
            if is_within(name, block) and self.seen.calls[name].output_shape[-1:] == width:
                groups[self.anatomy.attention_of(name)] = name
        return groups

    def sublayer(self, writer: str, block: str, index: int) -> Sublayer:
        attention = writer != block and self.group(writer) is not None
        shape, axis = self.call(writer).output_shape, self.feature_axis(writer)
        size = shape[axis] if shape else 0
        reader = self.reader(writer, block)
        given = self.call(reader).input_shape
        return Sublayer(attention, index, reader, writer, size, axis, alike=not given or given == shape)

    def reader(self, writer: str, block: str) -> str:
        """The first layer called of the writer's group; a mixture of experts, or a block, reads its own input."""
        if not is_layer(self.modules[writer]):
            return writer
        attention = self.anatomy.attention_of(writer)
        return next(n for n in self.layers if is_within(n, block) and self.anatomy.attention_of(n) == attention)

    def feature_axis(self, writer: str) -> int:
        """1 where the output is an image or a sequence laid out as a convolution does, else the last."""
        shape = self.call(writer).output_shape
        channels = {m.out_channels for m in self.modules[writer].modules() if isinstance(m, CONVOLUTIONS)}
        channels_first = len(shape) == 4 or (len(shape) == 3 and shape[-1] not in channels)
        return 1 if channels_first and shape[1] in channels else -1

    def call(self, name: str) -> Call:
        return self.seen.calls[name] if name in self.seen.calls else Call((), ())
