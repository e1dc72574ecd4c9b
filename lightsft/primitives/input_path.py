"""The way of the token ids into a backbone, found by watching one tiny forward pass; nothing is read off names.

The trunk is the innermost module that is called with the ids and holds the blocks: the base model under a task head,
or the encoder of an encoder-decoder, whose output a reader (the decoder) takes up by cross attention. Within the
trunk, the first layer that turns integers into vectors is the input embedding.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightsft.anatomy import is_within
from lightsft.backbone import Backbone
from lightsft.dry_run import evaluating
from lightsft.errors import TargetError


@dataclass(frozen=True)
class InputPath:
    """Where token ids enter. Module names are dotted names, `size` is the width of the embeddings."""

    trunk: str
    ids: str  # the trunk's argument that takes the ids
    embedding: str
    lookup: str  # the embedding's name within the trunk
    size: int
    token_dimension: int  # of the embedding's output; 0 where the trunk transposes
    pools_first: bool  # the trunk itself makes one vector of the sequence, from its first position
    readers: tuple[Reader, ...]
    plain_id: int  # the smallest id that the configuration gives no special meaning


@dataclass(frozen=True)
class Reader:
    """A module that reads the trunk's output as its argument `states`; `masks` over it, with their value for "seen"."""

    name: str
    states: str
    masks: Mapping[str, float]


@dataclass
class _Call:
    """One call of one module, while it was watched; `inside` names the modules that were running."""

    name: str
    arguments: dict[str, Any]
    inside: tuple[str, ...]
    output: Any = field(default=None, repr=False)


