"""Models without weights: what a forward pass does, found on the meta device, where tensors have a shape and no values.

    with weightless():
        backbone = Backbone(LlamaForCausalLM(config))   # 70 billion parameters in no memory
        injection = LoRA().inject(backbone)

Modelling code looks at values now and then: whether a mask holds padding, which tokens go to the third expert. Those
that do not come from a weight (token ids, masks, positions) are small and known, and are computed beside the shapes.
Where one that does come from a weight is asked for, it is made up: a number is 0, a condition does not hold, a mask
lets everything through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from lightsft.dry_run import tensors_in

LARGEST_KNOWN = 1 << 20  # elements; masks and positions of a few tokens are far smaller
META, CPU = torch.device("meta"), torch.device("cpu")
_NUMBER, _WHERE = torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default


@contextmanager
def weightless() -> Iterator[None]:
    """Within it, whatever is made lies on the meta device, and small values that depend on no weight stay known."""
    with _Values():
        yield


class _Values(TorchDispatchMode):  # type: ignore[misc]
    """Sends every operation to the meta device, and does those on known values on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.known = WeakTensorKeyDictionary()  # meta tensor -> its values, on the CPU

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = list(tensors_in((*args, *kwargs.values())))
        if all(map(self._knows, given)) and (given or _makes_small_values(func, args, kwargs)):
            return self._compute(func, args, kwargs)
        if given and _to_cpu(kwargs) and not given[0].is_floating_point():  # for a list, which is read from memory
            return self._values_of(given[0], func)
        if not all(tensor.is_meta for tensor in given):
            args, kwargs = _each(self._shape_of, args), _each(self._shape_of, kwargs)
        try:
            return func(*args, **_placed(META, kwargs))
        except (RuntimeError, NotImplementedError):  # the shape of the result depends on values
            if any(tensor.numel() > LARGEST_KNOWN for tensor in given):
                raise
            return self._compute(func, args, kwargs)

    def _knows(self, tensor: Tensor) -> bool:
        return not tensor.is_meta or tensor in self.known

    def _compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Do it on values: the results are meta tensors with known values, or plain numbers."""

        def values(tensor: Tensor) -> Tensor:
            return self._values_of(tensor, func)

        result = func(*_each(values, args), **_placed(CPU, _each(values, kwargs)))
        written = _written(func, args, kwargs)
        return _each(self._shape_of, result) if written is None else written

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


def _each(function: Callable[[Tensor], Tensor], values: Any) -> Any:
    return tree_map_only(Tensor, function, values)


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


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The argument that the operation writes into and returns, or None."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return args[position] if position < len(args) else kwargs.get(argument.name)
    return None
