"""A prefix for attention that is written out as torch functions instead of going through transformers' registry.

Attention over [P_k; K] and [P_v; V] is a mixture of attention over each part (2110.04366, equation 5):

    A = (1 - w) softmax(S) V + w softmax(S_p) P_v,   w = sum exp(S_p) / (sum exp(S) + sum exp(S_p)),   S_p = f(Q P_k^T)

with S the scores as the model made them of Q K^T, masks and position biases included, and f what it did to all keys
alike: a scale, a cap, a row's maximum subtracted. So it is enough to watch three steps inside the module: a product of
two activations (Q K^T), a softmax over something made of it, and the product of that with V, whose result is replaced
by A. A logsumexp of S (attention sinks are written with it) counts S_p in. A fused attention function gets longer keys
and values instead. Dropout on attention weights leaves those of the prefix alone.

torch's own multi-head attention shows its steps. A softmax in an autograd function of the model's own runs without a
graph, in which w would have no gradient: what follows from scores gets a graph there too.

The prefix gets no bias. But one that is the same for all queries (ALiBi, 2108.12409) tells distances by its differences
alone, and unless it is counted from the first key, it is another one with padding or with a cache. Then the prefix is
taken to be as near as the query itself.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from lightsft.dry_run import tensors_in
from lightsft.trace import ADDITIONS, COMPOSITES, VIEWS, in_steps

KeysAndValues = tuple[Tensor, Tensor]
Record = Callable[[Tensor, Tensor, int, bool], None]  # keys, values, each (heads, length, size); queries; key bias?
_PRODUCTS = frozenset({"matmul", "__matmul__", "bmm", "baddbmm", "einsum"})
_TIMES = frozenset({"mul", "__mul__", "__rmul__", "mul_", "__imul__", "multiply"})
_OVER = frozenset({"div", "__truediv__", "div_", "__itruediv__", "true_divide", "divide"})
_MINUS = frozenset({"sub", "__sub__", "sub_", "__isub__", "subtract"})
_JOINS = frozenset({"cat", "concat", "concatenate"})
_CAPS = frozenset({"tanh", "tanh_", "clamp", "clamp_", "clip", "clip_"})
_TURNS = frozenset({"__get__", "transpose", "permute", "t", "swapaxes", "movedim"})  # views in another order


@dataclass(frozen=True)
class _Scores:
    """On a tensor (..., queries, keys) made of `queries` (..., queries, size) and `keys` (..., keys, size).

    `changes` is what was done to all keys alike: functions of scores and of a number or a tensor (..., queries, 1).
    Where dimensions have changed places, `order` (..., queries, 1) counts the rows as they were.
    """

    queries: Tensor
    keys: Tensor
    changes: tuple[tuple[Callable[[Tensor, Any], Tensor], Any], ...] = ()
    order: Tensor | None = None
    key_bias: bool = False  # whether a term that is the same for all queries was added

    def changed(self, function: Callable[[Tensor, Any], Tensor], operand: Any) -> _Scores:
        """The mark after one more change."""
        return replace(self, changes=(*self.changes, (function, operand)))

    def of_prefix(self, scores: Tensor) -> Tensor:
        """The same changes on the scores (..., queries, tokens) of a prefix."""
        for function, operand in self.changes:
            scores = function(scores, _by_row(operand, scores))
        return scores


@dataclass
class _Weights:
    """On attention weights (..., queries, keys): the prefix's share w (..., queries, 1) and its own outcome.

    Weights that are cut in parts, each multiplied with the values of its part, carry one and the same mark; the sum
    of these products gets the outcome once.
    """

    scores: _Scores
    share: Tensor | None = None
    outcome: Tensor | None = None
    mixed: bool = False


@dataclass(frozen=True)
class _Maximum:
    """On the largest scores of each row: subtracted from these scores, it is one offset for all keys."""


@dataclass(frozen=True)
class _Compound:
    """On a product of attention weights with something made of others: neither scores nor weights (2102.03902)."""


@dataclass(frozen=True)
class _Product:
    """A product of two tensors in terms of labelled dimensions; (lead, i, j) x (lead, j, k) -> (lead, i, k)."""

    left: Tensor
    right: Tensor
    labels: tuple[str, str, str]
    scale: float = 1.0
    bias: Tensor | None = None

    def queries_and_keys(self) -> tuple[Tensor, Tensor] | None:
        """Left and right with the dimensions (lead, own, shared), if the product has one shared dimension."""
        left, right, out = self.labels
        shared = [label for label in left if label in right and label not in out]
        lead = [label for label in out if label in left and label in right]
        rows = [label for label in out if label in left and label not in right]
        columns = [label for label in out if label in right and label not in left]
        if len(shared) != 1 or len(rows) != 1 or len(columns) != 1 or out != "".join([*lead, *rows, *columns]):
            return None
        queries = _permuted(self.left, left, "".join([*lead, *rows, *shared]))
        return queries, _permuted(self.right, right, "".join([*lead, *columns, *shared]))

    def own_label(self) -> str | None:
        """The label of the right side's own dimension, if left is (..., rows, shared) and keeps all else."""
        left, right, out = self.labels
        own = [label for label in out if label not in left]
        kept = len(own) == 1 and left[-1] in right and sorted(out) == sorted(left[:-1] + own[0])
        return own[0] if kept else None

    def values(self) -> Tensor | None:
        """Right as (lead, shared, own), unless it differs between rows."""
        left, right, _ = self.labels
        wanted = "".join(label for label in left[:-2] if label in right) + left[-1] + (self.own_label() or "")
        return _permuted(self.right, right, wanted) if len(wanted) == len(right) else None


