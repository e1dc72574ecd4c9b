"""Further roles, found from what modules and torch functions do: normalisation layers, and biases.

A normalisation layer is a module of vectors alone whose output for 3 x is that for x. A bias is a parameter that is
added. Both are tried out or seen in one tiny forward pass; no class or parameter is known by its name. What makes the
queries, keys and values of an attention, and what ends a feed-forward, is in `lightsft.dataflow`.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

from lightsft.anatomy import Anatomy, is_within
from lightsft.backbone import Backbone
from lightsft.dry_run import evaluating, tensors_in, visible_attention
from lightsft.trace import ADDITIONS, PRODUCTS, VIEWS

EXPANDING = frozenset({"expand_as", "view_as", "type_as"})
ADDED_FIRST = frozenset({"addmm", "addbmm", "baddbmm", "addmv", "addcmul"})  # torch.addmm(added, matrix, matrix)
CLOSE = 1e-2  # of the output: what a norm's epsilon may change
BATCH, LARGE = 8, 1 << 14
LONGEST_OWN = 1 << 20  # elements in a norm's parameter; embedding tables are not copied to be tried out


# ---- normalisation layers


@dataclass(frozen=True)
class Norm:
    """A normalisation layer; `scales` and `biases` are the names of its parameters."""

    name: str
    scales: tuple[str, ...]
    biases: tuple[str, ...]


def find_norms(backbone: Backbone) -> list[Norm]:
    """The normalisation layers with trainable parameters outside the task head, in the model's order.

    A layer that stands in a norm's place and scales and shifts each feature (MobileBERT's NoNorm) counts as one. Layers
    that the example input never runs are left out.
    """
    anatomy, seen = backbone.anatomy, backbone.anatomy.trace
    multiplied = {owner.rpartition(".")[0] for weight in anatomy.weights.values() for owner in weight.owners}
    listed = dict(backbone.model.named_parameters())  # each once: a shared one by its first name
    tried: dict[Any, tuple[tuple[str, ...], tuple[str, ...]] | None] = {}
    found = []
    for name, module in backbone.model.named_modules():
        own = {part: p for part, p in module.named_parameters(recurse=False) if f"{name}.{part}" in listed}
        if name in multiplied or not _holds_vectors_alone(module, own) or _is_outside(backbone, name, own):
            continue
        shape = seen.calls[name].input_shape if seen is not None and name in seen.calls else ()
        key = type(module), repr(module), shape, tuple(parameter.shape for parameter in own.values())
        if key not in tried:
            tried[key] = try_out(module, shape)
        parts = tried[key]
        if parts is not None:
            scales, biases = ([f"{name}.{part}" for part in kind] for kind in parts)
            found.append(Norm(name, tuple(scales), tuple(biases)))
    return found


def _holds_vectors_alone(module: nn.Module, own: Mapping[str, nn.Parameter]) -> bool:
    """All its parameters are its own, and vectors: of one dimension, or two for vectors per head."""
    return 0 < len(own) == sum(1 for _ in module.parameters()) and all(
        parameter.is_floating_point()
        and sum(size > 1 for size in parameter.shape) <= 2
        and parameter.numel() <= LONGEST_OWN
        for parameter in own.values()
    )


def _is_outside(backbone: Backbone, name: str, own: Mapping[str, nn.Parameter]) -> bool:
    names = {f"{name}.{part}" for part in own}
    return names <= backbone.head or names <= backbone.anatomy.idle


def try_out(module: nn.Module, shape: tuple[int, ...] = ()) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """(scales, biases) of a normalisation layer, or None for anything else; a copy of it is tried, on the CPU."""
    with _disable_current_modes(), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        twin = _twin(module)
        for candidate in _shapes(module, shape):
            for inputs in (1, 2):  # gated norms take two
                try:
                    return _parts(twin, [torch.randn(candidate) for _ in range(inputs)])
                except Exception:
                    continue
    return None


def _twin(module: nn.Module) -> nn.Module:
    """A copy in fp32 on the CPU with parameters around 1, in training mode: batch statistics, not those that ran."""
    twin = copy.deepcopy(module)
    twin = (twin.to_empty(device="cpu") if next(module.parameters()).is_meta else twin.cpu()).float().train()
    for parameter in twin.parameters():
        parameter.data = torch.empty_like(parameter).uniform_(0.5, 1.5)
    return twin


def _shapes(module: nn.Module, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shape that was seen, for a batch with statistics of its own; else what the parameters suggest."""
    if len(shape) > 1:
        return [(2 if math.prod(shape) > LARGE else BATCH, *shape[1:])]
    own = next(module.parameters()).shape
    return [(BATCH, 5, *own), (BATCH, *own, 5), (BATCH, *own, 5, 5)]


