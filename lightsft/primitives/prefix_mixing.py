"""A prefix for attention that is written out as torch functions instead of going through transformers' registry.

Attention over [P_k; K] and [P_v; V] is a mixture of attention over each part (2110.04366, equation 5):

    A = (1 - w) softmax(S) V + w softmax(S_p) P_v,    w = sum exp(S_p) / (sum exp(S) + sum exp(S_p)),    S_p = c Q P_k^T

with S the scores as the model made them, masks and position biases included, and c whatever they were scaled by. So it
is enough to watch three steps inside the module: a product of two activations (Q K^T), a softmax over something made
of it, and the product of that with V, whose result is replaced by A. A fused attention function gets longer keys and
values instead. Dropout on attention weights leaves those of the prefix alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from lightsft.dry_run import tensors_in
from lightsft.trace import VIEWS

KeysAndValues = tuple[Tensor, Tensor]
Record = Callable[[Tensor, Tensor, int], None]  # keys and values, each (heads, length, size); length of the queries
_PRODUCTS = frozenset({"matmul", "__matmul__", "bmm", "baddbmm", "einsum"})
_TIMES = frozenset({"mul", "__mul__", "__rmul__", "mul_", "__imul__", "multiply"})
_OVER = frozenset({"div", "__truediv__", "div_", "__itruediv__", "true_divide", "divide"})


@dataclass(frozen=True)
class _Scores:
    """On a tensor (..., queries, keys): made of `queries` (..., queries, size) and `keys` (..., keys, size)."""

    queries: Tensor
    keys: Tensor
    scale: Any = 1.0


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
class _Compound:
    """On a product of attention weights with something made of others: neither scores nor weights (2102.03902)."""


@dataclass(frozen=True)
class _Product:
    """A product of two tensors in terms of labelled dimensions; (lead, i, j) x (lead, j, k) -> (lead, i, k)."""

    left: Tensor
    right: Tensor
    labels: tuple[str, str, str]
    scale: float = 1.0

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

    def values(self) -> tuple[Tensor, str] | None:
        """Right as (lead, shared, own) and the label of `own`, if left is (lead, rows, shared)."""
        left, right, out = self.labels
        own = [label for label in out if label not in left]
        if len(own) != 1 or left[-1] in out or left[-1] not in right:
            return None
        lead = "".join(label for label in left[:-2] if label in right)
        return _permuted(self.right, right, lead + left[-1] + own[0]), own[0]


class _Running(threading.local):
    """The modes that are open in this thread."""

    def __init__(self) -> None:
        self.modes: list[PrefixMixing] = []

    def innermost(self) -> PrefixMixing | None:
        return self.modes[-1] if self.modes else None


_running = _Running()


class PrefixMixing(TorchFunctionMode):
    """While it is open, attention in the running module also covers `prefix()`; or, with `record`, is reported."""

    def __init__(self, prefix: Callable[[], KeysAndValues] | None = None, record: Record | None = None) -> None:
        super().__init__()
        self.prefix, self.record = prefix, record
        self.marks = WeakIdKeyDictionary()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`; at the steps of an attention, do more."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if "scaled_dot_product_attention" in name and self is _running.innermost():
            return self._fused(func, *args, **kwargs)
        result = func(*args, **kwargs)
        if self is not _running.innermost() or not isinstance(result, Tensor | tuple | list):
            return result
        if name in _PRODUCTS and isinstance(result, Tensor):
            return self._multiplied(_product(name, args, kwargs), result)
        source = next((value for value in tensors_in(args) if value in self.marks), None)
        if source is None:
            return result
        mark = self.marks[source]
        if isinstance(mark, _Scores) and "softmax" in name and "log" not in name:
            self.marks[result] = self._weights(mark, source)
            return result
        for part in tensors_in((result,)):
            if part.shape == source.shape or name in ("cat", "concat") or (name in VIEWS and source is args[0]):
                self.marks[part] = _rescaled(mark, name, args, source)
        return result

    def __enter__(self) -> Self:
        """Be the innermost one: an attention around this one leaves its steps alone."""
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
                self.marks[result] = _Scores(*found, scale=product.scale)
        return result

    def _weights(self, scores: _Scores, tensor: Tensor) -> _Weights:
        """The share of the prefix beside the scores in `tensor`, and what attention over it alone gives."""
        if self.prefix is None:
            return _Weights(scores)
        keys, values = _for_heads(self.prefix(), scores.queries)
        by_head = _by_head(scores.queries, keys.shape[0])
        if (
            by_head is None
            or by_head.shape[-1] != keys.shape[-1]
            or tensor.shape[:-1].numel() != by_head[..., 0].numel()
        ):
            return _Weights(scores)  # another attention in the same module
        own = torch.einsum("bhis,hts->bhit", by_head, keys.to(by_head.dtype))
        own = own.reshape(*tensor.shape[:-1], keys.shape[1]) * scores.scale
        together = torch.logsumexp(tensor.float(), -1, keepdim=True)
        share = torch.sigmoid(torch.logsumexp(own.float(), -1, keepdim=True) - together)
        weights = torch.softmax(own.float(), -1).to(values.dtype).reshape(*by_head.shape[:-1], keys.shape[1])
        outcome = torch.einsum("bhit,htv->bhiv", weights, values)
        return _Weights(scores, share, outcome.reshape(*tensor.shape[:-1], values.shape[-1]))

    def _mixed(self, mark: _Weights, product: _Product, result: Tensor) -> Tensor:
        found = product.values()
        if found is None:
            return result
        values, own = found
        if self.record is not None:
            lead = product.left.shape[:-2]
            keys = mark.scores.keys
            self.record(_heads(keys, mark.scores.queries.shape[:-2]), _heads(values, lead), product.left.shape[-2])
        shape = product.left.shape[:-1]
        if mark.share is None or mark.outcome is None or mark.share.numel() != shape.numel():
            return result
        if mark.outcome.shape[-1] != values.shape[-1]:
            return result
        labels, out = product.labels[0][:-1] + own, product.labels[2]
        share = _permuted(mark.share.reshape(*shape, 1), labels, out).to(result.dtype)
        rest = result * (1 - share)
        if mark.mixed:
            return rest
        mark.mixed = True
        return rest + _permuted(mark.outcome.reshape(*shape, -1), labels, out).to(result.dtype) * share

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
        if key.dim() > 3 and key.shape[-3] == 1:  # one head of keys for all queries
            key, value = (t.expand(*query.shape[:-2], *t.shape[-2:]) for t in (key, value))
        if self.record is not None:
            self.record(_heads(key, key.shape[:-2]), _heads(value, value.shape[:-2]), query.shape[-2])
        if self.prefix is None:
            return func(query, key, value, attn_mask, dropout_p, is_causal, **options)
        keys, values = _for_heads(self.prefix(), key)
        if is_causal:
            attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        if attn_mask is not None:
            seen = True if attn_mask.dtype == torch.bool else 0.0
            attn_mask = nn.functional.pad(attn_mask, (keys.shape[1], 0), value=seen)
        return func(query, _prepended(keys, key), _prepended(values, value), attn_mask, dropout_p, **options)


def _product(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Product | None:
    """The operands of a product, whichever function made it."""
    if name == "einsum":
        operands = args[1] if isinstance(args[1], list | tuple) else args[1:]
        equation = args[0].replace(" ", "")
        if len(operands) != 2 or "->" not in equation or "." in equation:
            return None
        inputs, out = equation.split("->")
        left, right = inputs.split(",")
        return _Product(operands[0], operands[1], (left, right, out))
    if name == "baddbmm":
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        return _Product(tensors[-2], tensors[-1], ("aij", "ajk", "aik"), scale=kwargs.get("alpha", 1.0))
    left, right = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    if left.dim() < 3 or left.dim() != right.dim():
        return None
    lead = "abcdefgh"[: left.dim() - 2]
    return _Product(left, right, (f"{lead}ij", f"{lead}jk", f"{lead}ik"))


def _permuted(tensor: Tensor, labels: str, wanted: str) -> Tensor:
    return tensor.permute([labels.index(label) for label in wanted])


def _is_weight(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)


def _rescaled(mark: Any, name: str, args: tuple[Any, ...], source: Tensor) -> Any:
    """The mark after `name`: a factor that is the same for all keys also holds for the prefix."""
    if not isinstance(mark, _Scores) or name not in _TIMES | _OVER or len(args) < 2:
        return mark
    factor = args[1] if source is args[0] else args[0]
    if isinstance(factor, Tensor) and factor.dim() > 0 and factor.shape[-1] != 1:
        return mark
    return replace(mark, scale=mark.scale * factor if name in _TIMES else mark.scale / factor)


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


def _prepended(more: Tensor, tensor: Tensor) -> Tensor:
    """(heads, tokens, size) in front of (..., heads, length, size), or of (batch * heads, length, size)."""
    by_head = tensor.reshape(-1, more.shape[0], *tensor.shape[-2:])
    longer = torch.cat([more.to(tensor.dtype).expand(by_head.shape[0], -1, -1, -1), by_head], dim=2)
    return longer.reshape(*tensor.shape[:-2], longer.shape[2], tensor.shape[-1])
