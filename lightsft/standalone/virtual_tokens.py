"""Virtual tokens: trained embeddings P (count, size) in the input sequence (2104.08691, section 2).

The trunk is called with a longer sequence: a plain id stands in the place of each virtual token, and what the embedding
layer gives there is replaced by P. The trunk's per-token outputs lose these positions again. A reader (the decoder
that attends to the trunk's output) gets a longer mask. Generation puts them in with its first step; later ones find
them in the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .calls import CACHES, by_name, cached_tokens
from .sides import tensors_in, with_first

TOKENS = "lightsft_virtual_tokens"


class VirtualTokens(nn.Module):
    """P on the way of the ids into a model.

    `first`: how many tokens precede them. `ids`: the trunk's argument that takes the ids. `plain_id`: an id without a
    meaning. `token_dimension`: of the embedding layer's output.
    """

    inserted: tuple[int, int] | None = None  # (batch, length with them) of the running call

    def __init__(self, count: int, size: int, first: int, ids: str, plain_id: int, token_dimension: int) -> None:
        super().__init__()
        self.count, self.first, self.ids, self.plain_id = count, first, ids, plain_id
        self.token_dimension = token_dimension
        self.lookup = ""
        self.readers: list[dict[str, Any]] = []
        self.prompt_embeddings = nn.Parameter(torch.zeros(count, size, dtype=torch.float32))

    def place(self, model: nn.Module, trunk: str, lookup: str, readers: list[dict[str, Any]]) -> None:
        """Hook the module `trunk`, its embedding layer `lookup` (a name within it), and the `readers` of its output.

        A reader has a name, the argument `states` that takes the output, and `masks` over it with their value for
        "seen".
        """
        self.lookup, self.readers = lookup, readers
        around = model.get_submodule(trunk)
        around.add_module(TOKENS, self)
        around.register_forward_pre_hook(enter_trunk, with_kwargs=True)
        around.register_forward_hook(leave_trunk, with_kwargs=True)
        around.get_submodule(lookup).register_forward_hook(embed)
        for reader in readers:
            module = model.get_submodule(reader["name"])
            module.__dict__[TOKENS] = self  # no child: P has one name
            module.register_forward_pre_hook(enter_reader, with_kwargs=True)

    def insert(self, tensor: Tensor, value: Tensor | float, dimension: int = 1) -> Tensor:
        """`tensor` with `value` in the places of the virtual tokens."""
        if not isinstance(value, Tensor):
            shape = list(tensor.shape)
            shape[dimension] = self.count
            value = tensor.new_full(shape, value)
        before, after = tensor.tensor_split([self.first], dim=dimension)
        return torch.cat([before, value, after], dim=dimension)

    def cut(self, tensor: Tensor, dimension: int = 1) -> Tensor:
        """`tensor` without these places."""
        before, _, after = tensor.tensor_split([self.first, self.first + self.count], dim=dimension)
        return torch.cat([before, after], dim=dimension)

    def beside(self, embedded: Tensor) -> Tensor:
        """P for every row, in the type and layout of `embedded`."""
        shape = list(embedded.shape)
        shape[self.token_dimension] = self.count
        return self.prompt_embeddings.to(embedded).unsqueeze(1 - self.token_dimension).expand(shape)


def enter_trunk(trunk: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of the trunk: places for the virtual tokens, or later steps' arguments moved past them."""
    tokens: Any = trunk._modules[TOKENS]
    tokens.inserted = None
    arguments = by_name(trunk, args, kwargs)
    embedded = arguments.get("inputs_embeds")
    given = arguments.get(tokens.ids) if embedded is None else embedded
    if given is None:
        return None
    mask = arguments.get("attention_mask")
    if isinstance(mask, dict) or (mask is not None and mask.ndim != 2):
        raise ValueError("virtual tokens take an attention mask (batch, length); pass the padding alone")
    if mask is not None:
        arguments["attention_mask"] = tokens.insert(mask, 1)
    if cached_tokens(arguments):
        for name in ("position_ids", "cache_position"):
            if isinstance(arguments.get(name), Tensor):
                arguments[name] = arguments[name] + tokens.count
        return (), arguments
    batch, length = given.shape[:2]
    tokens.inserted = (batch, length + tokens.count)
    if embedded is None:
        trunk.get_submodule(tokens.lookup).__dict__[TOKENS] = tokens
    return (), {name: _extended(tokens, name, value, (batch, length)) for name, value in arguments.items()}


def embed(embedding: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Forward hook of the embedding layer: P in the places that the trunk's pre-hook has made."""
    tokens = embedding.__dict__.pop(TOKENS, None)
    if tokens is None:
        return None
    embedded = next(tensors_in((output,)))
    cut = tokens.cut(embedded, tokens.token_dimension)
    return with_first(output, tokens.insert(cut, tokens.beside(embedded), tokens.token_dimension))


def leave_trunk(trunk: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of the trunk: per-token outputs without the virtual tokens; caches keep them."""
    tokens: Any = trunk._modules[TOKENS]
    if tokens.inserted is None or tokens.readers:
        return None
    if not isinstance(output, dict):
        return _cut(tokens, output)
    for name in [name for name in output if name not in CACHES]:
        output[name] = _cut(tokens, output[name])
    return output


def enter_reader(reader: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of a reader: masks over the trunk's output grow with it."""
    tokens = reader.__dict__[TOKENS]
    arguments = by_name(reader, args, kwargs)
    for known in tokens.readers:
        states = arguments.get(known["states"])
        for name, value in known["masks"].items():
            mask = arguments.get(name)
            if mask is not None and states is not None and mask.shape[-1] + tokens.count == states.shape[1]:
                arguments[name] = tokens.insert(mask, value, dimension=mask.ndim - 1)
    return (), arguments


def _extended(tokens: VirtualTokens, name: str, value: Any, shape: tuple[int, int]) -> Any:
    """One argument of a first step, with the virtual tokens; what is not per token stays as it is."""
    if not isinstance(value, Tensor) or name == "attention_mask" or name.startswith("decoder"):
        return value
    if name == "inputs_embeds":
        return tokens.insert(value, tokens.beside(value))
    if name in ("position_ids", "cache_position"):
        return _positions(tokens, value)
    per_token = value.ndim == 2 or not value.is_floating_point() or name == "bbox"  # not a picture's features
    if value.shape[:2] == shape and per_token:
        return tokens.insert(value, {tokens.ids: tokens.plain_id, "labels": -100}.get(name, 0))
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
