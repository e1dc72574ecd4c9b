"""What of a model grows with its vocabulary: tables with an entry for each token, and what holds their number.

Found by letting transformers resize a copy that has shapes and no values, and looking at what became larger. So
whatever a model does for itself when it is resized (a bias beside the head, a table for each layer) is known. The
model itself grows in place: its modules, its parameters and their ties stay what they are.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from lightsft.dry_run import input_embeddings, tensors_in
from lightsft.errors import TargetError
from lightsft.quiet import quiet


@dataclass(frozen=True)
class Table:
    """A tensor with an entry for each token along `dimension`; `owners` holds every name of it.

    The first owner's name is the table's own. A buffer is not trained.
    """

    owners: tuple[str, ...]
    dimension: int
    buffer: bool = False

    @property
    def name(self) -> str:
        """Its first name."""
        return self.owners[0]

    def of(self, model: nn.Module) -> Tensor:
        """The tensor itself."""
        owner, _, attribute = self.name.rpartition(".")
        module = model.get_submodule(owner)
        tensor = module._buffers[attribute] if self.buffer else module._parameters[attribute]
        assert tensor is not None
        return tensor

    def by_token(self, model: nn.Module) -> Tensor:
        """The tensor as (tokens, ...)."""
        return self.of(model).movedim(self.dimension, 0)


@dataclass(frozen=True)
class Count:
    """An attribute that holds the number of tokens; `before` is None where resizing is what first sets it."""

    holder: Any  # a module or a configuration
    key: str
    before: int | None


@dataclass(frozen=True)
class Vocabulary:
    """The `tables` of a model with `size` tokens, its input `embedding`, and the `counts` of them.

    `cannot_grow` says why there can be no more of them, where that is so.
    """

    size: int
    embedding: str
    tables: tuple[Table, ...]
    counts: tuple[Count, ...]
    cannot_grow: str = ""

    def declare(self, size: int) -> None:
        """Say that there are `size` tokens, as resizing does; with the model's own size, as it was."""
        for count in self.counts:
            attributes = vars(count.holder)
            if size != self.size:
                attributes[count.key] = size
            elif count.before is None:
                attributes.pop(count.key, None)
            else:
                attributes[count.key] = count.before

    @torch.no_grad()
    def grow(self, model: nn.Module, size: int) -> None:
        """Give every table of `model` room for `size` tokens; new entries are zero."""
        for table in self.tables:
            tensor = table.of(model)
            shape = list(tensor.shape)
            shape[table.dimension] = size - self.size
            tensor.data = torch.cat([tensor.data, tensor.new_zeros(shape)], dim=table.dimension)
        self.declare(size)


def find_vocabulary(model: PreTrainedModel) -> Vocabulary:
    """The vocabulary of `model`. Raises TargetError if it looks no tokens up."""
    embedding = input_embeddings(model)
    weight = getattr(embedding, "weight", None)
    if not isinstance(embedding, nn.Module) or not isinstance(weight, Tensor) or weight.ndim != 2:
        raise TargetError(
            f"{type(model).__name__} looks no tokens up in a table",
            expected="a model that reads tokens of a vocabulary",
        )
    size, name = len(weight), next(name for name, module in model.named_modules() if module is embedding)
    try:
        tables, counts = _grown(model, size)
    except Exception as error:  # whatever a model's own code raises
        reason = str(error) if isinstance(error, _CannotGrow) else f"{type(error).__name__}: {error}"
        return Vocabulary(size, name, tuple(_ends(model, size)), (), cannot_grow=reason)
    return Vocabulary(size, name, tables, counts)


class _CannotGrow(Exception):
    """Why a model cannot have more tokens."""


def _grown(model: PreTrainedModel, size: int) -> tuple[tuple[Table, ...], tuple[Count, ...]]:
    """What becomes larger with one more token."""
    larger = _without_values(model)
    _resize(larger, size + 1)
    tables = tuple(_tables(model, larger, size))
    return tables, (*_counts(model, larger, size), *_forgotten(model, larger, size))


