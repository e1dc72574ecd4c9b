"""Attention prefix: softmax(Q [P_k; K]^T / sqrt(size)) [P_v; V] with trained P_k, P_v (2101.00190, section 4).

The attention is the model's own, as transformers' registry knows it; keys and values get longer, and the mask gets
columns that every query sees. A cache holds real tokens only.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PREFIX = "lightsft_prefix"


class AttentionPrefix(nn.Module):
    """P_k (heads, tokens, key_size) and P_v (heads, tokens, value_size) on one attention module."""

    config: Any  # the attention module's own, which names the attention to use

    def __init__(self, heads: int, tokens: int, key_size: int, value_size: int) -> None:
        super().__init__()
        self.prefix_key = nn.Parameter(torch.zeros(heads, tokens, key_size, dtype=torch.float32))
        self.prefix_value = nn.Parameter(torch.zeros(heads, tokens, value_size, dtype=torch.float32))

    def place(self, model: nn.Module, on: str) -> None:
        """Have the module called `on` ask the registry for `attend_with_prefix`; the rest of the model sees nothing."""
        attention: Any = model.get_submodule(on)
        self.config = attention.config
        attention.config = copy.copy(self.config)
        attention.config._attn_implementation_internal = PREFIX
        attention.add_module(PREFIX, self)

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> Any:
        """Attention as the model is set to compute it, with the prefix in front."""
        name = self.config._attn_implementation
        if name not in ("sdpa", "eager"):
            raise ValueError(f"a prefix beside the attention {name!r}: load with attn_implementation='sdpa' or 'eager'")
        known = name in ALL_ATTENTION_FUNCTIONS
        function: Any = (
            ALL_ATTENTION_FUNCTIONS[name] if known else sys.modules[type(module).__module__].eager_attention_forward
        )
        if options.get("is_causal") is None:
            options["is_causal"] = bool(getattr(module, "is_causal", True))
        if mask is None and name == "sdpa" and options["is_causal"] and query.shape[2] > 1:
            mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]
        tokens = self.prefix_key.shape[1]
        if mask is not None:
            options["is_causal"] = False
            mask = nn.functional.pad(mask, (tokens, 0), value=True if mask.dtype == torch.bool else 0.0)
        if isinstance(options.get("position_bias"), Tensor):
            options["position_bias"] = nn.functional.pad(options["position_bias"], (tokens, 0))
        return function(
            module, query, _before(self.prefix_key, key), _before(self.prefix_value, value), mask, **options
        )


def attend_with_prefix(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Any:
    """What the registry knows: hands over to the prefix on the attention module."""
    return module._modules[PREFIX].attend(module, query, key, value, attention_mask, **options)


def _before(prefix: Tensor, tensor: Tensor) -> Tensor:
    """(heads, tokens, size) in front of (batch, heads, length, size)."""
    return torch.cat([prefix.to(tensor.dtype).expand(tensor.shape[0], -1, -1, -1), tensor], dim=2)


AttentionInterface.register(PREFIX, attend_with_prefix)
