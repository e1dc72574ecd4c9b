"""Prefix tuning: attention over [P_k; K] and [P_v; V] with trained P_k, P_v (2101.00190, section 4).

softmax(Q [P_k; K]^T / sqrt(size)) [P_v; V], with P_k, P_v (heads, num_virtual_tokens, size) for each attention. The
reparameterisation (section 4.3) makes them from a smaller table: [P_k, P_v] = W2 tanh(W1 E + b1) + b2, here with a
table E (num_virtual_tokens, hidden) and weights of its own for each attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightsft import Backbone, Injection, injecting
from lightsft.anatomy import is_within
from lightsft.dry_run import evaluating
from lightsft.errors import TargetError
from lightsft.primitives import AttentionPrefix
from lightsft.primitives.attention_prefix import AttentionCall, recorded_attention
from lightsft.seeding import generator
from lightsft.targets import resolve_layers
from lightsft_adapters.checks import at_least, one_of, probability

PLACES = ("encoder", "decoder", "cross")


@dataclass(frozen=True)
class Prefix:
    """Trained keys and values in front of every attention's own.

    num_virtual_tokens: how many.
    initialisation: "activations" (the keys and values of real tokens, section 7.4) or "random" (normal, 0.02).
    reparameterisation: train them through a small network, which then starts at random.
    hidden_size: the width of that network.
    places: of an encoder-decoder, which attentions: one or several of "encoder", "decoder", "cross". Single stacks
        have but one kind.
    dropout: on keys and values, in training.
    layers: only blocks with these indices; negative ones count from the end.
    """

    num_virtual_tokens: int = 20
    initialisation: str = "activations"
    reparameterisation: bool = False
    hidden_size: int = 128
    places: str | Sequence[str] = PLACES
    dropout: float = 0.0
    layers: Sequence[int] | None = None

    learning_rate: ClassVar[float] = 2e-2
    search_space: ClassVar[Mapping[str, tuple[Any, ...]]] = {"num_virtual_tokens": (5, 10, 20, 40)}

    def __post_init__(self) -> None:
        at_least("num_virtual_tokens", self.num_virtual_tokens, 1)
        at_least("hidden_size", self.hidden_size, 1)
        probability("dropout", self.dropout)
        one_of("initialisation", self.initialisation, ("activations", "random"))
        for place in self._places:
            one_of("places", place, PLACES)

    @property
    def _places(self) -> tuple[str, ...]:
        return (self.places,) if isinstance(self.places, str) else tuple(self.places)

    def inject(self, backbone: Backbone, *, seed: int = 0) -> Injection:
        """Put a prefix on each chosen attention of `backbone`."""
        with injecting(self, backbone, seed) as injection:
            for call in self._chosen(backbone, seed):
                injection.add_prefix(call, self._prefix(call, generator(seed, call.name)))
        return injection

    def _chosen(self, backbone: Backbone, seed: int) -> list[AttentionCall]:
        if backbone.example is None:
            raise TargetError(
                f"none of the usual example inputs runs through {type(backbone.model).__name__}",
                expected="one that runs, to see its attentions",
                todo="give one with Backbone(model, example={...})",
            )
        calls = _attention_calls(backbone, self.num_virtual_tokens, seed)
        if not calls:
            raise TargetError(
                f"{type(backbone.model).__name__} has no attention that takes extra keys and values",
                expected="a softmax over products of queries and keys, multiplied with values",
                todo="use lora, adapter or full on this model",
            )
        wanted = None if self.layers is None else resolve_layers(backbone.anatomy.depth, self.layers)
        chosen = [
            call
            for name, call in calls.items()
            if _place(backbone, name, list(calls)) in (None, *self._places)
            and (wanted is None or backbone.anatomy.block_of(name) in wanted)
        ]
        if not chosen:
            raise TargetError(
                f"no attention left with places={self._places} and layers={self.layers}",
                expected="at least one attention",
                todo="widen places or layers",
            )
        return chosen

    def _prefix(self, call: AttentionCall, random: torch.Generator) -> AttentionPrefix:
        prefix: AttentionPrefix
        if self.reparameterisation:
            prefix = ReparameterisedPrefix(call, self.num_virtual_tokens, self.hidden_size, self.dropout, random)
        else:
            prefix = PlainPrefix(call, self.num_virtual_tokens, self.initialisation, self.dropout, random)
        prefix.key_bias = call.key_bias
        return prefix


class PlainPrefix(AttentionPrefix):
    """P_k (heads, tokens, key size) and P_v (heads, tokens, value size) as parameters."""

    def __init__(
        self, call: AttentionCall, tokens: int, initialisation: str, dropout: float, random: torch.Generator
    ) -> None:
        super().__init__()
        self.prefix_key = nn.Parameter(_initial(call.keys, tokens, initialisation, random))
        self.prefix_value = nn.Parameter(_initial(call.values, tokens, initialisation, random))
        self.dropout = nn.Dropout(dropout)

    def keys_and_values(self) -> tuple[Tensor, Tensor]:
        """The parameters, with dropout."""
        return self.dropout(self.prefix_key), self.dropout(self.prefix_value)


class ReparameterisedPrefix(AttentionPrefix):
    """[P_k, P_v] = W2 tanh(W1 E + b1) + b2."""

    def __init__(self, call: AttentionCall, tokens: int, hidden: int, dropout: float, random: torch.Generator) -> None:
        super().__init__()
        heads, _, key_size = call.keys.shape
        self.heads, self.sizes = heads, (heads * key_size, heads * call.values.shape[-1])
        self.table = nn.Parameter(torch.empty(tokens, hidden).normal_(generator=random))
        self.hidden = nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, sum(self.sizes))
        for layer in (self.hidden, self.out):
            nn.init.normal_(layer.weight, std=0.02, generator=random)
            nn.init.zeros_(layer.bias)
        self.dropout = nn.Dropout(dropout)

    def keys_and_values(self) -> tuple[Tensor, Tensor]:
        """Split the network's output into heads."""
        keys, values = self.out(torch.tanh(self.hidden(self.table))).split(self.sizes, dim=-1)
        return self._by_head(keys), self._by_head(values)

    def _by_head(self, flat: Tensor) -> Tensor:
        """(tokens, heads * size) -> (heads, tokens, size)."""
        result: Tensor = self.dropout(flat.unflatten(-1, (self.heads, -1)).transpose(0, 1))
        return result