@dataclass(frozen=True)
class _Step:
    """A call of a torch function that is no product."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        return getattr(self.func, "__name__", "")

    @property
    def given(self) -> tuple[Any, ...]:
        """All arguments, positional ones first."""
        return (*self.args, *self.kwargs.values())

    @property
    def dim(self) -> Any:
        """The dimension that a reduction is over."""
        return self.kwargs.get("dim", self.given[1] if len(self.given) > 1 else None)

    def on_others(self) -> Callable[[Tensor], Tensor]:
        """The same call with another first argument."""
        rest, named = (self.args[1:], self.kwargs) if self.args else ((), dict([*self.kwargs.items()][1:]))
        func = self.func
        return lambda tensor: func(tensor, *rest, **named)


class _Running(threading.local):
    """The modes that are open in this thread."""

    def __init__(self) -> None:
        self.modes: list[PrefixMixing] = []

    def innermost(self) -> PrefixMixing | None:
        return self.modes[-1] if self.modes else None


_running = _Running()


class PrefixMixing(TorchFunctionMode):
    """While it is open, attention in the running module also covers `prefix()`; or, with `record`, is reported.

    `key_bias` tells what was reported of the module: whether scores get a bias that is the same for all queries.
    """

    def __init__(
        self,
        prefix: Callable[[], KeysAndValues] | None = None,
        record: Record | None = None,
        *,
        key_bias: bool = False,
    ) -> None:
        super().__init__()
        self.prefix, self.record, self.key_bias = prefix, record, key_bias
        self.marks = WeakIdKeyDictionary()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`; at the steps of an attention, do more."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in COMPOSITES:
            return in_steps(self, func, args, kwargs)
        if self is not _running.innermost():
            return func(*args, **kwargs)
        if "scaled_dot_product_attention" in name:
            return self._fused(func, *args, **kwargs)
        if name in _PRODUCTS:
            result = func(*args, **kwargs)
            return self._multiplied(_product(name, args, kwargs), result) if isinstance(result, Tensor) else result
        step = _Step(func, args, kwargs)
        source = self._source(step)
        if source is None:
            return func(*args, **kwargs)
        with torch.set_grad_enabled(self.differentiated or torch.is_grad_enabled()):
            return self._followed(step, source, func(*args, **kwargs))

    def _source(self, step: _Step) -> Tensor | None:
        """The first argument with a mark; a row's maximum comes after what it is subtracted from."""
        marked = [value for value in tensors_in(step.given) if value in self.marks]
        return next((t for t in marked if not isinstance(self.marks[t], _Maximum)), marked[0] if marked else None)

    def _followed(self, step: _Step, source: Tensor, result: Any) -> Any:
        """The result, with a mark where it was made of `source`."""
        mark, name = self.marks[source], step.name
        if isinstance(mark, _Scores) and "softmax" in name and "log" not in name:
            if step.dim in (-1, source.dim() - 1):
                self.marks[result] = self._weights(mark, source)
            return result
        if isinstance(mark, _Scores) and name == "logsumexp":
            return self._counted_in(mark, source, result)
        is_maximum = name == "amax" or (name == "max" and not isinstance(step.dim, Tensor))
        for part in tensors_in((result,)):
            if isinstance(mark, _Scores) and is_maximum:
                self.marks[part] = _Maximum()
            elif part.shape == source.shape or name in _JOINS or (name in VIEWS and source is step.given[0]):
                after = self._after(mark, step, source, part)
                if after is not None:
                    self.marks[part] = after
        return result

    def _after(self, mark: Any, step: _Step, source: Tensor, part: Tensor) -> Any:
        """The mark of `part` after one step; None if the rows of `source` are not all there.

        A factor or an offset that is the same for all keys also holds for the prefix.
        """
        if step.name in _TURNS and part.stride() != source.stride():
            return _turned(mark, step, source, part)
        if isinstance(mark, _Scores | _Weights) and part.shape[:-1].numel() != source.shape[:-1].numel():
            return None
        if not isinstance(mark, _Scores):
            return mark
        if step.name in _CAPS:
            cap = step.on_others()
            return mark.changed(lambda scores, _: cap(scores), None)
        if len(step.given) < 2:
            return mark
        other = step.given[1] if source is step.given[0] else step.given[0]
        if step.name in _MINUS and isinstance(other, Tensor) and isinstance(self.marks.get(other), _Maximum):
            return mark.changed(operator.sub, _by_row(other, source))
        if step.name in ADDITIONS and isinstance(other, Tensor) and other not in self.marks:
            return self._biased(mark, other, source)
        if step.name not in _TIMES | _OVER or (isinstance(other, Tensor) and other.dim() > 0 and other.shape[-1] != 1):
            return mark
        return mark.changed(operator.mul if step.name in _TIMES else operator.truediv, _by_row(other, source))

    def __enter__(self) -> Self:
        """Be the innermost one: an attention around this one leaves its steps alone."""
        self.differentiated = torch.is_grad_enabled()
        _running.modes.append(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        """The one around it is the innermost again."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        _running.modes.remove(self)

    def _multiplied(self, product: _Product | None, result: Tensor) -> Tensor:
        if product is None:
            return result
        mark = self.marks.get(product.left)
        if isinstance(mark, _Compound) or isinstance(self.marks.get(product.right), _Compound | _Weights):
            self.marks[result] = _Compound()
            return result
        if isinstance(mark, _Weights):
            return self._mixed(mark, product, result)
        if not _is_weight(product.left) and not _is_weight(product.right):
            found = product.queries_and_keys()
            if found is not None:
                scores = _Scores(*found).changed(operator.mul, product.scale)
                self.marks[result] = scores if product.bias is None else self._biased(scores, product.bias, result)
        return result

    def _biased(self, mark: _Scores, bias: Tensor, scores: Tensor) -> _Scores:
        """The mark of `scores` plus `bias`. One for all queries is taken for the prefix at the query's own place."""
        queries, keys = scores.shape[-2:]
        if bias.dim() < 2 or bias.shape[-2] != 1 or bias.shape[-1] != keys or keys < queries:
            return mark
        if self.record is not None:
            return replace(mark, key_bias=mark.key_bias or (queries > 1 and _tells_keys_apart(bias)))
        if not self.key_bias:
            return mark
        return mark.changed(operator.add, _by_row(bias[..., -queries:].transpose(-1, -2), scores))

    @cached_property
    def _keys_and_values(self) -> KeysAndValues | None:
        """The prefix, made once for this call of the module."""
        return None if self.prefix is None else self.prefix()

    def _weights(self, scores: _Scores, tensor: Tensor) -> _Weights:
        """The share of the prefix beside the scores in `tensor`, and its outcome."""
        alone = self._alone(scores, tensor)
        if alone is None:
            return _Weights(scores)
        total, outcome = alone
        return _Weights(scores, torch.sigmoid(total - torch.logsumexp(_wide(tensor), -1, keepdim=True)), outcome)

    def _counted_in(self, scores: _Scores, tensor: Tensor, total: Tensor) -> Tensor:
        """The logsumexp of scores and prefix, given that of the scores."""
        alone = self._alone(scores, tensor)
        if alone is None or total.numel() != alone[0].numel():
            return total
        return torch.logaddexp(_wide(total), alone[0].reshape(total.shape)).to(total.dtype)

    def _alone(self, scores: _Scores, tensor: Tensor) -> tuple[Tensor, Tensor] | None:
        """Attention over the prefix alone, in the layout of `tensor`: logsumexp of its scores (..., 1), its outcome."""
        if self._keys_and_values is None:
            return None
        keys, values = _for_heads(self._keys_and_values, scores.queries)
        queries = _by_head(scores.queries, keys.shape[0])
        rows = tensor.shape[:-1]
        if queries is None or queries.shape[-1] != keys.shape[-1] or rows.numel() != queries[..., 0].numel():
            return None  # another attention in the same module
        own = torch.einsum("bhis,hts->bhit", queries, keys.to(queries.dtype)).flatten(0, 2)
        order = None if scores.order is None else scores.order.flatten()
        own = _wide(scores.of_prefix(_in_order(own, order).reshape(*rows, -1)))
        weights = torch.softmax(own, -1).to(values.dtype).flatten(0, -2)
        weights = _in_order(weights, None if order is None else order.argsort()).reshape(*queries.shape[:-1], -1)
        outcome = _in_order(torch.einsum("bhit,htv->bhiv", weights, values).flatten(0, 2), order)
        return torch.logsumexp(own, -1, keepdim=True), outcome.reshape(*rows, -1)

    def _mixed(self, mark: _Weights, product: _Product, result: Tensor) -> Tensor:
        """(1 - w) times what weights and values gave, and once w times the outcome of the prefix."""
        own, values = product.own_label(), product.values()
        if own is None:
            return result
        rows = product.left.shape[:-1]
        if self.record is not None and values is not None:
            queries, keys = mark.scores.queries, mark.scores.keys
            both = _heads(keys, queries.shape[:-2]), _heads(values, rows[:-1])
            self.record(*both, rows[-1], mark.scores.key_bias)
        if mark.share is None or mark.outcome is None or mark.share.numel() != rows.numel():
            return result
        labels, out = product.labels[0][:-1] + own, product.labels[2]
        share = _permuted(mark.share.reshape(*rows, 1), labels, out)
        rest = result * (1 - share).to(result.dtype)
        if mark.mixed or values is None or mark.outcome.shape[-1] != values.shape[-1]:
            return rest
        mark.mixed = True
        outcome = _permuted(mark.outcome.reshape(*rows, -1), labels, out)
        return rest + outcome.to(result.dtype) * share.to(result.dtype)

    def _fused(
        self,
        func: Callable[..., Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        """A fused attention: longer keys and values, and a mask whose new columns every query sees."""
        given = key, value
        if key.dim() > 3 and key.shape[-3] == 1:  # one head of keys for all queries
            key, value = (t.expand(*query.shape[:-2], *t.shape[-2:]) for t in (key, value))
        if self.record is not None:
            self.record(_heads(key, key.shape[:-2]), _heads(value, value.shape[:-2]), query.shape[-2], False)
        if self._keys_and_values is None or not _fits(self._keys_and_values, key, value):
            return func(query, *given, attn_mask, dropout_p, is_causal, **options)
        keys, values = _for_heads(self._keys_and_values, key)
        if is_causal:
            attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        if attn_mask is not None:
            seen = True if attn_mask.dtype == torch.bool else 0.0
            attn_mask = attn_mask.expand(*attn_mask.shape[:-1], key.shape[-2])
            attn_mask = nn.functional.pad(attn_mask, (keys.shape[1], 0), value=seen)
        return func(query, _prepended(keys, key), _prepended(values, value), attn_mask, dropout_p, **options)


def _product(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Product | None:
    """The operands of a product, whichever function made it."""
    if name == "einsum":
        operands = args[1] if isinstance(args[1], list | tuple) else args[1:]
        equation = args[0].replace(" ", "")
        if len(operands) != 2 or "->" not in equation:
            return None
        inputs, out = equation.split("->")
        left, right = inputs.split(",")
        if "..." in equation:  # one dimension at most: of more, which one is the heads'?
            if any(operand.dim() != len(labels) - 2 for operand, labels in zip(operands, (left, right), strict=True)):
                return None
            left, right, out = (labels.replace("...", "*") for labels in (left, right, out))
        return _Product(operands[0], operands[1], (left, right, out))
    if name == "baddbmm":
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        bias = tensors[0] * kwargs.get("beta", 1.0)
        return _Product(tensors[-2], tensors[-1], ("aij", "ajk", "aik"), kwargs.get("alpha", 1.0), bias)
    left, right = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    if left.dim() < 3 or left.dim() != right.dim():
        return None
    lead = "abcdefgh"[: left.dim() - 2]
    return _Product(left, right, (f"{lead}ij", f"{lead}jk", f"{lead}ik"))


def _permuted(tensor: Tensor, labels: str, wanted: str) -> Tensor:
    return tensor.permute([labels.index(label) for label in wanted])


def _is_weight(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)


def _wide(tensor: Tensor) -> Tensor:
    """In fp32 at least."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def _tells_keys_apart(bias: Tensor) -> bool:
    """Whether it differs between keys, is not counted from the first one, and is no mask."""
    return bool((bias > -1e4).all() and (bias.amax(-1) > bias.amin(-1)).any() and bias[..., 0].any())


def _by_row(value: Any, tensor: Tensor) -> Any:
    """A number as it is; a tensor of one value for each row of `tensor`, or fewer, as (..., rows, 1)."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    rows = (*tensor.shape[:-1], 1)
    return value.reshape(rows) if value.numel() == tensor.shape[:-1].numel() else value.expand(rows)


def _in_order(tensor: Tensor, order: Tensor | None) -> Tensor:
    return tensor if order is None else tensor[order]


def _turned(mark: Any, step: _Step, source: Tensor, part: Tensor) -> Any:
    """The mark after dimensions of `source` have changed places. Had that of the keys, what follows is no attention."""
    if not isinstance(mark, _Scores | _Weights):
        return mark
    rows, turn = source.shape[:-1], step.on_others()

    def turned(value: Any) -> Any:
        is_by_row = isinstance(value, Tensor) and value.dim() > 0
        return turn(value.reshape(*rows, -1)) if is_by_row else value

    order = turned(torch.arange(rows.numel(), device=source.device))
    if order.shape != (*part.shape[:-1], 1):
        return None if isinstance(mark, _Scores) else _Compound()
    if isinstance(mark, _Weights):
        return replace(mark, share=turned(mark.share), outcome=turned(mark.outcome))
    if mark.order is not None:
        order = turned(mark.order)
    return replace(mark, order=order, changes=tuple((function, turned(value)) for function, value in mark.changes))


def _heads(tensor: Tensor, lead: torch.Size) -> Tensor:
    """(heads, length, size) of the first example: heads are the second dimension, or the first of three."""
    full = tensor.expand(*lead, *tensor.shape[-2:]) if tensor.dim() == len(lead) + 2 else tensor
    return full if full.dim() == 3 else full[0].flatten(1, -2)


def _for_heads(prefix: KeysAndValues, tensor: Tensor) -> KeysAndValues:
    """Keys and values repeated where the module has repeated its own: one for each group of heads of `tensor`."""
    keys, values = prefix
    heads = tensor.shape[1] if tensor.dim() == 4 else keys.shape[0]
    if heads <= keys.shape[0] or heads % keys.shape[0]:
        return prefix
    times = heads // keys.shape[0]
    return keys.repeat_interleave(times, 0), values.repeat_interleave(times, 0)


def _by_head(queries: Tensor, heads: int) -> Tensor | None:
    """(batch, heads, length, size), of (batch, heads, ..., length, size) or of (..., heads, length, size)."""
    lead, (length, size) = queries.shape[:-2], queries.shape[-2:]
    if len(lead) > 1 and lead[1] == heads:
        return queries.reshape(lead[0], heads, -1, size)
    return queries.reshape(-1, heads, length, size) if lead.numel() % heads == 0 else None


def _fits(prefix: KeysAndValues, key: Tensor, value: Tensor) -> bool:
    """Whether keys and values are those that the prefix was made for, not another attention's in the same module."""
    heads, _, size = prefix[0].shape
    in_heads = key.dim() > 2 and key.shape[:-2].numel() % heads == 0
    return in_heads and (size, prefix[1].shape[-1]) == (key.shape[-1], value.shape[-1])


def _prepended(more: Tensor, tensor: Tensor) -> Tensor:
    """(heads, tokens, size) in front of (batch, heads, ..., length, size) or of (..., heads, length, size)."""
    lead, (heads, *rest) = tensor.shape[:-2], more.shape
    if len(lead) > 1 and lead[1] == heads:
        more = more.reshape(heads, *[1] * (len(lead) - 2), *rest).expand(*lead, *rest)
    else:
        more = more.expand(lead.numel() // heads, heads, *rest).reshape(*lead, *rest)
    return torch.cat([more.to(tensor.dtype), tensor], dim=-2)
