"""Which modules a strategy serves: keywords, names, regular expressions, and a choice of layers."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from torch import nn

from lightsft.anatomy import Weight, is_linear
from lightsft.backbone import Backbone
from lightsft.dry_run import input_embeddings
from lightsft.errors import TargetError

_KINDS = {
    "linear": "linear layer of the blocks",
    "attention": "linear layer of an attention",
    "mlp": "linear layer of the blocks outside attention",
    "experts": "expert",
    "router": "router",
    "embedding": "token embedding",
}
KEYWORDS = tuple(_KINDS)


def select_weights(
    backbone: Backbone, targets: str | Sequence[str], *, layers: Sequence[int] | None = None
) -> list[Weight]:
    """The matrix weights and embedding tables that `targets` means, in the model's order; never the task head's.

    A target is "linear" (every linear map in the blocks: linear layers, convolutions, experts; not the routers),
    "attention" or "mlp" (those inside, those outside the blocks' attentions), "experts", "router", "embedding" (the
    token embedding), the name of a module or parameter or the end of it ("q_proj", "experts.gate_up_proj"), or a
    regular expression for the whole name. `layers` keeps only blocks with these indices; negative ones count from the
    end. Every target must match something: TargetError otherwise.
    """
    by_name = dict(_by_every_name(backbone))
    chosen: dict[str, Weight] = {}
    for name in _select(backbone, targets, layers, list(by_name)):
        chosen.setdefault(by_name[name].owners[0], by_name[name])
    return list(chosen.values())


def _by_every_name(backbone: Backbone) -> Iterator[tuple[str, Weight]]:
    """Weights under their own names, then tied ones under those of the other modules that share them."""
    weights = backbone.anatomy.weights
    yield from weights.items()
    for weight in weights.values():
        for owner in weight.owners[1:]:
            module, _, attribute = owner.rpartition(".")
            name = module if attribute == "weight" else owner
            table = isinstance(backbone.module(module), nn.Embedding)
            yield name, replace(weight, name=name, embedding=table)


def select_modules(
    backbone: Backbone,
    targets: str | Sequence[str],
    *,
    layers: Sequence[int] | None = None,
    servable: Callable[[nn.Module], bool] = is_linear,
) -> list[str]:
    """The same among the modules that are `servable`, for strategies that need a layer to be called."""
    head = {name.rpartition(".")[0] for name in backbone.head}
    available = [n for n, module in backbone.model.named_modules() if servable(module) and n not in head]
    return _select(backbone, targets, layers, available)


def _select(
    backbone: Backbone, targets: str | Sequence[str], layers: Sequence[int] | None, available: list[str]
) -> list[str]:
    chosen: set[str] = set()
    for target in [targets] if isinstance(targets, str) else targets:
        matched = _matches(backbone, target, available)
        if not matched:
            raise _nothing_matches(backbone, target, available, KEYWORDS)
        chosen |= matched
    if layers is not None:
        chosen = _in_layers(backbone, chosen, layers)
    return [name for name in available if name in chosen]


def select_parameters(backbone: Backbone, targets: str | Sequence[str]) -> list[str]:
    """Names of the parameters that `targets` means: a module's name, the end of a name, or a regular expression.

    A shared parameter answers to each of its names, and is given by its first one.
    """
    first: dict[int, str] = {}
    every = {n: first.setdefault(id(p), n) for n, p in backbone.model.named_parameters(remove_duplicate=False)}
    chosen: set[str] = set()
    for target in [targets] if isinstance(targets, str) else targets:
        matched = {
            name
            for name in every
            if _ends_with(name, target) or any(_ends_with(owner, target) for owner in _ancestors(name))
        } or _regex_matches(target, every)
        if not matched:
            raise _nothing_matches(backbone, target, [owner for name in every for owner in _ancestors(name)])
        chosen |= {every[name] for name in matched}
    return [name for name in dict.fromkeys(every.values()) if name in chosen]


def by_pattern(name: str, patterns: Iterable[tuple[str, float]], default: float) -> float:
    """The value of the first pattern that is the end of `name` or a regular expression for it, else `default`."""
    for pattern, value in patterns:
        if _ends_with(name, pattern) or _regex_matches(pattern, [name]):
            return value
    return default


def resolve_layers(depth: int, layers: Sequence[int]) -> set[int]:
    """Layer indices as positive numbers; one outside the model is a TargetError."""
    outside = [index for index in layers if not -depth <= index < depth]
    if outside:
        raise TargetError(
            f"no layer {outside[0]}: the model has {depth}",
            expected=f"layer indices from {-depth} to {depth - 1}",
        )
    return {index % depth for index in layers}


def _matches(backbone: Backbone, target: str, available: list[str]) -> set[str]:
    anatomy = backbone.anatomy
    if target == "linear":
        return set(anatomy.linear) & set(available)
    if target == "attention":
        return {name for name in anatomy.linear if anatomy.attention_of(name)} & set(available)
    if target == "mlp":
        return {name for name in anatomy.linear if not anatomy.attention_of(name)} & set(available)
    if target == "experts":
        return {name for name in anatomy.linear if _is_expert(backbone, name)} & set(available)
    if target == "router":
        return set(anatomy.routers) & set(available)
    if target == "embedding":
        embeddings = input_embeddings(backbone.model)
        return {name for name in available if backbone.module(name) is embeddings}
    return {name for name in available if _ends_with(name, target)} or _regex_matches(target, available)


def _is_expert(backbone: Backbone, name: str) -> bool:
    """One of the matrices of an expert tensor, or a layer in a list of as many modules as there are experts."""
    weight = backbone.anatomy.weights.get(name)
    if weight is not None and weight.experts:
        return True
    counts = backbone.anatomy.expert_counts
    return any(
        isinstance(module, nn.ModuleList | nn.ModuleDict) and len(module) in counts
        for module in map(backbone.module, _ancestors(name))
    )


def _ends_with(name: str, ending: str) -> bool:
    return name == ending or name.endswith("." + ending)


def _regex_matches(pattern: str, names: Iterable[str]) -> set[str]:
    try:
        compiled = re.compile(pattern)
    except re.error:
        return set()
    return {name for name in names if compiled.fullmatch(name)}


def _ancestors(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _in_layers(backbone: Backbone, names: set[str], layers: Sequence[int]) -> set[str]:
    wanted = resolve_layers(backbone.anatomy.depth, layers)
    return {name for name in names if backbone.anatomy.block_of(name) in wanted}


def _nothing_matches(
    backbone: Backbone, target: str, available: Iterable[str], keywords: Sequence[str] = ()
) -> TargetError:
    parts = [name.rpartition(".")[2] for name in available]
    endings = list(dict.fromkeys(part for part in parts if not part.isdigit()))
    model = type(backbone.model).__name__
    if target in keywords:
        return TargetError(
            f"no {_KINDS[target]} in {model} that this strategy serves",
            expected=f"layers that it serves: {', '.join(endings[:16]) or 'there are none'}",
            todo="name some of these" if endings else "use another strategy on this model",
        )
    near = difflib.get_close_matches(target, [*endings, *keywords], n=1)
    hint = "Use targets='linear' to take every linear layer." if keywords else "print the model to see its names"
    return TargetError(
        f"nothing in {model} is named {target!r}",
        expected=f"one of {', '.join([*keywords, *endings[:16]])}; the end of a full name; or a regular expression",
        todo=f"did you mean {near[0]!r}?" if near else hint,
    )