def _initial(activations: Tensor, tokens: int, initialisation: str, random: torch.Generator) -> Tensor:
    """(heads, tokens, size), fp32: what real tokens gave, or normal noise."""
    heads, length, size = activations.shape
    if initialisation == "random":
        return torch.empty(heads, tokens, size).normal_(std=0.02, generator=random)
    return activations.float().cpu()[:, torch.arange(tokens) % length].clone()


def _attention_calls(backbone: Backbone, tokens: int, seed: int) -> dict[str, AttentionCall]:
    """The attentions of a forward pass by name, in order, those in heads and towers included.

    Those that are not in the registry count only if another length of the input leaves their shapes as they are: what
    looks like heads could be tokens. Of several in one module, the prefix is for the one with the widest values.
    """
    calls = _recorded(backbone, tokens, seed)
    if not all(call.registered for call in calls):
        again = {_sizes(call) for call in _recorded(backbone, tokens + 2, seed)}
        calls = [call for call in calls if call.registered or _sizes(call) in again]
    found: dict[str, AttentionCall] = {}
    for call in calls:
        if call.name not in found or _width(call) > _width(found[call.name]):
            found[call.name] = call
    return found


def _recorded(backbone: Backbone, tokens: int, seed: int) -> list[AttentionCall]:
    model, seen = backbone.model, backbone.anatomy.trace
    sites = [site.name for site in seen.attentions] if seen is not None else []
    *first, last = backbone.examples_of(tokens, seed)
    for example in first:
        with suppress(ValueError, RuntimeError, AssertionError):  # a length that the model does not take
            return _recorded_on(model, sites, example)
    return _recorded_on(model, sites, last)


def _recorded_on(model: nn.Module, sites: Sequence[str], example: Mapping[str, Any]) -> list[AttentionCall]:
    with torch.no_grad(), evaluating(model), recorded_attention(model, sites) as calls:
        model(**example)
    return calls


def _sizes(call: AttentionCall) -> tuple[str, torch.Size, torch.Size]:
    """Where it is, and its numbers of heads and of features."""
    return call.name, call.keys.shape[::2], call.values.shape[::2]


def _width(call: AttentionCall) -> int:
    return call.values.shape[0] * call.values.shape[-1]


def _place(backbone: Backbone, name: str, in_order: list[str]) -> str | None:
    """One of `PLACES` in an encoder-decoder, None in a single stack.

    In a decoder block the first attention called is the self attention, any later one reads the encoder.
    """
    if not getattr(backbone.model.config, "is_encoder_decoder", False):
        return None
    if any(module is backbone.module(name) for module in backbone.model.get_encoder().modules()):
        return "encoder"
    block = next((b for stack in backbone.anatomy.blocks for b in stack if name.startswith(b + ".")), name)
    first = next(other for other in in_order if is_within(other, block))
    return "decoder" if name == first else "cross"