def by_name(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call under their names."""
    return dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | dict(kwargs)


def find_input_path(backbone: Backbone) -> InputPath:
    """Watch the backbone's example run. Raises TargetError where no token ids are looked up."""
    example = backbone.example or {}
    ids = example.get("input_ids")
    if ids is None:
        raise _no_place(backbone, "it takes no token ids")
    ids = ids.flatten(0, -2)  # a head that chooses among texts hands them on as rows
    calls = _watched(backbone.model, example)
    trunk, readers = _trunk(backbone, calls, ids)
    within = {module: name for name, module in backbone.module(trunk.name).named_modules()}
    lookups = (call for call in calls if trunk.name in call.inside and _embeds(backbone, call, ids))
    embedding = next((call for call in lookups if backbone.module(call.name) in within), None)
    if embedding is None:
        raise _no_place(backbone, "no layer looks its token ids up")
    embedded = next(vectors_in(embedding.output))
    answer = next(vectors_in(trunk.output), None)
    if not readers and (answer is None or answer.shape[1] != ids.shape[1]):
        raise _no_place(backbone, f"{trunk.name or 'it'} does not answer with one vector per token")
    return InputPath(
        trunk=trunk.name,
        ids=next(name for name, value in trunk.arguments.items() if _same(value, ids)),
        embedding=embedding.name,
        lookup=within[backbone.module(embedding.name)],
        size=embedded.shape[-1],
        token_dimension=1 if embedded.shape[0] == 1 else 0,
        pools_first=not readers and _pools(trunk.output),
        readers=readers,
        plain_id=_plain_id(backbone.model),
    )


def _no_place(backbone: Backbone, reason: str) -> TargetError:
    return TargetError(
        f"{type(backbone.model).__name__} has no place for virtual tokens: {reason}",
        expected="a model with an embedding layer for token ids",
        todo="use lora, adapter or full on this model",
    )


def _watched(model: PreTrainedModel, example: Mapping[str, Any]) -> list[_Call]:
    """Every module call of one forward pass without a gradient, in the order in which they began."""
    names = {module: name for name, module in model.named_modules() if "lightsft" not in name}
    calls: list[_Call] = []
    running: list[_Call] = []

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inside = tuple(call.name for call in running)
        running.append(_Call(names[module], by_name(module, args, kwargs), inside))
        calls.append(running[-1])

    def end(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        running.pop().output = output

    with ExitStack() as stack, torch.no_grad(), evaluating(model):
        for module in names:
            stack.callback(module.register_forward_pre_hook(begin, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(end, with_kwargs=True).remove)
        model(**example)
    return calls


def _trunk(backbone: Backbone, calls: list[_Call], ids: Tensor) -> tuple[_Call, tuple[Reader, ...]]:
    """The innermost holder of blocks that gets the ids, if with its readers it holds every block that ran."""
    blocks = {block for stack in backbone.anatomy.blocks for block in stack}
    ran = {call.name for call in calls if call.name in blocks}
    chain: list[_Call] = []
    for call in calls:
        gets_ids = any(_same(value, ids) for value in call.arguments.values())
        holds = any(is_within(block, call.name) for block in ran)
        if gets_ids and holds and (not chain or chain[-1].name in call.inside):
            chain.append(call)
    for call in reversed(chain):
        readers = tuple(_readers(call, calls, ran))
        places = [call.name, *(reader.name for reader in readers)]
        if all(any(is_within(block, place) for place in places) for block in ran):
            return call, readers
    raise _no_place(backbone, "no module that holds its blocks is called with them")


def _readers(trunk: _Call, calls: list[_Call], blocks: set[str]) -> Iterator[Reader]:
    """Outermost modules beside the trunk that hold blocks and are called with what the trunk gave."""
    given = {id(vectors) for vectors in vectors_in(trunk.output)}
    found: list[str] = []
    for call in calls:
        beside = not is_within(call.name, trunk.name) and not is_within(trunk.name, call.name)
        states = next((name for name, value in call.arguments.items() if id(value) in given), None)
        if states and beside and not set(found) & set(call.inside) and any(is_within(b, call.name) for b in blocks):
            found.append(call.name)
            length = call.arguments[states].shape[1]
            masks = {name: value for name, value in call.arguments.items() if _is_mask(name, value, length)}
            yield Reader(call.name, states, {name: float(value.flatten()[0]) for name, value in masks.items()})


def _is_mask(name: str, value: Any, length: int) -> bool:
    """A tensor over the encoder's tokens, by the prefix that transformers gives such arguments' names."""
    return name.startswith("encoder") and isinstance(value, Tensor) and value.ndim >= 2 and value.shape[-1] == length


def _same(value: Any, ids: Tensor) -> bool:
    """Whether an argument is the ids; on the meta device, where there are no values, whether it may be."""
    if not isinstance(value, Tensor) or value.shape != ids.shape or value.dtype != ids.dtype:
        return False
    return ids.is_meta or torch.equal(value, ids)


def _begins_with(value: Any, ids: Tensor) -> bool:
    """Whether an argument holds the ids of a batch of one, in either layout, and maybe padding after them."""
    return (
        isinstance(value, Tensor)
        and value.ndim == 2
        and value.numel() >= ids.numel()
        and _same(value.flatten()[: ids.numel()], ids.flatten())
    )


def _embeds(backbone: Backbone, call: _Call, ids: Tensor) -> bool:
    """Whether this is the call of a layer with a table of its own that turned the ids, maybe padded, into vectors."""
    table = any(p is not None and p.ndim >= 2 for p in backbone.module(call.name)._parameters.values())
    looked_up = any(_begins_with(value, ids) for value in call.arguments.values())
    return table and looked_up and any(True for _ in vectors_in(call.output))


def vectors_in(output: Any) -> Iterator[Tensor]:
    """The floating-point tensors of three dimensions in a module's output."""
    values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else (output,)
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 3:
            yield value


def _pools(output: Any) -> bool:
    """Whether there is a tensor (1, size) among the outputs."""
    values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else ()
    return any(isinstance(v, Tensor) and v.is_floating_point() and v.ndim == 2 and v.shape[0] == 1 for v in values)


def _plain_id(model: PreTrainedModel) -> int:
    special = set(_special_ids(model.config.to_dict()))
    return next(number for number in range(len(special) + 1) if number not in special)


def _special_ids(config: Mapping[str, Any]) -> Iterator[int]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _special_ids(value)
        elif str(name).endswith(("_id", "_index", "_ids")):
            yield from (v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, int))
