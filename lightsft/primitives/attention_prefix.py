"""An attention prefix: trained keys and values that every query may attend to (2101.00190).

Transformers calls attention through a registry and hands the attention module to the function. For each
implementation in use ("sdpa", "eager", ...) we register one more, which finds the prefix on the module, prepends its
keys and values, extends the mask and the position bias, and calls the implementation that was there before. The
KV cache is filled earlier, so it holds real tokens only, and a prefix works in any generation mode.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lightsft.errors import InjectionError
from lightsft.primitives.base import Primitive

PREFIX = "lightsft_prefix"
_REGISTERED = "lightsft_prefix_"


class AttentionPrefix(nn.Module):
    """Base of prefixes. Subclasses define `keys_and_values`."""

    enabled: bool = True

    def keys_and_values(self) -> tuple[Tensor, Tensor]:
        """Keys (heads, tokens, key size) and values (heads, tokens, value size), fp32."""
        raise NotImplementedError


class PlacedPrefix(Primitive):
    """A prefix on the attention module called `name`."""

    def __init__(self, model: nn.Module, name: str, prefix: AttentionPrefix) -> None:
        self.name, self.model = name, model
        attention = self.attention
        if PREFIX in attention._modules:
            raise InjectionError(f"{name} already carries a prefix", expected="one prefix per attention")
        config: Any = attention.config
        self.previous: str = config._attn_implementation
        prefix.to(next(attention.parameters()).device)
        attention.add_module(PREFIX, prefix.train(attention.training))
        if not self.previous.startswith(_REGISTERED):
            _set_implementation(config, register(self.previous))

    @property
    def attention(self) -> nn.Module:
        """The attention module that carries the prefix."""
        return self.model.get_submodule(self.name)

    @property
    def prefix(self) -> AttentionPrefix:
        """The prefix module."""
        prefix = self.attention._modules[PREFIX]
        assert isinstance(prefix, AttentionPrefix)
        return prefix

    def trainable(self) -> dict[str, nn.Parameter]:
        """The prefix's parameters. A module shared between prefixes shows under each of their names."""
        return {f"{self.name}.{name}": parameter for name, parameter in self.prefix.named_parameters()}

    def tensors(self) -> dict[str, Tensor]:
        """The parameters, detached."""
        return {name: parameter.detach() for name, parameter in self.trainable().items()}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Copy saved tensors into the parameters."""
        for name, parameter in self.trainable().items():
            parameter.copy_(tensors[name])

    def enable(self, enabled: bool) -> None:
        """A disabled prefix leaves keys, values and mask alone."""
        self.prefix.enabled = enabled

    def covers(self) -> set[str]:
        """The parameters of the attention it extends."""
        return {f"{self.name}.{n}" for n, _ in self.attention.named_parameters() if not n.startswith(PREFIX)}

    def remove(self) -> None:
        """Take the prefix off; the first one placed on a configuration also puts its implementation back."""
        del self.attention._modules[PREFIX]
        if not self.previous.startswith(_REGISTERED):
            _set_implementation(self.attention.config, self.previous)


def register(implementation: str) -> str:
    """Register a prefix-aware version of an attention implementation and of its mask; returns its name."""
    name = _REGISTERED + implementation
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, _PrefixAware(implementation))
    if name not in ALL_MASK_ATTENTION_FUNCTIONS and implementation in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    return name


class _PrefixAware:
    """The registered attention function: prepend this module's prefix, then call the previous implementation."""

    def __init__(self, implementation: str) -> None:
        self.implementation = implementation

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> Any:
        attend = implementation_of(module, self.implementation)
        prefix = module._modules.get(PREFIX)
        if not isinstance(prefix, AttentionPrefix) or not prefix.enabled:
            return attend(module, query, key, value, attention_mask, **options)
        more_keys, more_values = prefix.keys_and_values()
        if options.get("is_causal") is None:
            options["is_causal"] = bool(getattr(module, "is_causal", True))
        attention_mask = self._extended_mask(attention_mask, query, key, more_keys.shape[1], options)
        if isinstance(options.get("position_bias"), Tensor):
            options["position_bias"] = nn.functional.pad(options["position_bias"], (more_keys.shape[1], 0))
        key, value = _prepend(more_keys, key), _prepend(more_values, value)
        return attend(module, query, key, value, attention_mask, **options)

    def _extended_mask(
        self, mask: Tensor | None, query: Tensor, key: Tensor, tokens: int, options: dict[str, Any]
    ) -> Tensor | None:
        """The mask with `tokens` columns in front that every query sees."""
        if "flash" in self.implementation:  # aligned to the last key: causal masking needs no help
            if options.get("sliding_window"):
                raise InjectionError(
                    "flash attention with a sliding window would cut the prefix off",
                    expected="an attention that takes a mask",
                    todo='load the model with attn_implementation="sdpa"',
                )
            return None if mask is None else nn.functional.pad(mask, (tokens, 0), value=1)
        if mask is None:
            if not options["is_causal"] or query.shape[2] == 1:
                return None
            mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]
        if not isinstance(mask, Tensor):
            raise InjectionError(
                f"the attention mask is a {type(mask).__name__}",
                expected="a tensor",
                todo='load the model with attn_implementation="sdpa"',
            )
        options["is_causal"] = False
        return nn.functional.pad(mask, (tokens, 0), value=True if mask.dtype == torch.bool else 0.0)


