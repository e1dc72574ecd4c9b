"""The sublayers of each block and the linear layers through which they read and write the residual stream.

Found by watching one tiny forward pass: within a block, the linear layers of one attention (or those outside any
attention, the feed-forward) form a sublayer; the first one called reads its input, and the last one called whose
output is as wide as the block's input writes the residual stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightsft.backbone import Backbone
from lightsft.dry_run import evaluating, tiny_inputs
from lightsft.primitives.side import first_tensor


@dataclass(frozen=True)
class Sublayer:
    """One attention or feed-forward of one block."""

    attention: bool
    layer: int  # index of the block in its stack
    reads: str  # the linear layer that is called first
    writes: str  # the linear layer whose output joins the residual stream
    size: int  # width of the residual stream


def find_sublayers(backbone: Backbone) -> list[Sublayer]:
    """Every attention and feed-forward sublayer, in the order in which they run."""
    anatomy = backbone.anatomy
    blocks = [block for stack in anatomy.blocks for block in stack]
    with ExitStack() as stack:
        shapes = stack.enter_context(watched(backbone.model, [*blocks, *anatomy.linear]))
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluating(backbone.model))
        backbone.model(**tiny_inputs(backbone.model))
    groups: dict[tuple[str, str | None], list[str]] = {}
    for name in shapes:
        if name in set(anatomy.linear):
            block = next(block for block in blocks if name.startswith(block + "."))
            groups.setdefault((block, anatomy.attention_of(name)), []).append(name)
    return list(_sublayers(backbone, groups, shapes))


def _sublayers(
    backbone: Backbone, groups: dict[tuple[str, str | None], list[str]], shapes: dict[str, tuple[int, int]]
) -> Iterator[Sublayer]:
    for (block, attention), names in groups.items():
        width = shapes[block][0]
        writers = [name for name in names if shapes[name][1] == width]
        if writers:
            layer = backbone.anatomy.block_of(block)
            assert layer is not None
            yield Sublayer(attention is not None, layer, names[0], writers[-1], width)


@contextmanager
def watched(model: nn.Module, names: list[str]) -> Iterator[dict[str, tuple[int, int]]]:
    """The (input width, output width) of each named module, in the order of their (last) calls."""
    shapes: dict[str, tuple[int, int]] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            result = output if isinstance(output, Tensor) else first_tensor(tuple(output), {})
            shapes.pop(name, None)
            shapes[name] = (first_tensor(args, kwargs).shape[-1], result.shape[-1])

        return hook

    handles = [model.get_submodule(name).register_forward_hook(note(name), with_kwargs=True) for name in names]
    try:
        yield shapes
    finally:
        for handle in handles:
            handle.remove()