def _parts(twin: nn.Module, inputs: list[Tensor]) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    first, *others = inputs

    def run(x: Tensor) -> Tensor:
        return next(tensors_in((twin(x, *others),)))

    plain, shift = run(first), run(torch.zeros_like(first))
    if plain.numel() != first.numel() or not torch.isfinite(plain).all():
        return None
    if _are_close(plain, run(torch.randn_like(first))):  # it does not depend on its input
        return None
    biases = tuple(name for name, parameter in twin.named_parameters() if _moves(run, parameter, 0 * first))
    scales = tuple(name for name, _ in twin.named_parameters() if name not in biases)
    normalises = _are_close(run(3 * first), plain)
    scales_and_shifts = bool(biases) and not others and _scales_each(run, first, shift)
    return (scales, biases) if scales and (normalises or scales_and_shifts) else None


def _scales_each(run: Callable[[Tensor], Tensor], first: Tensor, shift: Tensor) -> bool:
    """Whether the output is linear in the input but for a shift, and each feature depends on itself alone."""
    step = torch.zeros_like(first)
    step.view(-1)[0] = 1.0
    is_linear = _are_close(run(3 * first) - shift, 3 * (run(first) - shift))
    return is_linear and int((run(step) != shift).sum()) == 1


def _moves(run: Callable[[Tensor], Tensor], parameter: nn.Parameter, zero: Tensor) -> bool:
    """Whether the output for zeros depends on the parameter: what scales them does not change it."""
    before, values = run(zero), parameter.data
    parameter.data = values + 1
    after = run(zero)
    parameter.data = values
    return not _are_close(after, before)


def _are_close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= CLOSE * one.abs().max())


# ---- biases


@dataclass(frozen=True)
class Bias:
    """A parameter that is added.

    `follows` names the weight to whose product it is added, if it is one's. `part` is "norm" for the bias of a
    normalisation layer, "attention" for any other in an attention, "mlp" for the rest; "outside" is what no block
    holds.
    """

    name: str
    part: str
    follows: str | None


def find_biases(backbone: Backbone) -> list[Bias]:
    """The biases outside the task head, in the model's order, from one forward pass; none where no example runs.

    Those that no gradient reaches are left out: a router's that only chooses experts, say.
    """
    anatomy, example = backbone.anatomy, backbone.example
    if example is None or anatomy.trace is None:
        return []
    with backbone.watchable(example) as (model, given):
        watcher = _Additions(model, anatomy)
        with evaluating(model), visible_attention(model), torch.no_grad(), watcher:
            model(**given)
    norms = {bias for norm in find_norms(backbone) for bias in norm.biases}
    return [
        Bias(name, _part(name, norms, anatomy), watcher.found[name])
        for name in watcher.names.values()
        if name in watcher.found and name not in anatomy.head and _is_used(name, anatomy)
    ]


def _part(name: str, norms: set[str], anatomy: Anatomy) -> str:
    if not anatomy.in_blocks(name):
        return "outside"
    if name in norms:
        return "norm"
    return "attention" if anatomy.attention_of(name) is not None else "mlp"


def _is_used(name: str, anatomy: Anatomy) -> bool:
    """Whether the output depends on it; where no gradient at all is seen in its block (a reversible one), it may."""
    used = anatomy.trace.used if anatomy.trace is not None else frozenset()
    block = anatomy.block_name_of(name) or ""
    return name in used or (name not in anatomy.idle and not any(is_within(other, block) for other in used))