def _prepend(more: Tensor, tensor: Tensor) -> Tensor:
    """(heads, tokens, size) in front of (batch, heads, length, size)."""
    return torch.cat([more.to(tensor.dtype).expand(tensor.shape[0], -1, -1, -1), tensor], dim=2)


def implementation_of(module: nn.Module, name: str) -> Callable[..., Any]:
    """The attention function called `name`; "eager" is each modelling file's own."""
    if name in ALL_ATTENTION_FUNCTIONS:
        function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[name]
        return function
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise InjectionError(
            f"{type(module).__name__} uses the attention {name!r}, which is not in transformers' registry",
            expected="an attention called through AttentionInterface",
        )
    found: Callable[..., Any] = eager
    return found


def _set_implementation(config: Any, name: str) -> None:
    """Set it on this configuration alone; the public setter would also set the nested ones."""
    config._attn_implementation_internal = name


@dataclass(frozen=True)
class AttentionCall:
    """What one attention module was called with: keys (heads, length, size), values (heads, length, size)."""

    name: str
    keys: Tensor
    values: Tensor
    query_length: int


@contextmanager
def recorded_attention(model: nn.Module) -> Iterator[list[AttentionCall]]:
    """While it is open, every attention that goes through the registry notes what it was called with."""
    names = {module: name for name, module in model.named_modules()}
    calls: list[AttentionCall] = []
    configs = {id(m.config): m.config for m in names if hasattr(getattr(m, "config", None), "_attn_implementation")}
    before = {key: config._attn_implementation for key, config in configs.items()}

    def recorder(implementation: str) -> Callable[..., Any]:
        def record(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
            if module in names:
                calls.append(AttentionCall(names[module], key[0].detach(), value[0].detach(), query.shape[2]))
            return implementation_of(module, implementation)(module, query, key, value, *args, **options)

        return record

    temporary = {f"lightsft_record_{name}": name for name in before.values() if name}
    for name, implementation in temporary.items():
        AttentionInterface.register(name, recorder(implementation))
        if implementation in ALL_MASK_ATTENTION_FUNCTIONS:
            AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    try:
        for key, config in configs.items():
            if before[key]:
                _set_implementation(config, f"lightsft_record_{before[key]}")
        yield calls
    finally:
        for key, config in configs.items():
            _set_implementation(config, before[key])
        for name in temporary:
            AttentionInterface._global_mapping.pop(name, None)
            AttentionMaskInterface._global_mapping.pop(name, None)
