"""A trace: what one tiny forward pass through a model does with its modules and its weights.

Which modules run and on what widths, which weights the output depends on, which weights enter a matrix product and
inside which module that happens (a weight may be read without calling the module that owns it), where attention is
computed, what selects experts, and which modules write to the residual stream. Everything is seen from the torch
functions that are called, nothing from names.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import wraps
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel

from lightsft.dry_run import evaluating, predictions, tensors_in, training_without_chance, visible_attention
from lightsft.errors import InjectionError
from lightsft.plain_layers import plain_layer
from lightsft.quantization import quantized_layers

PRODUCTS = ("linear", "matmul", "mm", "einsum", "conv", "tensordot", "multi_head_attention_forward")
ADDITIONS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})
SELECTIONS = frozenset({"topk", "argmax", "max", "sort", "argsort"})
JOINS = frozenset({"cat", "concat", "concatenate"})
COMPOSITES = frozenset({"multi_head_attention_forward"})  # made of other torch functions, in Python
VIEWS = frozenset(
    {"__get__", "__getitem__", "view", "reshape", "transpose", "permute", "t", "swapaxes", "movedim", "flatten"}
    | {"unflatten", "squeeze", "unsqueeze", "expand", "contiguous", "to", "type", "float", "half", "bfloat16"}
    | {"double", "clone", "chunk", "split", "unbind", "select", "narrow", "index_select"}
)


ModelType = TypeVar("ModelType", bound=nn.Module)


@dataclass(frozen=True)
class Call:
    """The last call of one module: shapes of its first tensor argument and of its first output; () where none."""

    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]


@dataclass(frozen=True)
class AttentionSite:
    """A module that computes attention; `cross` when its queries and keys have different lengths."""

    name: str
    cross: bool


@dataclass(frozen=True)
class Trace:
    """What was seen. Names are dotted names of modules and parameters."""

    calls: Mapping[str, Call]  # in the order in which they ended
    used: frozenset[str]  # parameters that the output depends on
    multiplied: Mapping[str, frozenset[str]]  # parameter of a matrix product -> the modules inside which it is read
    attentions: tuple[AttentionSite, ...]
    selectors: Mapping[str, int]  # parameter whose product selects among experts -> how many there are
    writers: tuple[str, ...]  # modules whose output is added to the residual stream, in order


@dataclass(frozen=True)
class _Mark:
    """What is known of one tensor; elementwise functions and views hand it on."""

    parameter: str | None = None  # it is this parameter, or a view of it
    product_of: str | None = None  # the last matrix product on its way was with this parameter
    producer: str | None = None  # the module that returned it
    stream: bool = False  # it entered the running module from outside
    scores: tuple[int, int] | None = None  # numbers of queries and keys, if it is the product of two activations


def trace(model: PreTrainedModel, inputs: Mapping[str, Any], blocks: tuple[str, ...]) -> Trace:
    """Run `model(**inputs)` in evaluation mode, and in training mode without chance, and report; leave it as it was.

    What runs and in which order is that of evaluation; a weight counts as read wherever either mode reads it.
    """
    with evaluating(model), visible_attention(model):
        seen = _watched(model, inputs, blocks)
        with suppress(Exception), training_without_chance(model):  # in training some models refuse this input
            trained = _watched(model, inputs, blocks)
            return replace(
                seen,
                used=seen.used | trained.used,
                multiplied={
                    name: seen.multiplied.get(name, frozenset()) | trained.multiplied.get(name, frozenset())
                    for name in (*seen.multiplied, *trained.multiplied)
                },
                selectors=dict(trained.selectors) | dict(seen.selectors),
            )
        return seen


def in_steps(mode: TorchFunctionMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of one of `COMPOSITES`, whose steps `mode` is shown.

    Such a function asks first whether a mode is running, to which it then hands itself as a whole. A copy does not ask.
    """
    names = {**func.__globals__, "has_torch_function": lambda tensors: False}
    silent = FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
    with mode:
        return silent(*args, **kwargs)


