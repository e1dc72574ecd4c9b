"""The LoRA that comes nearest, on calibration texts, to a strategy that no weight can express.

One after the other, in the order in which they run, the linear layers that write the residual stream get factors:

    v = x + W' c     the stream after the layer, as the LoRA found so far makes it; c are the layer's inputs there
    v*               the stream that base + strategy has in that place
    min over B, A of rank r   sum |v* - v - B A c|^2 + ridge |B A|^2

So each layer also makes up for what those before it could not. Where something acts after the sum (an adapter on the
norm, an edit of the block's output), the stream is seen after that; in a post-norm model v* is then the point nearest
to v of those that the norm maps there. Every fifth batch chooses the ridge, and says what share of v* - v is left.
Every layer takes one pass of both models over the texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lightsft.anatomy import is_linear, linear_shape
from lightsft.backbone import Backbone
from lightsft.dry_run import evaluating, tensors_in
from lightsft.errors import MergeError
from lightsft.export.certificate import Batch
from lightsft.export.reduced_rank import Regression, Sums, chosen
from lightsft.injection import Injection
from lightsft.junctions import Junction, find_junctions
from lightsft.primitives.side import first_output
from lightsft.sublayers import find_sublayers

HELD_OUT = 5  # one batch of so many is kept from the fit
SAME = 1e-4  # of numbers of order one: what arithmetic in another order may change
TINY = 1e-6  # of a norm's largest factor: one that lets nothing through


@dataclass(frozen=True)
class Place:
    """A layer that writes the stream, and where this is seen after it: what enters `after`, or what it returns."""

    joined: Junction
    after: str
    entering: bool


@dataclass(frozen=True)
class Distilled:
    """The regressions by the layer's name, the sum of |v* - v|^2 of all rows for each, and how many rows there were."""

    regressions: Mapping[str, Regression]
    wanted: Mapping[str, float]
    rows: int


def distil(injection: Injection, batches: Sequence[Batch], rank: int) -> Distilled:
    """Factors for every layer that writes the stream; the injection is left as it was.

    Raises MergeError for models whose stream cannot be followed, and strategies that add positions to it.
    """
    backbone, student = injection.backbone, _Student()
    found, wanted, rows = {}, {}, 0
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluating(backbone.model))
        with injection.disabled():
            places = places_of(backbone)
        for place in places:
            sums = _sums(injection, student, place, batches)
            regression = chosen(*sums, rank)
            name = place.joined.writes
            found[name], wanted[name], rows = regression, sum(one.t for one in sums), sum(one.rows for one in sums)
            if regression.rank:
                stack.callback(student.add(backbone.module(name), regression).remove)
    return Distilled(found, wanted, rows)


# ---- places


def places_of(backbone: Backbone) -> list[Place]:
    """Those of every block, in order. Raises MergeError where one of them is no linear layer that joins the stream."""
    junctions, blocks = find_junctions(backbone), dict[str, list[str]]()
    for one in find_sublayers(backbone):
        blocks.setdefault(backbone.anatomy.block_name_of(one.writes) or "", []).append(one.writes)
    others = [name for names in blocks.values() for name in names if not _can_follow(backbone, junctions.get(name))]
    if others or not blocks or getattr(backbone.model.config, "is_encoder_decoder", False):
        raise MergeError(
            f"the residual stream of {type(backbone.model).__name__} cannot be followed"
            + (f" at {', '.join(others[:5])}" if others else ""),
            expected="one stack of blocks, whose attentions and feed-forwards each end in a linear layer that adds its "
            "output to the stream, with a layer norm after the sum or none",
            todo="ship the adapter folder as it is",
        )
    found = []
    for block, names in blocks.items():
        for name, following in pairwise(names):
            found.append(Place(junctions[name], junctions[following].reads, entering=True))
        found.append(Place(junctions[names[-1]], block, entering=False))
    return found


def _can_follow(backbone: Backbone, joined: Junction | None) -> bool:
    """Whether a linear layer writes there, and what follows the sum can be turned round."""
    if joined is None or not is_linear(backbone.module(joined.writes)):
        return False
    return joined.norm is None or isinstance(backbone.module(joined.norm), nn.LayerNorm)


# ---- passes


class _Student:
    """The factors found so far, on their layers; they act within `acting` alone."""

    def __init__(self) -> None:
        self.active = False

    def add(self, layer: nn.Module, found: Regression) -> Any:
        """The handle of the hook that adds B A c."""

        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            return output + args[0] @ found.a.T.to(args[0]) @ found.b.T.to(args[0]) if self.active else None

        return layer.register_forward_hook(hook)

    @contextmanager
    def acting(self) -> Iterator[None]:
        """Within it the model is base + factors."""
        self.active = True
        try:
            yield
        finally:
            self.active = False


