"""What a module is called with: its arguments by name, and how much a cache among them holds."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

READER = "lightsft_prompt_reader"  # where a model and the modules around its blocks hold their prompt reader
CACHES = ("past_key_values", "cache_params")


def by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call under their names."""
    return dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs


def cached_tokens(arguments: dict[str, Any]) -> int:
    """How many tokens the cache among a call's arguments holds, virtual ones included; 1 of a state without a count."""
    held = [0]
    for cache in (arguments.get(name) for name in CACHES):
        for layer in getattr(getattr(cache, "self_attention_cache", cache), "layers", ()):
            if hasattr(layer, "max_cache_len"):
                raise ValueError("a static cache: generate with one that grows, without cache_implementation")
            state = getattr(layer, "has_previous_state", None)
            held.append(int(any(state.values()) if isinstance(state, dict) else bool(state)))
            if hasattr(layer, "get_seq_length"):
                held.append(int(layer.get_seq_length()))
    return max(held)