def _ends(model: PreTrainedModel, size: int) -> Iterator[Table]:
    """The tables of the input and output embeddings, and the head's bias."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    ends = [module for module in (input_embeddings(model), model.get_output_embeddings()) if module is not None]
    found = {id(p): p for module in ends for p in module.parameters(recurse=False) if len(p) == size}
    yield from (Table(tuple(names[key]), 0) for key in found)


def _resize(model: PreTrainedModel, size: int) -> None:
    """Let transformers resize a copy without values; new entries get none."""
    for name in (name for name in dir(model) if name.startswith("_init_added")):  # means and covariances of entries
        vars(model)[name] = _nothing
    takes = inspect.signature(model.resize_token_embeddings).parameters
    with quiet(), torch.random.fork_rng(devices=[]):
        model.resize_token_embeddings(size, **({"mean_resizing": False} if "mean_resizing" in takes else {}))


def _nothing(*args: Any) -> None:
    pass


def _without_values(model: PreTrainedModel) -> PreTrainedModel:
    """A copy on the meta device, with the same ties between tensors."""
    memo: dict[int, Any] = {id(p): nn.Parameter(_shape_of(p), p.requires_grad) for p in model.parameters()}
    memo |= {id(b): _shape_of(b) for b in model.buffers()}
    kept = (tensor for module in model.modules() for tensor in tensors_in(vars(module).values()))  # a state, a cache
    memo |= {id(tensor): _shape_of(tensor) for tensor in kept if id(tensor) not in memo}
    return copy.deepcopy(model, memo)


def _shape_of(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """By every name, without what strategies have placed."""
    for named in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        yield from ((name, tensor) for name, tensor in named if "lightsft" not in name)


def _tables(model: nn.Module, larger: nn.Module, size: int) -> Iterator[Table]:
    """What became larger, or was lost: transformers forgets a bias that no layer owns, a checkpoint must not."""
    owners: dict[int, list[str]] = {}
    tensors, grown = dict(_named_tensors(model)), dict(_named_tensors(larger))
    for name, tensor in tensors.items():
        if grown[name].shape != tensor.shape if name in grown else size in tensor.shape:
            owners.setdefault(id(tensor), []).append(name)
    for names in owners.values():
        before, after = tensors[names[0]], grown.get(names[0])
        fitting = [d for d in range(before.ndim) if _is_one_larger(before.shape, d, size, after)]
        if not fitting:
            raise _CannotGrow(f"{names[0]} has another number of tokens than the {size} of its embedding")
        yield Table(tuple(names), fitting[0], buffer=not isinstance(before, nn.Parameter))


def _is_one_larger(shape: torch.Size, dimension: int, size: int, after: Tensor | None) -> bool:
    """Whether there is one entry per token along `dimension`, and one more `after`, where that is known."""
    larger = (*shape[:dimension], size + 1, *shape[dimension + 1 :])
    return shape[dimension] == size and (after is None or tuple(after.shape) == larger)


def _counts(model: PreTrainedModel, larger: PreTrainedModel, size: int) -> Iterator[Count]:
    seen: set[int] = set()
    for one, other in _pairs(model, larger):
        before, after = vars(one), vars(other)
        if id(one) not in seen:
            seen.add(id(one))
            for key, value in after.items():
                if type(value) is int and value == size + 1 and before.get(key) in (None, size):
                    yield Count(one, key, before.get(key))


def _forgotten(model: PreTrainedModel, larger: PreTrainedModel, size: int) -> Iterator[Count]:
    """Sizes in the configuration that transformers leaves as they were, and without which a checkpoint fails to load.

    Raises _CannotGrow if it fails to load with them too.
    """
    if _loads(larger) or not _loads(model):
        return
    for one, other in _configurations(model.config, larger.config):
        for key, value in vars(other).items():
            if key.endswith("vocab_size") and value == size:
                vars(other)[key] = size + 1
                yield Count(one, key, size)
    if not _loads(larger):
        raise _CannotGrow("its configuration cannot say so, and a larger checkpoint would not load")


def _loads(model: PreTrainedModel) -> bool:
    """Whether a model made from the configuration has tensors of the same shapes."""
    try:
        with quiet(), torch.device("meta"):
            made = type(model)(copy.deepcopy(model.config))
    except Exception:  # whatever a model's or a configuration's own code raises
        return False
    own = dict(_named_tensors(model))
    return all(own[name].shape == tensor.shape for name, tensor in _named_tensors(made) if name in own)


def _pairs(model: nn.Module, larger: nn.Module) -> Iterator[tuple[Any, Any]]:
    """Modules and configurations, each with its like in the copy."""
    others = dict(larger.named_modules())
    for name, module in model.named_modules():
        if name in others:
            yield module, others[name]
            yield from _configurations(getattr(module, "config", None), getattr(others[name], "config", None))


def _configurations(one: Any, other: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(one, PreTrainedConfig) and isinstance(other, PreTrainedConfig):
        yield one, other
        for key, value in vars(one).items():
            yield from _configurations(value, vars(other).get(key))
