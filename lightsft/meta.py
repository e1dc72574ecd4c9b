"""Models without weights: what a forward pass does, found on the meta device, where tensors have a shape and no values.

    with weightless():
        backbone = Backbone(LlamaForCausalLM(config))   # 70 billion parameters in no memory
        injection = LoRA().inject(backbone)

Modelling code looks at values now and then: whether a mask holds padding, which tokens go to the third expert. Those
that do not come from a weight (token ids, masks, positions) are small and known, and are computed beside the shapes.
Where one that does come from a weight is asked for, it is made up: a number is 0, all of anything holds, any of it does
not, a mask lets everything through, and a choice among entries (of experts for a token) takes each in turn.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils.weak import WeakTensorKeyDictionary

from lightsft.dry_run import tensors_in

LARGEST_KNOWN = 1 << 20  # elements; masks and positions of a few tokens are far smaller
META, CPU = torch.device("meta"), torch.device("cpu")
_NUMBER, _WHERE = torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default
_COPY = torch.ops.aten._to_copy.default
CHOICES = frozenset({"topk", "sort", "argsort", "argmax", "argmin", "max", "min", "kthvalue", "median", "multinomial"})


@contextmanager
def weightless() -> Iterator[None]:
    """Within it, whatever is made lies on the meta device, and small values that depend on no weight stay known."""
    if any(isinstance(mode, _Values) for mode in _get_current_dispatch_mode_stack()):
        yield
        return
    with _Values(), _numbers_in_texts():
        yield


@contextmanager
def _numbers_in_texts() -> Iterator[None]:
    """Within it f"expert_{index}" holds the number, as it does off the meta device."""
    plain: Callable[[Tensor, str], str] = Tensor.__format__

    def written(tensor: Tensor, form: str) -> str:
        return format(tensor.item(), form) if tensor.is_meta and tensor.ndim == 0 else plain(tensor, form)

    Tensor.__format__ = written  # type: ignore[method-assign]
    try:
        yield
    finally:
        Tensor.__format__ = plain  # type: ignore[method-assign]


class _Values(TorchDispatchMode):
    """Sends every operation to the meta device, and does those on known values on the CPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known = WeakTensorKeyDictionary()  # meta tensor -> its values, on the CPU
        self.seen: dict[Any, tuple[Any, ...]] = {}  # operation and shapes -> shape, stride and type of its result

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = list(tensors_in((*args, *kwargs.values())))
        if func is _COPY and _to_cpu(kwargs) and (self._knows(given[0]) or not given[0].is_floating_point()):
            return func(self._values_of(given[0], func), **kwargs)  # for a list, which is read from memory
        known = all(map(self._knows, given)) and bool(given or _makes_small_values(func, args, kwargs))
        try:
            return (self._compute if known else self._shape)(func, args, kwargs)
        except RuntimeError:  # the CPU has no such kernel, or the result's shape depends on values
            if any(tensor.numel() > LARGEST_KNOWN for tensor in given):
                raise
            return (self._shape if known else self._compute)(func, args, kwargs)

    def _shape(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Do it on shapes; done once for each choice of them, since equal blocks do the same."""
        args, kwargs = self._on_meta(args), _placed(META, self._on_meta(kwargs))
        key = _key((func, args, kwargs))
        if key in self.seen:
            shape, stride, dtype = self.seen[key]
            result = torch.empty_strided(shape, stride, dtype=dtype, device=META)
        else:
            result = func(*args, **kwargs)
            if isinstance(result, Tensor) and not any(value.alias_info for value in func._schema.returns):
                self.seen[key] = (result.shape, result.stride(), result.dtype)
        self._make_up(func, args, kwargs, result)
        return result

    def _on_meta(self, values: Any) -> Any:
        """The same arguments, with tensors that have values replaced by their shapes."""
        return values if all(tensor.is_meta for tensor in tensors_in((values,))) else _each(self._shape_of, values)

    def _knows(self, tensor: Tensor) -> bool:
        return not tensor.is_meta or tensor in self.known

    def _compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Do it on values: the results are meta tensors with known values, or plain numbers."""

        def values(tensor: Tensor) -> Tensor:
            return self._values_of(tensor, func)

        result = func(*_each(values, args), **_placed(CPU, _each(values, kwargs)))
        written = _written(func, args, kwargs)
        return _each(self._shape_of, result) if written is None else written

    def _make_up(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Values for results that code decides by: whether all or any hold, and the indices of what was chosen."""
        kind = func.__name__.partition(".")[0]
        if kind in ("all", "any") and result.numel() <= LARGEST_KNOWN:
            self.known[result] = torch.full(result.shape, kind == "all", device=CPU)
        elif kind in CHOICES and args[0].numel() <= LARGEST_KNOWN:
            for indices in tensors_in((result,)):
                if indices.dtype == torch.int64:
                    turns = torch.arange(indices.numel(), device=CPU) % _entries(func, args, kwargs)
                    self.known[indices] = turns.reshape(indices.shape)

    def _values_of(self, tensor: Tensor, func: Any) -> Tensor:
        """What a tensor holds, or made-up values for the operation `func`."""
        if not tensor.is_meta:
            return tensor
        if tensor not in self.known:
            yes = func is _WHERE or (tensor.dtype == torch.bool and func is not _NUMBER)
            return torch.full(tensor.shape, int(yes), dtype=tensor.dtype, device=CPU)
        values: Tensor = self.known[tensor]
        return values

    def _shape_of(self, tensor: Tensor) -> Tensor:
        """The tensor itself, or for values a meta tensor that they are known of."""
        if tensor.is_meta:
            return tensor
        shape = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)
        if tensor.numel() <= LARGEST_KNOWN:
            self.known[shape] = tensor
        return shape


def _key(value: Any) -> Any:
    """Something hashable that is equal for equal shapes, types and numbers."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, Mapping):
        return tuple((name, _key(item)) for name, item in value.items())
    if isinstance(value, tuple | list):
        return tuple(map(_key, value))
    return type(value), value


def _each(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same value with every tensor in it replaced."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        return tuple(_each(function, item) for item in value)
    if isinstance(value, list):
        return [_each(function, item) for item in value]
    if isinstance(value, dict):
        return {name: _each(function, item) for name, item in value.items()}
    return value


def _placed(device: torch.device, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**kwargs, "device": device} if kwargs.get("device") is not None else kwargs


def _to_cpu(kwargs: Mapping[str, Any]) -> bool:
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == "cpu"


def _makes_small_values(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a function that is given no tensor makes one that holds values, and few of them."""
    if func.__name__.startswith("empty"):
        return False
    return bool(func(*args, **_placed(META, kwargs)).numel() <= LARGEST_KNOWN)


def _entries(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Among how many entries an operation of `CHOICES` chooses: of one dimension, or of the whole tensor."""
    named = {argument.name: argument.default_value for argument in func._schema.arguments}
    named |= dict(zip(named, args, strict=False)) | dict(kwargs)
    dimension = named.get("dim", -1)
    return int(args[0].numel() if dimension is None else args[0].shape[dimension])


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The argument that the operation writes into and returns, or None."""
    position, name = _target(func)
    return args[position] if position < len(args) else kwargs.get(name)


@cache
def _target(func: Any) -> tuple[int, str]:
    """Position and name of the argument that an operation writes into; beyond all and empty if there is none."""
    arguments = func._schema.arguments
    written = (number for number, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write)
    position = next(written, None)
    return (sys.maxsize, "") if position is None else (position, arguments[position].name)
