"""Junctions: where the output h of a sublayer is added to the residual stream x, and what the stream is from there on.

    pre-norm     u = x + h
    post-norm    u = N(x + h), N a module that is given the sum and nothing else is

One tiny forward pass is watched for the sum itself, so a model is read by what it adds, not by its names. Tensors are
followed by identity, through views, casts and dropout: a stream that is scaled, or joined by two sublayers at once, has
no junction of this form and is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from lightsft.anatomy import Anatomy, is_within
from lightsft.backbone import Backbone
from lightsft.dry_run import evaluating, tensors_in, visible_attention
from lightsft.sublayers import find_sublayers
from lightsft.trace import ADDITIONS

UNCHANGED = frozenset(  # functions whose result, of the same shape, holds the same values, in evaluation mode
    {"to", "type", "float", "half", "bfloat16", "double", "clone", "contiguous", "view", "reshape"}
    | {"dropout", "dropout_", "feature_dropout", "alpha_dropout"}
)


@dataclass(frozen=True)
class Junction:
    """The sum x + h of one sublayer."""

    writes: str  # the module whose output is h
    reads: str  # a module that is called before it in the same block, and whose input is x
    norm: str | None  # N, where the stream goes on as N(x + h); None where it goes on as x + h


def find_junctions(backbone: Backbone) -> dict[str, Junction]:
    """By the name of the module that writes; without those where no such sum is seen, or x is nobody's input."""
    example = backbone.example
    writers = {one.writes: one.attention for one in find_sublayers(backbone)}
    if example is None or not writers:
        return {}
    with ExitStack() as stack:
        model, given = stack.enter_context(backbone.watchable(example))
        watcher = _Watcher(model, backbone.anatomy, writers)
        stack.enter_context(evaluating(model))
        stack.enter_context(visible_attention(model))
        for handle in watcher.attach():
            stack.callback(handle.remove)
        with torch.no_grad(), watcher:
            model(**given)
    return watcher.junctions()


@dataclass(frozen=True)
class _Sum:
    """x + h of one writer, as it was seen: who was last given x, in order; the number of the result."""

    readers: tuple[str, ...]
    result: int


class _Watcher(TorchFunctionMode):
    """Numbers tensors, the same for all that hold the same values, and notes what is given to whom."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, writers: Mapping[str, bool]) -> None:
        super().__init__()
        self.model, self.anatomy, self.writers = model, anatomy, writers
        self.names = {module: name for name, module in model.named_modules() if "lightsft" not in name}
        self.leaves = {
            name
            for module, name in self.names.items()
            if not any("lightsft" not in child for child, _ in module.named_children())
        }
        self.numbers, self.next = WeakIdKeyDictionary(), count()
        self.written: dict[int, str] = {}  # tensor -> the writer that returned it
        self.readers: dict[int, list[str]] = {}  # tensor -> the modules that it was the first input of, in order
        self.results: dict[str, int] = {}  # module -> what it returned
        self.latest: dict[str, int] = {}  # module -> the first input of its last call, in the order of the first calls
        self.plain: set[str] = set()  # modules that are given one tensor and return one
        self.added: set[int] = set()  # what was one of two that were added
        self.sums: dict[str, _Sum] = {}

    # ---- watching

    def attach(self) -> Iterator[Any]:
        """Hook every module; yields the handles."""
        for module in self.names:
            yield module.register_forward_pre_hook(self._enter, with_kwargs=True)
            yield module.register_forward_hook(self._leave)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name, given = self.names[module], list(tensors_in((args, kwargs)))
        if given:
            self.latest[name] = self._number(given[0])
            self.readers.setdefault(self.latest[name], []).append(name)
        if len(given) == 1:
            self.plain.add(name)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        name, first = self.names[module], next(tensors_in((output,)), None)
        if not isinstance(output, Tensor):
            self.plain.discard(name)
        if first is None:
            return
        self.results[name] = self._number(first)
        if name in self.writers:
            self.written[self.results[name]] = name

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`, then note what it adds, or that it changes nothing."""
        name = getattr(func, "__name__", "")
        given = list(tensors_in((*args, *(kwargs or {}).values())))
        numbers = [self._number(tensor) for tensor in given] if name in ADDITIONS else []  # before one is changed
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and given:
            if name in ADDITIONS:
                self.numbers[result] = next(self.next)
                self._add(given, numbers, result)
            elif name in UNCHANGED and result.shape == given[0].shape and result.dtype.is_floating_point:
                self.numbers[result] = self._number(given[0])
        return result

    def _number(self, tensor: Tensor) -> int:
        if tensor not in self.numbers:
            self.numbers[tensor] = next(self.next)
        number: int = self.numbers[tensor]
        return number

    def _add(self, given: list[Tensor], numbers: list[int], result: Tensor) -> None:
        self.added.update(numbers)
        if len(given) != 2 or given[0].shape != given[1].shape:
            return
        for one, other in (numbers, reversed(numbers)):
            if other in self.written and one not in self.written:
                readers = tuple(name for name, number in self.latest.items() if number == one)
                self.sums[self.written[other]] = _Sum(readers, self._number(result))

    # ---- understanding

    def junctions(self) -> dict[str, Junction]:
        """What was seen, by the module that writes."""
        found = {}
        for writer, joined in self.sums.items():
            block = self.anatomy.block_name_of(writer)
            reader = self._reader(writer, joined, block) if block is not None else None
            if block is not None and reader is not None:
                norm = self._norm(joined, block)
                if norm is None or norm in self.plain:
                    found[writer] = Junction(writer, reader, norm)
        return found

    def _reader(self, writer: str, joined: _Sum, block: str) -> str | None:
        """What was last given x before h was there, a layer rather than what holds others.

        No module around the writer, nor for a feed-forward a part of an attention: where activations are recomputed, a
        sublayer may run without these.
        """
        called = list(self.latest)
        found = [
            name
            for name in joined.readers
            if is_within(name, block)
            and not is_within(writer, name)
            and called.index(name) < called.index(writer)
            and (self.writers[writer] or self.anatomy.attention_of(name) is None)
        ]
        return next((name for name in found if name in self.leaves), found[0] if found else None)

    def _norm(self, joined: _Sum, block: str) -> str | None:
        """The only module that is given the sum, if the block goes on with what it returns."""
        if joined.result in self.added or self.results.get(block) == joined.result:
            return None
        readers = [name for name in self.readers.get(joined.result, ()) if is_within(name, block)]
        norm = readers[0] if len(set(readers)) == 1 else None
        goes_on = norm is not None and (
            self.results[norm] in self.added or self.results[norm] == self.results.get(block)
        )
        return norm if goes_on else None