def meta_copy(model: ModelType) -> ModelType:
    """The same modules on the meta device: no weight is copied, and a pass through them computes shapes only.

    A quantized layer becomes the plain one that it stands for.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    quantized = quantized_layers(model).values()
    memo: dict[int, Any] = {id(layer): plain_layer(layer, dtype) for layer in quantized}
    codes = {id(tensor) for layer in quantized for tensor in (*layer.parameters(), *layer.buffers())}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) in codes:
            continue
        empty = torch.empty_like(tensor, device="meta")
        is_weight = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_weight else empty
    return copy.deepcopy(model, memo)


def _watched(model: nn.Module, inputs: Mapping[str, Any], blocks: tuple[str, ...]) -> Trace:
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    watcher = _Watcher(model, blocks)
    with ExitStack() as stack:
        stack.callback(_restore, model, trained)
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
        for handle in watcher.attach():
            stack.callback(handle.remove)
        with torch.enable_grad(), watcher:
            outputs = predictions(model(**inputs))
        used = frozenset(_in_graph(outputs, watcher.names))
    return Trace(
        calls=watcher.calls,
        used=used,
        multiplied={name: frozenset(watcher.read[name]) for name in watcher.multiplied},
        attentions=tuple(AttentionSite(name, cross) for name, cross in watcher.attentions.items()),
        selectors=watcher.selectors,
        writers=tuple(watcher.writers),
    )


def _restore(model: nn.Module, trained: Mapping[str, bool]) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(trained[name])


class _Replaced:
    """An attribute of an object with another value, until it is removed."""

    def __init__(self, owner: object, name: str, value: Any) -> None:
        self.attributes, self.name = vars(owner), name
        self.before = {key: self.attributes[key] for key in (name,) if key in self.attributes}
        self.attributes[name] = value

    def remove(self) -> None:
        """Put back what was there, or nothing."""
        del self.attributes[self.name]
        self.attributes |= self.before


class _Watcher(TorchFunctionMode):
    """Follows tensors through one forward pass; `inside` is the stack of the running modules."""

    def __init__(self, model: nn.Module, blocks: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.blocks = model, frozenset(blocks)
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.modules = {module: name for name, module in model.named_modules()}
        self.weighted = {
            name for name, module in model.named_modules() if any(p.ndim >= 2 for p in module.parameters())
        }
        self.parametrised = {name for name, module in model.named_modules() if any(True for _ in module.parameters())}
        self.inside: list[str] = []
        self.marks = WeakIdKeyDictionary()
        self.calls: dict[str, Call] = {}
        self.read: dict[str, set[str]] = {}  # parameter -> the modules whose code takes hold of it
        self.multiplied: set[str] = set()
        self.attentions: dict[str, bool] = {}
        self.selectors: dict[str, int] = {}
        self.writers: dict[str, None] = {}

    # ---- modules

    def attach(self) -> Iterator[Any]:
        """Hook every module; yields the handles."""
        for module in self.modules:
            yield module.register_forward_pre_hook(self._enter, with_kwargs=True)
            yield module.register_forward_hook(self._leave, with_kwargs=True, always_call=True)
            if self.modules[module] in self.blocks:
                yield self._noticed(module)

    def _noticed(self, module: nn.Module) -> _Replaced:
        """Notice a block whose `forward` is called past its hooks."""
        forward, name = module.forward, self.modules[module]

        @wraps(forward)
        def noticed(*args: Any, **kwargs: Any) -> Any:
            if self.inside and self.inside[-1] == name:
                return forward(*args, **kwargs)
            output = None
            self._enter(module, args, kwargs)
            try:
                output = forward(*args, **kwargs)
            finally:
                self._leave(module, args, kwargs, output)
            return output

        return _Replaced(module, "forward", noticed)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = self.modules[module]
        self.inside.append(name)
        if name in self.weighted and self._in_block():
            for tensor in tensors_in((*args, *kwargs.values())):
                if tensor.is_floating_point():
                    self._mark(tensor, replace(self._of(tensor), stream=True))

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        name = self.inside.pop()
        given = next(iter(tensors_in((*args, *kwargs.values()))), None)
        returned = next(iter(tensors_in((output,))), None)
        if returned is None:
            return
        self.calls.pop(name, None)
        self.calls[name] = Call(() if given is None else tuple(given.shape), tuple(returned.shape))
        mark = self._of(returned)
        if mark.producer is None and name in self.weighted and not mark.stream:
            self._mark(returned, replace(mark, producer=name))

    def _in_block(self) -> bool:
        return any(name in self.blocks for name in self.inside)

    # ---- tensors

    def _of(self, tensor: Tensor) -> _Mark:
        if id(tensor) in self.names:
            return _Mark(parameter=self.names[id(tensor)])
        mark: _Mark = self.marks.get(tensor, _Mark())
        return mark

    def _mark(self, tensor: Tensor, mark: _Mark) -> None:
        if id(tensor) not in self.names:
            self.marks[tensor] = mark

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`, then note what it means."""
        name = getattr(func, "__name__", "")
        if name in COMPOSITES:
            return in_steps(self, func, args, kwargs or {})
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, Tensor | tuple | list) or name.endswith("_like") or name.startswith("new_"):
            return result
        given = list(tensors_in((*args, *(kwargs or {}).values())))
        returned = list(tensors_in((result,)))
        if not given or not returned:
            return result
        for tensor in given:
            if id(tensor) in self.names:
                self.read.setdefault(self.names[id(tensor)], set()).add(self.inside[-1] if self.inside else "")
        if "scaled_dot_product_attention" in name:
            self._attends(given[0].shape[-2], given[1].shape[-2])
        elif any(product in name for product in PRODUCTS):
            self._multiply(given, returned[0])
        else:
            self._pass_on(name, given, returned)
        return result

    def _multiply(self, given: list[Tensor], result: Tensor) -> None:
        weights = [mark.parameter for mark in map(self._of, given) if mark.parameter is not None]
        self.multiplied.update(weights)
        matrices = [w for w in weights if self.model.get_parameter(w).ndim >= 2]
        if matrices:
            self._mark(result, _Mark(product_of=matrices[0]))
        elif result.ndim >= 2:
            self._mark(result, _Mark(scores=(result.shape[-2], result.shape[-1])))

    def _pass_on(self, name: str, given: list[Tensor], returned: list[Tensor]) -> None:
        marks = [self._of(tensor) for tensor in given]
        if "softmax" in name and marks[0].scores is not None:
            self._attends(*marks[0].scores)
        if name in SELECTIONS and marks[0].product_of is not None:
            self._select(marks[0].product_of, given[0].shape[-1])
        is_sum = name in ADDITIONS and len(given) >= 2 and self._in_block()
        if is_sum and self._add(given[:2], marks[:2], returned[0]):
            return
        for result in returned:
            self._mark(result, _inherited(name, given, marks, result))

    def _attends(self, queries: int, keys: int) -> None:
        holder = next((name for name in reversed(self.inside) if name in self.parametrised), None)
        if holder is not None:
            self.attentions[holder] = self.attentions.get(holder, False) or queries != keys

    def _select(self, parameter: str, width: int) -> None:
        if width in self.model.get_parameter(parameter).shape:
            self.selectors[parameter] = width

    def _add(self, given: list[Tensor], marks: list[_Mark], result: Tensor) -> bool:
        """Whether this was `stream + what a module returned`; if so the sum is the stream from here on."""
        for (one, mark), (other, branch) in (
            ((given[0], marks[0]), (given[1], marks[1])),
            ((given[1], marks[1]), (given[0], marks[0])),
        ):
            if mark.stream and not branch.stream and branch.producer is not None and one.shape == other.shape:
                self.writers.setdefault(branch.producer)
                self._mark(result, _Mark(stream=True))
                return True
        if marks[0].producer is not None and marks[1].producer is not None:  # a sum of several modules: no one's
            self._mark(result, _Mark())
            return True
        return False


def _inherited(name: str, given: list[Tensor], marks: list[_Mark], result: Tensor) -> _Mark:
    """The mark of the first marked argument, if `result` is a view of it or has its shape."""
    for tensor, mark in zip(given, marks, strict=True):
        if mark == _Mark():
            continue
        if name in VIEWS and tensor is given[0]:
            return mark
        if name in JOINS and tensor.shape[:-1] == result.shape[:-1]:  # scores beside those of a sink
            return mark
        if tensor.shape == result.shape:
            return mark if len(given) == 1 else replace(mark, parameter=None)
    return _Mark()


def _in_graph(outputs: list[Tensor], names: Mapping[int, str]) -> Iterator[str]:
    """The parameters that `outputs` depend on: the leaves of their autograd graph."""
    waiting = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) in names:
            yield names[id(leaf)]
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)


def nearest_called(name: str, calls: Mapping[str, Call]) -> str:
    """The innermost module around `name` that was called; the model itself ("") at last."""
    while name and name not in calls:
        name = name.rpartition(".")[0]
    if name not in calls:
        raise InjectionError("the model was never called", expected="a trace of one forward pass")
    return name
