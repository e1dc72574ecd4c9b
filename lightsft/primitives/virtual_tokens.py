"""Virtual tokens: trained embeddings P (count, size) in the input sequence (2104.08691, section 2).

[P; E] in the place of the token embeddings E (length, size). The trunk (`lightsft.primitives.input_path`) is called
with a longer sequence: a plain id stands in the place of each virtual token, and the embedding layer's output there
is replaced by P, so whatever else the trunk does with ids, mask, positions or scaled embeddings works as ever. Its
per-token outputs lose those positions again. The task head, labels, answer positions and pooling by padding id all lie
outside the trunk and see the sequence that the caller gave; only `attentions` keep the virtual tokens.

Where the trunk itself pools its first position (BERT's pooler), virtual tokens follow the first token instead of
preceding it, which keeps its role and its position. In an encoder-decoder they precede the encoder's input, and the
decoder attends to them too. In generation they enter with the first step; later ones find them in the cache, whose
length counts them. A cache that was filled without them does not fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Cache, EncoderDecoderCache

from lightsft.dry_run import evaluating
from lightsft.errors import InjectionError, LightsftError, TargetError
from lightsft.primitives.base import Part, PlacedPart, drop_hook, drop_pre_hook
from lightsft.primitives.input_path import InputPath, by_name, vectors_in
from lightsft.primitives.side import first_output, with_first_output
from lightsft.primitives.standalone import Standalone
from lightsft.standalone import virtual_tokens as standalone

if TYPE_CHECKING:
    from lightsft.injection import Injection

TOKENS = "lightsft_virtual_tokens"
SAVED = "prompt_embeddings"  # P in a file, as PEFT calls it, whatever module the ids are looked up in
CACHES = ("past_key_values", "cache_params", "state", "mems", "past_buckets_states")  # as transformers calls them


class VirtualTokens(Part):
    """Base of virtual tokens. Subclasses define `embeddings`."""

    inserted: tuple[int, int] | None = None  # (batch, length with them) of the running call

    def __init__(self, count: int, path: InputPath) -> None:
        super().__init__()
        self.count, self.path = count, path

    @property
    def first(self) -> int:
        """How many tokens precede them."""
        return int(self.path.pools_first)

    def embeddings(self) -> Tensor:
        """P (count, size), fp32."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """What makes P, and P itself."""
        with torch.no_grad(), evaluating(self):
            return {**super().tensors(), SAVED: self.embeddings().detach()}

    def shapes(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        """Those, and of P for an encoder-decoder PEFT's: its second half, for the decoder, is never read."""
        shapes = super().shapes()
        if self.path.readers:
            shapes[SAVED] = (*shapes[SAVED], (2 * self.count, self.path.size))
        return shapes

    def standalone(self) -> Standalone:
        """P, as the encoder makes it."""
        path, made = self.path, self.tensors()[SAVED].clone()
        options = {"count": self.count, "size": path.size, "first": self.first, "ids": path.ids}
        options |= {"plain_id": path.plain_id, "token_dimension": path.token_dimension}
        return Standalone(standalone.VirtualTokens, options, {SAVED: made})

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take what makes P; P itself where that is all."""
        super().load({**tensors, SAVED: tensors[SAVED][: self.count]})

    def beside(self, embedded: Tensor) -> Tensor:
        """P for every row, in the type and layout of `embedded`: (batch, length, size) or (length, batch, size)."""
        dimension = self.path.token_dimension
        shape = list(embedded.shape)
        shape[dimension] = self.count
        return self.embeddings().to(embedded).unsqueeze(1 - dimension).expand(shape)

    def insert(self, tensor: Tensor, value: Tensor | float, dimension: int = 1) -> Tensor:
        """`tensor` with `value` in the places of the virtual tokens."""
        if not isinstance(value, Tensor):
            shape = list(tensor.shape)
            shape[dimension] = self.count
            value = tensor.new_full(shape, value)
        before, after = tensor.tensor_split([self.first], dim=dimension)
        return torch.cat([before, value, after], dim=dimension)

    def cut(self, tensor: Tensor, dimension: int = 1) -> Tensor:
        """`tensor` without the places of the virtual tokens."""
        before, _, after = tensor.tensor_split([self.first, self.first + self.count], dim=dimension)
        return torch.cat([before, after], dim=dimension) if self.first else after


class PlacedVirtualTokens(PlacedPart):
    """Virtual tokens on the input path of a model. They change no weight, so they cannot be merged."""

    def __init__(self, model: nn.Module, tokens: VirtualTokens) -> None:
        path = tokens.path
        self.name, self.model, self.path = path.embedding, model, path
        trunk, embedding = model.get_submodule(path.trunk), model.get_submodule(path.embedding)
        if TOKENS in trunk._modules:
            raise InjectionError(
                f"{path.trunk or 'the model'} already carries virtual tokens", expected="one set of them"
            )
        tokens.to(next(embedding.parameters()).device)
        trunk.add_module(TOKENS, tokens.train(trunk.training))
        trunk.register_forward_pre_hook(enter_trunk, with_kwargs=True)
        trunk.register_forward_hook(leave_trunk, with_kwargs=True)
        embedding.register_forward_hook(embed)
        for reader in self._readers():
            reader.register_forward_pre_hook(enter_reader, with_kwargs=True)
            reader.__dict__[TOKENS] = tokens  # not as a child: one module holds the parameters

    @property
    def tokens(self) -> VirtualTokens:
        """The module that holds the parameters, a child of the trunk."""
        tokens = self.model.get_submodule(self.path.trunk)._modules[TOKENS]
        assert isinstance(tokens, VirtualTokens)
        return tokens

    @property
    def part(self) -> Part:  # type: ignore[override]
        """The same."""
        return self.tokens

    def tensors(self) -> dict[str, Tensor]:
        """What the part saves; P belongs to no module."""
        return {self._named(name): tensor for name, tensor in self.part.tensors().items()}

    def shapes(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        """What the part accepts."""
        return {self._named(name): shapes for name, shapes in self.part.shapes().items()}

    def _place(self) -> dict[str, Any]:
        readers = [{"name": r.name, "states": r.states, "masks": dict(r.masks)} for r in self.path.readers]
        return {"trunk": self.path.trunk, "lookup": self.path.lookup, "readers": readers}

    def _named(self, name: str) -> str:
        return name if name == SAVED else f"{self.name}.{name}"

    def covers(self) -> set[str]:
        """No parameter: they add to the input."""
        return set()

    def remove(self) -> None:
        """Take the child, the references to it and the hooks off again."""
        trunk, embedding = (self.model.get_submodule(name) for name in (self.path.trunk, self.path.embedding))
        drop_pre_hook(trunk, enter_trunk)
        drop_hook(trunk, leave_trunk)
        drop_hook(embedding, embed)
        for reader in self._readers():
            drop_pre_hook(reader, enter_reader)
            del reader.__dict__[TOKENS]
        del trunk._modules[TOKENS]

    def _readers(self) -> Iterator[nn.Module]:
        return (self.model.get_submodule(reader.name) for reader in self.path.readers)


def place_virtual_tokens(injection: Injection, tokens: VirtualTokens) -> None:
    """Put `tokens` on the injection's model. Raises TargetError if it does not run on an input that much longer."""
    model = injection.model
    injection.place(PlacedVirtualTokens(model, tokens))
    try:
        with torch.no_grad(), evaluating(model):
            model(**(injection.backbone.example or {}))
    except LightsftError:
        raise
    except Exception as error:  # whatever a model's code raises on a length that it does not take
        raise TargetError(
            f"{type(model).__name__} does not run with {tokens.count} more tokens: {type(error).__name__}: {error}",
            expected="a model that takes inputs of any length up to its limit",
            todo="choose another num_virtual_tokens (a multiple of the model's chunks), or another strategy",
        ) from error