class _Additions(TorchFunctionMode):
    """Notes each parameter that is added to something, and the product that it is added to."""

    def __init__(self, model: nn.Module, anatomy: Anatomy) -> None:
        super().__init__()
        self.model, self.anatomy = model, anatomy
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.weights = {owner: weight.name for weight in anatomy.weights.values() for owner in weight.owners}
        self.views = WeakIdKeyDictionary()  # tensor -> the parameter that it is a view of
        self.products = WeakIdKeyDictionary()  # tensor -> the weight that it is a product with
        self.found: dict[str, str | None] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`, then note what it adds."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        given, returned = list(tensors_in((*args, *kwargs.values()))), list(tensors_in((result,)))
        if given and returned:
            for added, others in _added(func, name, args, kwargs):
                self._note(added, others, returned[0])
            self._pass_on(name, given, returned)
        return result

    def _parameter(self, tensor: Tensor) -> str | None:
        found: str | None = self.names.get(id(tensor)) or self.views.get(tensor)
        return found

    def _note(self, added: Tensor, others: list[Tensor], result: Tensor) -> None:
        name = self._parameter(added)
        if name is not None and self._is_bias(name, added, result):
            owners = [self.weights.get(self._parameter(tensor) or "") for tensor in others]
            products = [*owners, *(self.products.get(tensor) for tensor in others)]
            self.found[name] = self.found.get(name) or next((weight for weight in products if weight), None)

    def _is_bias(self, name: str, added: Tensor, result: Tensor) -> bool:
        """A vector; a row for each expert; or (heads, size), repeated for every position."""
        parameter = self.model.get_parameter(name)
        own = [size for size in parameter.shape if size > 1]
        if len(own) < 2:
            return parameter.numel() > 1 or result.shape[-1] == 1
        per_expert = own[0] in self.anatomy.expert_counts and added.shape[-1] == own[-1]
        aligned = [1] * (result.ndim - added.ndim) + list(added.shape)
        is_repeated = any(size < full for size, full in zip(aligned, result.shape, strict=True))
        per_head = [size for size in added.shape if size > 1] == own and is_repeated
        return len(own) == 2 and (per_expert or per_head)

    def _pass_on(self, name: str, given: list[Tensor], returned: list[Tensor]) -> None:
        parameter, product = self._parameter(given[0]), self.products.get(given[0])
        if any(kind in name for kind in PRODUCTS):
            weights = [self.weights.get(self._parameter(tensor) or "") for tensor in given]
            product, parameter = next((weight for weight in weights if weight), None), None
        elif name not in VIEWS | EXPANDING:
            return
        for tensor in returned:
            if parameter is not None and id(tensor) not in self.names:
                self.views[tensor] = parameter
            if product is not None:
                self.products[tensor] = product


def _added(
    func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """(what `func` adds, what it adds it to)."""
    named = dict(zip(_argument_names(func), args, strict=False)) | dict(kwargs)
    tensors = [value for value in named.values() if isinstance(value, Tensor)]
    if name in ADDITIONS and len(tensors) >= 2:
        yield tensors[0], tensors[1:2]
        yield tensors[1], tensors[:1]
    elif name in ADDED_FIRST and tensors:
        yield tensors[0], tensors[1:]
    else:
        for key, value in named.items():
            if isinstance(value, Tensor) and (key == "bias" or key.endswith("_bias")):
                yield value, [tensor for tensor in tensors if tensor is not value]


@cache
def _argument_names(func: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a torch function's arguments: of Python's signature, or of the operator's schema."""
    try:
        return tuple(inspect.signature(func).parameters)
    except (TypeError, ValueError):
        operator = getattr(torch.ops.aten, getattr(func, "__name__", "").removesuffix("_"), None)
    if operator is None:
        return tuple(str(position) for position in range(8))
    schema = getattr(operator, operator.overloads()[0])._schema
    return tuple(argument.name for argument in schema.arguments)
