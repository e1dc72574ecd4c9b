"""Edits: what a piece of code changed on a model, to be taken back and made again, bit for bit.

    with watching(model) as edits:
        rewrite(model)
    edits.undo()   # the very same modules, attributes and hooks as before, with the same values
    edits.redo()

For code that replaces modules instead of placing something on them. Seen: children, parameters, buffers, hooks and
attributes of every module that was there, attributes of the configuration, `parameter.data = ...`, and writes into a
parameter or buffer, of which a copy is made just before the first one (what is not written costs nothing).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass


class _Absent(Enum):
    """What an entry that is not there holds; a deep copy of it is the same."""

    ABSENT = 0


_ABSENT = _Absent.ABSENT


@dataclass
class Place:
    """A dictionary of `holder`, by the name of the attribute it is, or that of its attributes (None).

    Looked up each time: the dictionary of an object's attributes is another one in a deep copy.
    """

    holder: Any
    attribute: str | None = None

    @property
    def dictionary(self) -> dict[Any, Any]:
        """As it is now."""
        attributes: dict[Any, Any] = self.holder.__dict__
        return attributes if self.attribute is None else attributes[self.attribute]

    def holds(self, dictionary: dict[Any, Any]) -> bool:
        """Whether it still is this one."""
        return self.attribute is None or self.holder.__dict__.get(self.attribute) is dictionary


@dataclass
class Entry:
    """One changed entry of a dictionary of the module called `owner`."""

    owner: str
    place: Place
    key: Any
    before: Any
    after: Any

    def put(self, value: Any) -> None:
        """Set the entry; _ABSENT removes it."""
        if value is _ABSENT:
            self.place.dictionary.pop(self.key, None)
        else:
            self.place.dictionary[self.key] = value


class ChangedValue:
    """A tensor of the backbone whose values were changed."""

    def __init__(self, tensor: Tensor, before: Tensor) -> None:
        self.tensor, self.before = tensor, before
        self.hidden: Tensor | None = None  # the changed values, while the former ones are in place

    def undo(self) -> None:
        """Put the former values in."""
        if self.hidden is None:
            self.hidden, self.tensor.data = self.tensor.data, self.before.to(self.tensor.device)

    def redo(self) -> None:
        """Put the changed values back."""
        if self.hidden is not None:
            self.tensor.data, self.hidden = self.hidden, None


class Edits:
    """What was changed on one model."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.values: list[ChangedValue] = []
        self.orders: list[tuple[Place, list[Any]]] = []  # of dictionaries that lost a key

    @property
    def replaced(self) -> dict[str, tuple[nn.Module, nn.Module]]:
        """(the former module, the one that took its place) by dotted name."""
        return {
            f"{entry.owner}.{entry.key}".removeprefix("."): (entry.before, entry.after)
            for entry in self.entries
            if isinstance(entry.before, nn.Module) and isinstance(entry.after, nn.Module)
        }

    def keep(self, tensor: Tensor) -> None:
        """Treat a tensor that is about to be trained as changed: its present values are the former ones."""
        self.values.append(ChangedValue(tensor, tensor.detach().clone()))

    def undo(self) -> None:
        """Everything as it was."""
        self.undo_entries()
        for value in self.values:
            value.undo()

    def undo_entries(self) -> None:
        """The tree, attributes and hooks as they were, with the present values."""
        for entry in reversed(self.entries):
            entry.put(entry.before)
        for place, order in self.orders:
            dictionary = place.dictionary
            for key in [*order, *(key for key in list(dictionary) if key not in order)]:
                dictionary[key] = dictionary.pop(key)

    def redo(self) -> None:
        """Everything as it was changed."""
        for entry in self.entries:
            entry.put(entry.after)
        for value in self.values:
            value.redo()

    def drop(self, name: str) -> None:
        """Put the former module called `name` back for good."""
        for entry in [e for e in self.entries if f"{e.owner}.{e.key}".removeprefix(".") == name]:
            entry.put(entry.before)
            self.entries.remove(entry)


@contextmanager
def watching(model: nn.Module) -> Iterator[Edits]:
    """Note what is changed on `model` meanwhile; on an error it is all taken back."""
    edits, snapshot = Edits(), _Snapshot(model)
    try:
        with snapshot.writes:
            yield edits
    except BaseException:
        snapshot.compare(edits)
        edits.undo()
        raise
    snapshot.compare(edits)


class _Snapshot:
    """The dictionaries of every module, and where each tensor's values lie."""

    def __init__(self, model: nn.Module) -> None:
        self.places = [(owner, p, p.dictionary, dict(p.dictionary)) for owner, p in _dictionaries(model)]
        tensors = [*model.parameters(), *model.buffers()]
        self.data = [(tensor, tensor.data) for tensor in tensors if not is_traceable_wrapper_subclass(tensor)]
        self.writes = _CopiesBeforeWriting([data for _, data in self.data if data.device.type != "meta"])

    def compare(self, edits: Edits) -> None:
        """Add what is different now."""
        for owner, place, now, before in self.places:
            if not place.holds(now):  # another dictionary is there, which is an entry of its own
                continue
            for key in before | now:
                old, new = before.get(key, _ABSENT), now.get(key, _ABSENT)
                if old is not new and key != "training":
                    edits.entries.append(Entry(owner, place, key, old, new))
            if before.keys() - now.keys():
                edits.orders.append((place, list(before)))
        for tensor, data in self.data:
            if id(data) in self.writes.copies:
                edits.values.append(ChangedValue(tensor, self.writes.copies[id(data)]))
            elif not _same_place(tensor.data, data):
                edits.values.append(ChangedValue(tensor, data))


def _dictionaries(model: nn.Module) -> Iterator[tuple[str, Place]]:
    """Each module's attributes, and each dictionary among them: children, parameters, buffers, hooks."""
    if hasattr(model, "config"):
        yield "", Place(model.config)
    for name, module in model.named_modules():
        yield name, Place(module)
        for attribute, value in module.__dict__.items():
            if isinstance(value, dict):
                yield name, Place(module, attribute)


class _CopiesBeforeWriting(TorchDispatchMode):
    """Copies each of `tensors` just before an operation writes into its storage for the first time."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watched: dict[int, list[Tensor]] = {}
        self.copies: dict[int, Tensor] = {}  # by the identity of the tensor, which `watched` keeps alive
        for tensor in tensors:
            self.watched.setdefault(_address(tensor), []).append(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[position] if position < len(args) else kwargs.get(argument.name)
                for tensor in value if isinstance(value, list | tuple) else [value]:
                    self._about_to_write(tensor)
        return func(*args, **kwargs)

    def _about_to_write(self, tensor: Any) -> None:
        if isinstance(tensor, Tensor) and not is_traceable_wrapper_subclass(tensor) and tensor.device.type != "meta":
            for watched in self.watched.get(_address(tensor), ()):
                if id(watched) not in self.copies:
                    self.copies[id(watched)] = watched.clone()


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _same_place(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors show the same values in the same memory."""
    return (
        one.device == other.device
        and one.dtype == other.dtype
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.data_ptr() == other.data_ptr()
    )
