"""Trained rows: some entries of a vocabulary's tables, and entries beyond their end.

    E'[id_k] = R_k for each trained token id_k, E'[id] = E[id] for every other

R (tokens, ...), fp32, for each table: one for embedding and head where they are tied, one for each where they are not,
one for a head's bias. Nothing is resized before `merge`, and no table is copied in a forward pass:

embedding   looks up the tokens it knows; the others' vectors are put in their places afterwards
head        computes the logits it knows; the others' are put beside them
elsewhere   (a table that is multiplied with without calling its layer, a bias that is added by hand) the whole table is
            put together, while the module that reads it runs

What an embedding or a head does with its weight besides (scales, norms) it does with R too: its own code runs with R
as its weight. Disabled, new tokens are still looked up, as they were at the start, and have no logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightsft.anatomy import Anatomy, Weight
from lightsft.dry_run import tensors_in
from lightsft.errors import InjectionError, TargetError
from lightsft.primitives.base import Part, Primitive, drop_hook, drop_pre_hook
from lightsft.primitives.side import first_output, with_first_output
from lightsft.row_changes import RowChange, Rows, as_matrix
from lightsft.trace import nearest_called
from lightsft.vocabulary import Table, Vocabulary

ROWS, SERVED = "lightsft_rows", "lightsft_served"
_ABSENT = object()


class TrainedRows(Part):
    """R for each table, in the order of the tokens; `ids` says which tokens these are."""

    mergeable = True
    rehearsing: bool = False  # every token is looked up as one of the trained ones
    ids: Tensor
    in_order: Tensor
    sorted_ids: Tensor

    def __init__(self, size: int, ids: Sequence[int], starts: Sequence[Tensor]) -> None:
        """`size` tokens are the backbone's own; `starts` holds one tensor (tokens, ...) for each table."""
        super().__init__()
        self.size = size
        self.rows = nn.ParameterList([nn.Parameter(start.float().contiguous()) for start in starts])
        for number, start in enumerate(starts):
            self.register_buffer(f"start_{number}", start.float().clone(), persistent=False)
        self.place(ids)

    def place(self, ids: Sequence[int]) -> None:
        """Say which tokens the rows belong to. Those beyond the backbone's own must follow each other from there."""
        beyond = sorted(i for i in ids if i >= self.size)
        if len(set(ids)) < len(ids) or min(ids) < 0 or beyond != list(range(self.size, self.size + len(beyond))):
            raise TargetError(
                f"rows for the tokens {sorted(ids)} of a vocabulary of {self.size}",
                expected=f"each once, and new ones counted on from {self.size}",
                todo="resize the model to its tokenizer first: model.resize_token_embeddings(len(tokenizer))",
            )
        self.placed, self.added, self.known = tuple(ids), len(beyond), sorted(set(ids) - set(beyond))
        values = torch.tensor(ids, device=self.rows[0].device)
        ascending, order = values.sort()
        for name, value in {"ids": values, "sorted_ids": ascending, "in_order": order}.items():
            self.register_buffer(name, value, persistent=False)

    def make_again(self) -> None:
        """The ids."""
        self.place(self.placed)

    @property
    def total(self) -> int:
        """Tokens of the backbone and new ones."""
        return self.size + self.added

    def sorted_rows(self, table: int) -> Tensor:
        """(tokens, ...) by ascending id; when disabled, as they were at the start."""
        start: Tensor = getattr(self, f"start_{table}")
        rows = self.rows[table] if self.enabled else start
        return rows.index_select(0, self.in_order)

    def find(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(which of these are trained tokens, the place of each among the sorted ids); both of the shape of `ids`."""
        count = len(self.sorted_ids)
        if self.rehearsing and self.enabled:
            places = torch.arange(ids.numel(), device=ids.device) % count
            return torch.ones_like(ids, dtype=torch.bool), places.view(ids.shape)
        places = torch.searchsorted(self.sorted_ids, ids.long().contiguous()).clamp_max(count - 1)
        found = self.sorted_ids[places] == ids
        return (found if self.enabled else found & (ids >= self.size)), places

    def join(self, whole: Tensor, rows: Tensor, dimension: int) -> Tensor:
        """`whole` (..., size, ...) with `rows` (..., tokens, ...), by ascending id, in their places or behind it."""
        known, new = rows.tensor_split([len(self.known)], dim=dimension)
        if self.known:
            whole = whole.index_copy(dimension, self.sorted_ids[: len(self.known)], known.to(whole.dtype))
        return torch.cat([whole, new.to(whole.dtype)], dim=dimension) if self.added else whole


@dataclass
class _Served:
    """What a module finds under SERVED: the rows, and for which of its attributes they are."""

    part: TrainedRows
    tables: dict[str, tuple[int, int]] = field(default_factory=dict)  # attribute -> (table, dimension)
    asked: Tensor | None = None  # the ids of the running call


class PlacedRows(Primitive):
    """Trained rows on every table of a model's vocabulary."""

    def __init__(
        self,
        model: PreTrainedModel,
        vocabulary: Vocabulary,
        anatomy: Anatomy,
        ids: Sequence[int],
        starts: Mapping[str, Tensor],
        *,
        keep_ids: bool = False,
    ) -> None:
        """`starts` by the tables' names, (tokens, ...). With `keep_ids`, loading leaves the tokens' ids as they are."""
        self.name, self.model, self.vocabulary, self.keep_ids = vocabulary.embedding, model, vocabulary, keep_ids
        self.tables = vocabulary.tables
        self._trained = [number for number, table in enumerate(self.tables) if _is_used(table, anatomy)]
        if vocabulary.cannot_grow and max(ids) >= vocabulary.size:
            raise TargetError(
                f"the vocabulary of {type(model).__name__} cannot grow: {vocabulary.cannot_grow}",
                expected="a model that transformers can resize (resize_token_embeddings)",
                todo="train rows of tokens that it has already: new_tokens(rows=[...])",
            )
        part = TrainedRows(vocabulary.size, ids, [starts[table.name] for table in self.tables])
        for number, rows in enumerate(part.rows):
            rows.requires_grad_(number in self._trained)
        holder = model.get_submodule(self.name)
        if ROWS in holder._modules:
            raise InjectionError(f"{self.name} already carries trained rows", expected="one set of them")
        holder.add_module(ROWS, part.to(self.tables[0].of(model).device).train(holder.training))
        self._uses = tuple(_uses(model, self.tables, anatomy))
        for use in self._uses:
            use.connect(model, part)
        vocabulary.declare(part.total)

    @property
    def part(self) -> TrainedRows:
        """The rows, a child of the input embedding."""
        part = self.model.get_submodule(self.name)._modules[ROWS]
        assert isinstance(part, TrainedRows)
        return part

    # ---- what is trained and saved

    def trainable(self) -> dict[str, nn.Parameter]:
        """The rows of each table, but for buffers and for what no output depends on."""
        return {f"{self.tables[number].name}.rows": self.part.rows[number] for number in self._trained}

    def sites(self) -> dict[str, str]:
        """The first module that reads each table."""
        first = {use.table: use.reader for use in reversed(self._uses)}
        return {f"{self.tables[number].name}.rows": first.get(number, self.name) for number in self._trained}

    def leave(self, names: list[str]) -> None:
        """Stop training rows of a table that is never read; they stay as they started."""
        for number in [n for n in self._trained if f"{self.tables[n].name}.rows" in names]:
            self.part.rows[number].requires_grad_(False)
            self._trained.remove(number)

    def tensors(self) -> dict[str, Tensor]:
        """The rows, and the tokens' ids."""
        rows = {name: parameter.detach() for name, parameter in self.trainable().items()}
        return {**rows, self._ids_name: self.part.ids}

    @property
    def _ids_name(self) -> str:
        return f"{self.name}.token_ids"

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Copy the rows, and take the ids that they had unless a tokenizer has given them."""
        if not self.keep_ids:
            self.part.place(tensors[self._ids_name].tolist())
            self.vocabulary.declare(self.part.total)
        for name, parameter in self.trainable().items():
            parameter.copy_(tensors[name])

    def covers(self) -> set[str]:
        """The tables, by each of their names."""
        return {owner for table in self.tables for owner in table.owners}

    # ---- placing and taking off

    def enable(self, enabled: bool) -> None:
        """A disabled model knows its own tokens only."""
        self.part.enabled = enabled
        self.vocabulary.declare(self.part.total if enabled else self.vocabulary.size)

    @contextmanager
    def rehearsing(self) -> Iterator[None]:
        """Within it, every token is looked up as one of the trained ones, so that any input reaches them."""
        self.part.rehearsing = True
        try:
            yield
        finally:
            self.part.rehearsing = False

    @property
    def mergeable(self) -> bool:
        """Rows are written into the tables."""
        return True

    def row_changes(self) -> Mapping[str, RowChange] | None:
        """The rows in their places, and behind them; not of a table with an entry per column."""
        part = self.part
        if any(table.dimension for table in self.tables):
            return None
        columns = [as_matrix(table.of(self.model).shape)[1] for table in self.tables]
        return {
            table.name: Rows((part.total, columns[number]), part.ids, part.rows[number].detach())
            for number, table in enumerate(self.tables)
        }

    @torch.no_grad()
    def merge(self) -> None:
        """Make room for new tokens, and write each row, rounded once."""
        part = self.part
        self.remove()
        if part.added:
            self.vocabulary.grow(self.model, part.total)
        for number, table in enumerate(self.tables):
            entries = table.by_token(self.model)
            entries[part.ids] = part.rows[number].to(entries.dtype)

    def remove(self) -> None:
        """Take the rows and the hooks off, and give the model its own number of tokens back."""
        for use in self._uses:
            use.disconnect(self.model)
        del self.model.get_submodule(self.name)._modules[ROWS]
        self.vocabulary.declare(self.vocabulary.size)


# ---- where tables are read


def _is_used(table: Table, anatomy: Anatomy) -> bool:
    """Whether it holds trained values that an output depends on."""
    names = {owner for weight in _weights(table, anatomy) for owner in weight.owners} | set(table.owners)
    return not table.buffer and (anatomy.trace is None or not anatomy.trace.used.isdisjoint(names))


def _weights(table: Table, anatomy: Anatomy) -> list[Weight]:
    """What the anatomy knows of a table; several of them were one weight if they were untied since."""
    return [weight for weight in anatomy.weights.values() if table.name in weight.owners]


@dataclass(frozen=True)
class _Use:
    """Table number `table`, by its name `owner`, is read inside the module `reader`."""

    table: int
    dimension: int
    owner: str
    reader: str

    def connect(self, model: nn.Module, part: TrainedRows) -> None:
        """Hook the reader."""
        holder, attribute = self._holder(model)
        served = holder.__dict__.setdefault(SERVED, _Served(part))
        served.tables[attribute] = (self.table, self.dimension)
        self._hook(model.get_submodule(self.reader))

    def disconnect(self, model: nn.Module) -> None:
        """Take the hooks off."""
        self._holder(model)[0].__dict__.pop(SERVED, None)
        self._unhook(model.get_submodule(self.reader))

    def _holder(self, model: nn.Module) -> tuple[nn.Module, str]:
        holder, _, attribute = self.owner.rpartition(".")
        return model.get_submodule(holder), attribute

    def _hook(self, reader: nn.Module) -> None:
        raise NotImplementedError

    def _unhook(self, reader: nn.Module) -> None:
        raise NotImplementedError


class _Lookup(_Use):
    """The embedding layer itself looks tokens up."""

    def _hook(self, reader: nn.Module) -> None:
        reader.register_forward_pre_hook(enter_lookup, with_kwargs=True)
        reader.register_forward_hook(leave_lookup)

    def _unhook(self, reader: nn.Module) -> None:
        drop_pre_hook(reader, enter_lookup)
        drop_hook(reader, leave_lookup)


class _Head(_Use):
    """The linear layer itself computes logits."""

    def _hook(self, reader: nn.Module) -> None:
        reader.register_forward_hook(extend_logits, with_kwargs=True)

    def _unhook(self, reader: nn.Module) -> None:
        drop_hook(reader, extend_logits)


class _HeadBias(_Use):
    """Its bias, which the same hook sees to."""

    def _hook(self, reader: nn.Module) -> None:
        pass

    def _unhook(self, reader: nn.Module) -> None:
        pass


class _Whole(_Use):
    """Some code inside the reader takes hold of the table itself."""

    @property
    def path(self) -> str:
        """The table's name, seen from the reader."""
        return self.owner.removeprefix(f"{self.reader}.") if self.reader else self.owner

    def _hook(self, reader: nn.Module) -> None:
        reader.register_forward_pre_hook(_PutTogether(self.path))
        reader.register_forward_hook(_TakeApart(self.path), always_call=True)

    def _unhook(self, reader: nn.Module) -> None:
        drop_pre_hook(reader, _PutTogether(self.path))
        drop_hook(reader, _TakeApart(self.path))


def _uses(model: nn.Module, tables: Sequence[Table], anatomy: Anatomy) -> Iterator[_Use]:
    """Layers that are called are hooked; for what reads a table in another way the whole of it is put together."""
    uses = [
        _use(model, table, number, owner, reader)
        for number, table in enumerate(tables)
        for owner, reader in _distinct(model, _places(model, table, anatomy))
    ]
    heads = {use.reader for use in uses if isinstance(use, _Head)}
    with_head = {use.table for use in uses if use.owner.removesuffix(".bias") in heads}
    for use in uses:
        if use.table not in with_head:
            yield use
        elif use.owner.removesuffix(".bias") in heads:
            yield _HeadBias(use.table, use.dimension, use.owner, use.reader)


def _places(model: nn.Module, table: Table, anatomy: Anatomy) -> Iterator[tuple[str, str]]:
    """(name of the table, the called module inside which it is read by that name).

    A layer that is not called may be read by the module around it. An embedding that is not is another's second name.
    """
    places = [place for weight in _weights(table, anatomy) for place in weight.places if place[0] in table.owners]
    for owner, reader in places or [(owner, owner.rpartition(".")[0]) for owner in table.owners]:
        if anatomy.trace is None or reader in anatomy.trace.calls:
            yield owner, reader
        elif not isinstance(model.get_submodule(reader), nn.Embedding):
            yield owner, nearest_called(reader, anatomy.trace.calls)


def _distinct(model: nn.Module, places: Iterator[tuple[str, str]]) -> list[tuple[str, str]]:
    """Each place once: a module may have several names."""
    found: dict[tuple[nn.Module, str, nn.Module], tuple[str, str]] = {}
    for owner, reader in places:
        holder, _, attribute = owner.rpartition(".")
        found.setdefault((model.get_submodule(holder), attribute, model.get_submodule(reader)), (owner, reader))
    return list(found.values())


def _use(model: nn.Module, table: Table, number: int, owner: str, reader: str) -> _Use:
    module = model.get_submodule(reader)
    by_layer = owner == f"{reader}.weight" and table.dimension == 0
    kind: type[_Use] = _Whole
    if by_layer and isinstance(module, nn.Embedding | nn.Linear):
        kind = _Lookup if isinstance(module, nn.Embedding) else _Head
    return kind(number, table.dimension, owner, reader)


# ---- hooks


def enter_lookup(embedding: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of an embedding: new tokens are looked up as token 0, for which it has a row."""
    served = embedding.__dict__[SERVED]
    served.asked = None
    if "weight" in vars(embedding):  # put together already
        return None
    ids = next((tensor for tensor in tensors_in((args, kwargs)) if not tensor.is_floating_point()), None)
    served.asked = ids
    if ids is None or not served.part.added:
        return None
    known = ids.where(ids < served.part.size, 0)
    return (
        tuple(known if value is ids else value for value in args),
        {name: known if value is ids else value for name, value in kwargs.items()},
    )


def leave_lookup(embedding: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Forward hook of an embedding: R in the places of the trained tokens."""
    served = embedding.__dict__[SERVED]
    part, ids, served.asked = served.part, served.asked, None
    if ids is None or not (part.enabled or part.added):
        return None
    trained, places = part.find(ids)
    rows = part.sorted_rows(served.tables["weight"][0]).to(embedding.weight.dtype)
    padding = getattr(embedding, "padding_idx", None)  # gets no gradient, as in the embedding itself
    padding = part.known.index(padding) if padding in part.known else None
    vectors = first_output(output)
    with _holding(embedding, {"weight": rows, "padding_idx": padding}):
        own = first_output(type(embedding).forward(embedding, places))
    return with_first_output(output, torch.where(trained[..., None], own.to(vectors.dtype), vectors))


def extend_logits(head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of a head: the logits of the trained tokens."""
    served = head.__dict__[SERVED]
    if not served.part.enabled or "weight" in vars(head):
        return None
    own = {name: served.part.sorted_rows(table).to(head.weight.dtype) for name, (table, _) in served.tables.items()}
    with _holding(head, {"bias": None, **own}):
        logits = first_output(type(head).forward(head, *args, **kwargs))
    return with_first_output(output, served.part.join(first_output(output), logits, -1))


@dataclass(frozen=True)
class _PutTogether:
    """Forward pre-hook of a reader: the table at `path` with its trained rows, in the table's place."""

    path: str

    def __call__(self, reader: nn.Module, args: Any) -> None:
        holder, _, attribute = self.path.rpartition(".")
        owner = reader.get_submodule(holder)
        served = owner.__dict__[SERVED]
        if served.part.enabled:
            table, dimension = served.tables[attribute]
            rows = served.part.sorted_rows(table).movedim(0, dimension)
            owner.__dict__[attribute] = served.part.join(getattr(owner, attribute), rows, dimension)


@dataclass(frozen=True)
class _TakeApart:
    """Forward hook of a reader: the table itself shows again."""

    path: str

    def __call__(self, reader: nn.Module, args: Any, output: Any) -> None:
        holder, _, attribute = self.path.rpartition(".")
        reader.get_submodule(holder).__dict__.pop(attribute, None)


@contextmanager
def _holding(module: nn.Module, values: Mapping[str, Any]) -> Iterator[None]:
    """Within it `module` has these attributes; parameters of the same name are hidden, not replaced."""
    before = {name: vars(module).get(name, _ABSENT) for name in values}
    vars(module).update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is _ABSENT:
                del vars(module)[name]
            else:
                vars(module)[name] = value
