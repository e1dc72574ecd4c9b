"""An attention prefix: trained keys and values that every query may attend to (2101.00190).

Transformers calls attention through a registry and hands the attention module to the function. For each
implementation in use ("sdpa", "eager", ...) we register one more, which finds the prefix on the module, prepends its
keys and values, extends the mask and the position bias, and calls the implementation that was there before. The
KV cache is filled earlier, so it holds real tokens only, and a prefix works in any generation mode. Attention that does
not go through the registry has its own route, in `lightsft.primitives.prefix_mixing`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lightsft.dry_run import evaluating
from lightsft.errors import InjectionError
from lightsft.primitives.base import Part, PlacedPart, drop_hook, drop_pre_hook
from lightsft.primitives.prefix_mixing import PrefixMixing
from lightsft.primitives.standalone import Standalone
from lightsft.quantization import device_of, parameter_names
from lightsft.standalone import attention_prefix as standalone

PREFIX = "lightsft_prefix"
_REGISTERED = "lightsft_prefix_"


class AttentionPrefix(Part):
    """Base of prefixes. Subclasses define `keys_and_values`.

    `key_bias` and `registered`: see `AttentionCall`.
    """

    key_bias: bool = False
    registered: bool = True

    def keys_and_values(self) -> tuple[Tensor, Tensor]:
        """Keys (heads, tokens, key size) and values (heads, tokens, value size), fp32."""
        raise NotImplementedError

    def standalone(self) -> Standalone | None:
        """The keys and values; None where the attention is written out, so that no registry hands it over."""
        if not self.registered or self.key_bias:
            return None
        with torch.no_grad(), evaluating(self):
            keys, values = (tensor.clone() for tensor in self.keys_and_values())
        heads, tokens, size = keys.shape
        options = {"heads": heads, "tokens": tokens, "key_size": size, "value_size": values.shape[-1]}
        return Standalone(standalone.AttentionPrefix, options, {"prefix_key": keys, "prefix_value": values})


class PlacedPrefix(PlacedPart):
    """A prefix on the attention module called `name`, whose attention goes through the registry."""

    def __init__(self, model: nn.Module, name: str, prefix: AttentionPrefix) -> None:
        self.name, self.model = name, model
        attention = self.attention
        if PREFIX in attention._modules:
            raise InjectionError(f"{name} already carries a prefix", expected="one prefix per attention")
        prefix.to(device_of(attention))
        attention.add_module(PREFIX, prefix.train(attention.training))
        self._connect()

    def _connect(self) -> None:
        config: Any = self.attention.config
        self.previous: str = config._attn_implementation
        if not self.previous.startswith(_REGISTERED):
            _set_implementation(config, register(self.previous))

    def _disconnect(self) -> None:
        """The first one placed on a configuration also puts its implementation back."""
        if not self.previous.startswith(_REGISTERED):
            _set_implementation(self.attention.config, self.previous)

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

    @property
    def part(self) -> Part:  # type: ignore[override]
        """The prefix module."""
        return self.prefix

    def covers(self) -> set[str]:
        """The parameters of the attention it extends."""
        return {f"{self.name}.{name}" for name in parameter_names(self.attention)}

    def remove(self) -> None:
        """Take the prefix off."""
        self._disconnect()
        del self.attention._modules[PREFIX]


class MixedPrefix(PlacedPrefix):
    """A prefix on an attention that is written out as torch functions: mixed in while the module runs."""

    def _connect(self) -> None:
        self.attention.register_forward_pre_hook(_open)
        self.attention.register_forward_hook(_close, always_call=True)

    def _disconnect(self) -> None:
        attention = self.attention
        drop_pre_hook(attention, _open)
        drop_hook(attention, _close)


def _open(attention: nn.Module, args: Any) -> None:
    prefix = attention._modules[PREFIX]
    assert isinstance(prefix, AttentionPrefix)
    mode: AbstractContextManager[Any] = nullcontext()  # under one that does nothing torch would avoid fast paths
    if prefix.enabled:
        mode = PrefixMixing(prefix.keys_and_values, key_bias=prefix.key_bias)
    prefix.__dict__.setdefault("modes", []).append(mode)
    mode.__enter__()


def _close(attention: nn.Module, args: Any, output: Any) -> None:
    prefix = attention._modules[PREFIX]
    assert prefix is not None
    prefix.__dict__["modes"].pop().__exit__(None, None, None)


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
            if self.implementation == "eager" or not options["is_causal"] or query.shape[2] == 1:
                return None  # eager attention is causal by its mask alone
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
    return _written_out(module, name)


def _written_out(module: nn.Module, name: str) -> Callable[..., Any]:
    """The attention function in the file of `module`."""
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
    registered: bool = True  # whether it goes through transformers' registry
    key_bias: bool = False  # whether its scores get a bias that is the same for all queries (ALiBi)


@contextmanager
def recorded_attention(model: nn.Module, sites: Iterable[str] = ()) -> Iterator[list[AttentionCall]]:
    """While it is open, attention through the registry, and in the modules `sites`, notes what it is called with."""
    calls: list[AttentionCall] = []
    with ExitStack() as stack:
        stack.enter_context(_recorded_registry(model, calls))
        for name in sites:
            stack.enter_context(_recorded_site(model, name, calls))
        yield calls


@contextmanager
def _recorded_site(model: nn.Module, name: str, calls: list[AttentionCall]) -> Iterator[None]:
    """Attention that is written out in one module."""
    open_modes: list[PrefixMixing] = []

    def record(keys: Tensor, values: Tensor, query_length: int, key_bias: bool) -> None:
        if not any(call.name == name and call.registered for call in calls):
            calls.append(AttentionCall(name, keys.detach(), values.detach(), query_length, False, key_bias))

    def begin(module: nn.Module, args: Any) -> None:
        open_modes.append(PrefixMixing(record=record))
        open_modes[-1].__enter__()

    def end(module: nn.Module, args: Any, output: Any) -> None:
        open_modes.pop().__exit__(None, None, None)

    module = model.get_submodule(name)
    handles = [module.register_forward_pre_hook(begin), module.register_forward_hook(end, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _recorded_registry(model: nn.Module, calls: list[AttentionCall]) -> Iterator[None]:
    """Attention through the registry, under the names that are in use: models ask for them."""
    names = {module: name for name, module in model.named_modules()}
    used = {getattr(getattr(module, "config", None), "_attn_implementation", None) for module in names}
    registry = AttentionInterface._global_mapping
    before = {name: registry.get(name) for name in used if name}

    def recorder(implementation: str) -> Callable[..., Any]:
        def record(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
            if module in names:
                calls.append(AttentionCall(names[module], key[0].detach(), value[0].detach(), query.shape[2]))
            attend = before[implementation] or _written_out(module, implementation)
            return attend(module, query, key, value, *args, **options)

        return record

    try:
        for name in before:
            AttentionInterface.register(name, recorder(name))
        yield
    finally:
        for name, function in before.items():
            if function is None:
                registry.pop(name, None)
            else:
                AttentionInterface.register(name, function)