def _sums(injection: Injection, student: _Student, place: Place, batches: Sequence[Batch]) -> tuple[Sums, Sums]:
    """Of the rows to fit, and of those that were kept from it."""
    backbone = injection.backbone
    outputs, inputs = linear_shape(backbone.module(place.joined.writes))
    fit, held = Sums(inputs, outputs), Sums(inputs, outputs)
    for number, batch in enumerate(batches):
        wanted = _seen(backbone, place, batch)
        with injection.disabled(), student.acting():
            seen = _seen(backbone, place, batch)
            c, v, after, target = _rows(batch, seen["inputs"], seen["sum"], wanted["after"], wanted["sum"])
            norm = None if place.joined.norm is None else backbone.module(place.joined.norm)
            if not torch.allclose(target if norm is None else norm(target), after, rtol=SAME, atol=SAME):
                target = after if norm is None else unnormed(norm, after, v)  # something acts after the sum
        (held if number % HELD_OUT == HELD_OUT - 1 else fit).add(c, target - v)
    return fit, held


def _seen(backbone: Backbone, place: Place, batch: Batch) -> dict[str, Tensor]:
    """One pass: the layer's `inputs`, the `sum` x + h, or what enters the norm after it, and the stream `after` it."""
    seen: dict[str, list[Tensor]] = {"x": [], "inputs": [], "h": [], "after": []}

    def entering(name: str) -> Callable[..., None]:
        return lambda _, args, kwargs: seen[name].append(next(tensors_in((args, kwargs))))

    def leaving(name: str) -> Callable[..., None]:
        return lambda _, args, output: seen[name].append(first_output(output))

    writes, after = backbone.module(place.joined.writes), backbone.module(place.after)
    with ExitStack() as stack:
        handles = [
            backbone.module(place.joined.reads).register_forward_pre_hook(entering("x"), with_kwargs=True),
            writes.register_forward_pre_hook(entering("inputs"), with_kwargs=True),
            writes.register_forward_hook(leaving("h")),
            after.register_forward_pre_hook(entering("after"), with_kwargs=True)
            if place.entering
            else after.register_forward_hook(leaving("after")),
        ]
        for handle in handles:
            stack.callback(handle.remove)
        backbone.model(**{name: value.to(backbone.model.device) for name, value in batch.items()})
    if any(len(found) != 1 for found in seen.values()):
        raise MergeError(
            f"{place.joined.writes} runs {len(seen['h'])} times in one pass",
            expected="blocks that each run once",
            todo="ship the adapter folder as it is",
        )
    once = {name: found[0].float() for name, found in seen.items()}
    return {"inputs": once["inputs"], "sum": once["x"] + once["h"], "after": once["after"]}


def _rows(batch: Batch, *tensors: Tensor) -> list[Tensor]:
    """Each as (rows, features), without padding."""
    kept = batch["attention_mask"].bool().flatten()
    found = [tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors]
    if any(len(tensor) != len(kept) for tensor in found):
        raise MergeError(
            f"the strategy computes {max(map(len, found))} positions where the base computes {len(kept)}",
            expected="a strategy that adds none: no prompt",
            todo="ship the adapter folder as it is",
        )
    return [tensor[kept.to(tensor.device)] for tensor in found]


def unnormed(norm: nn.Module, normed: Tensor, near: Tensor) -> Tensor:
    """The point y nearest to `near` that a layer norm maps to `normed`: (y - mean) / deviation = (normed - b) / w."""
    assert isinstance(norm, nn.LayerNorm)
    mean = near.mean(-1, keepdim=True)
    centred = near - mean
    direction = normed
    if norm.weight is not None:
        weight = norm.weight.float()
        bias = 0.0 if norm.bias is None else norm.bias.float()
        silent = weight.abs() <= TINY * weight.abs().max()  # these features say nothing of y: they stay as they are
        own = centred / centred.std(-1, keepdim=True, correction=0)
        direction = torch.where(silent, own, (normed - bias) / torch.where(silent, torch.ones_like(weight), weight))
    direction = direction - direction.mean(-1, keepdim=True)
    length = (centred * direction).sum(-1, keepdim=True) / direction.square().sum(-1, keepdim=True)
    least = TINY * centred.std(-1, keepdim=True, correction=0)  # no negative deviation
    return mean + direction * torch.maximum(length, least)