# ---- hooks


def enter_trunk(trunk: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of the trunk: places for the virtual tokens, or later steps' arguments moved past them."""
    tokens = trunk._modules[TOKENS]
    assert isinstance(tokens, VirtualTokens)
    tokens.inserted = None
    if not tokens.enabled:
        return None
    arguments = by_name(trunk, args, kwargs)
    ids, embedded = arguments.get(tokens.path.ids), arguments.get("inputs_embeds")
    given = ids if embedded is None else embedded
    if given is None:
        return None
    batch, length = given.shape[:2]
    seen = _cached_tokens(arguments)
    mask = _plain_mask(arguments, length + max(0, seen - tokens.count))
    if "attention_mask" in arguments:
        arguments["attention_mask"] = None if mask is None else tokens.insert(mask, 1)
    if seen:
        for name in ("position_ids", "cache_position"):
            if isinstance(arguments.get(name), Tensor):
                arguments[name] = arguments[name] + tokens.count
        return (), arguments
    _make_room(arguments, tokens.count)
    tokens.inserted = (batch, length + tokens.count)
    if embedded is None:
        trunk.get_submodule(tokens.path.lookup).__dict__[TOKENS] = tokens
    return (), {name: _extended(tokens, name, value, batch, length) for name, value in arguments.items()}


def embed(embedding: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Forward hook of the input embedding: P in the places that the trunk's pre-hook has made."""
    tokens = embedding.__dict__.pop(TOKENS, None)
    if tokens is None:
        return None
    dimension, embedded = tokens.path.token_dimension, first_output(output)
    replaced = tokens.insert(tokens.cut(embedded, dimension), tokens.beside(embedded), dimension)
    return with_first_output(output, replaced)


def leave_trunk(trunk: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of the trunk: per-token outputs without the virtual tokens; caches keep them."""
    tokens = trunk._modules[TOKENS]
    assert isinstance(tokens, VirtualTokens)
    if tokens.inserted is None or tokens.path.readers:
        return None
    if next(vectors_in(output)).shape[:2] != tokens.inserted:
        raise InjectionError(
            f"{type(trunk).__name__} makes of these inputs more positions than there are tokens",
            expected="inputs of token ids alone, in whose output the virtual tokens have a known place",
            todo="leave images and sounds out, or use another strategy",
        )
    if not isinstance(output, dict):
        return _cut(tokens, output)
    for name in [name for name in output if name not in CACHES]:
        output[name] = _cut(tokens, output[name])
    return output


def enter_reader(reader: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of a reader: masks over the trunk's output grow with it."""
    tokens = reader.__dict__[TOKENS]
    if not tokens.enabled:
        return None
    arguments = by_name(reader, args, kwargs)
    for known in tokens.path.readers:
        states = arguments.get(known.states)
        for name, value in known.masks.items():
            mask = arguments.get(name)
            if mask is not None and states is not None and mask.shape[-1] + tokens.count == states.shape[1]:
                arguments[name] = tokens.insert(mask, value, dimension=mask.ndim - 1)
    return (), arguments


# ---- arguments and outputs


def _extended(tokens: VirtualTokens, name: str, value: Any, batch: int, length: int) -> Any:
    """One argument of a first step, with the virtual tokens; what is not per token stays as it is."""
    if not isinstance(value, Tensor) or name == "attention_mask" or name.startswith("decoder"):
        return value
    if name == "inputs_embeds":
        return tokens.insert(value, tokens.beside(value))
    if name in ("position_ids", "cache_position"):
        return _positions(tokens, value)
    per_token = value.ndim == 2 or not value.is_floating_point() or name == "bbox"  # not a picture's features
    if value.shape[:2] == (batch, length) and per_token:
        return tokens.insert(value, {tokens.path.ids: tokens.path.plain_id, "labels": -100}.get(name, 0))
    return value


def _positions(tokens: VirtualTokens, positions: Tensor) -> Tensor:
    """(..., length) -> (..., length + count): the virtual tokens count on, later tokens move back by their number."""
    start = positions.amin(dim=-1, keepdim=True) + tokens.first
    own = start + torch.arange(tokens.count, device=positions.device)
    before, after = positions.tensor_split([tokens.first], dim=-1)
    return torch.cat([before, own.to(positions.dtype), after + tokens.count], dim=-1)


def _cut(tokens: VirtualTokens, value: Any) -> Any:
    """A tensor (batch, length, ...) or (batch x length, ...) without the virtual tokens; others as they are."""
    if isinstance(value, tuple | list):
        return type(value)(_cut(tokens, item) for item in value)
    if not isinstance(value, Tensor) or tokens.inserted is None:
        return value
    batch, length = tokens.inserted
    if value.shape[:2] == (batch, length) and (value.ndim == 3 or not value.is_floating_point()):
        return tokens.cut(value)
    if value.ndim == 2 and value.shape[0] == batch * length:  # a router's
        return tokens.cut(value.unflatten(0, (batch, length))).flatten(0, 1)
    return value


# ---- caches


def _cached_tokens(arguments: dict[str, Any]) -> int:
    """How many tokens a cache among the arguments holds, virtual ones included; 1 where it does not count them."""
    return max(_held(arguments.get(name)) for name in CACHES)


def _held(cache: Any) -> int:
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if not isinstance(cache, Cache):
        return int(_filled(cache if isinstance(cache, list | tuple) else getattr(cache, "__dict__", None)))
    counts = [int(layer.get_seq_length()) for layer in cache.layers if hasattr(layer, "get_seq_length")]
    states = [any(layer.has_previous_state.values()) for layer in cache.layers if hasattr(layer, "has_previous_state")]
    return max([*counts, *map(int, states)], default=0)


def _filled(content: Any) -> bool:
    """Whether there is a tensor other than zeros in what a model's own kind of cache holds."""
    if isinstance(content, Tensor):
        return bool(content.any())
    items = content.values() if isinstance(content, dict) else content if isinstance(content, list | tuple) else ()
    return any(_filled(item) for item in items)


def _layers(cache: Any) -> list[Any]:
    layers = getattr(cache, "layers", None)
    return layers if isinstance(layers, list) else []


def _make_room(arguments: dict[str, Any], count: int) -> None:
    """A static cache, sized for the tokens that the caller knows of, gets `count` more places before it is filled."""
    for cache in (arguments.get(name) for name in CACHES):
        for layer in _layers(getattr(cache, "self_attention_cache", cache)):
            if hasattr(layer, "max_cache_len"):
                if layer.is_sliding or layer.is_initialized:
                    raise InjectionError(
                        "a static cache that slides or is allocated already has no room for virtual tokens",
                        expected="a cache that grows",
                        todo="generate without cache_implementation",
                    )
                layer.max_cache_len += count


def _plain_mask(arguments: dict[str, Any], total: int) -> Tensor | None:
    """The mask (batch, total) of ones and zeros, also from those that `generate` prepares for a static cache.

    Such a mask is (batch, 1, queries, keys), true or 0 where a query sees a key; the last query sees all but padding.
    """
    given = arguments.get("attention_mask")
    masks: list[Tensor] = [m for m in (given.values() if isinstance(given, dict) else [given]) if m is not None]
    if not masks:
        return None
    mask = max(masks, key=lambda mask: mask.ndim)
    if mask.ndim == 2:
        return mask
    if mask.ndim != 4 or not any(_layers(arguments.get(name)) for name in CACHES):
        raise InjectionError(
            f"an attention mask of shape {tuple(mask.shape)}",
            expected="a mask (batch, length), which virtual tokens can be added to",
            todo="pass the padding alone; packed or block-wise masks need another strategy",
        )
    last = mask[:, 0, -1, :total]
    return last.long() if last.dtype == torch.bool else (last == 0).long()
