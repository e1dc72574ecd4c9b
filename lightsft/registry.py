"""Strategies by name. Ours and anyone else's come through one door: the entry-point group `lightsft.strategies`.

A name stands for a strategy class (`lora`), or for a family of them, whose members are named `family/member`
(`peft/boft`).
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, Protocol, runtime_checkable

from lightsft.errors import ConfigurationError
from lightsft.injection import Strategy

GROUP = "lightsft.strategies"


@runtime_checkable
class Family(Protocol):
    """A class that stands for several strategies, and is the base of their classes."""

    member_name: ClassVar[str]  # of a member's class; empty on the family itself

    @classmethod
    def members(cls) -> Sequence[str]:
        """Names of the strategies that can be used."""
        ...

    @classmethod
    def member(cls, name: str) -> type[Strategy]:
        """The strategy class of that name. Raises KeyError if there is none, or an error of its own that says why."""
        ...


@cache
def _entries() -> Mapping[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=GROUP):
        other = found.setdefault(entry.name, entry)
        if other.value != entry.value:
            raise ConfigurationError(
                f"two packages offer a strategy named {entry.name!r}: {_origin(other)} and {_origin(entry)}",
                expected="one package per strategy name",
                todo="uninstall one of them, or rename its entry point",
            )
    return found


def _origin(entry: EntryPoint) -> str:
    """The package that offers it, and its class."""
    return f"{entry.dist.name} ({entry.value})" if entry.dist is not None else entry.value


def strategies() -> dict[str, type[Strategy]]:
    """Every installed strategy class, and family of them, by the name users type, sorted.

    One that cannot be imported is an error that names its package.
    """
    return {name: _load(name) for name in sorted(_entries())}


def strategy_class(name: str) -> type[Strategy]:
    """The class behind `name` or `family/member`; an unknown name lists what there is and the nearest match."""
    head, slash, member = name.partition("/")
    kind = _load(head)
    if not isinstance(kind, Family):
        if slash:
            raise ConfigurationError(f"{head} has no members", expected=head, todo=f"leave out '/{member}'")
        return kind
    if not slash:
        raise _unknown(f"{head!r} is a family of strategies", f"{head}/NAME with NAME", "", kind.members())
    try:
        return kind.member(member)
    except KeyError as error:
        raise _unknown(f"{head} has no member {member!r}", f"{head}/NAME with NAME", member, kind.members()) from error


def _load(name: str) -> type[Strategy]:
    entries = _entries()
    if name not in entries:
        raise _unknown(f"no strategy named {name!r}", "", name, sorted(entries))
    entry = entries[name]
    try:
        loaded: type[Strategy] = entry.load()
    except Exception as error:
        raise ConfigurationError(
            f"the strategy {name!r} from {entry.value} cannot be imported: {error}",
            todo="reinstall the package that provides it",
        ) from error
    return loaded


def strategy(name: str, **options: Any) -> Strategy:
    """`strategy("lora", rank=16)` is `LoRA(rank=16)`; an unknown option lists the known ones."""
    kind = strategy_class(name)
    known = [field.name for field in dataclasses.fields(kind)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        raise ConfigurationError(
            f"{name} has no option {', '.join(unknown)}",
            expected=f"options of {name}: {', '.join(known) or 'none'}",
            todo=f"did you mean {near[0]!r}?" if near else "see `lightsft strategies`",
        )
    try:
        return kind(**{option: _hashable(value) for option, value in options.items()})
    except TypeError as error:
        raise ConfigurationError(
            f"{name} cannot take {', '.join(f'{option}={value!r}' for option, value in options.items())}: {error}",
            expected="values of the options' own types",
            todo="see `lightsft strategies` for their defaults",
        ) from error


def _hashable(value: Any) -> Any:
    """JSON and YAML have lists where a frozen dataclass wants tuples."""
    return tuple(value) if isinstance(value, list) else value


def _unknown(found: str, one_of: str, name: str, known: Iterable[str]) -> ConfigurationError:
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    return ConfigurationError(
        found,
        expected=f"{one_of} one of {', '.join(names)}".lstrip(),
        todo=f"did you mean {near[0]!r}?" if near else "see `lightsft strategies` for their options",
    )


def name_of(strategy: Strategy) -> str:
    """The name under which a strategy's class, or the family it is a member of, is registered."""
    kind = type(strategy)
    for candidate in (kind, *kind.__bases__):
        name = _registered(candidate)
        if name and candidate is kind:
            return name
        if name and isinstance(candidate, Family) and isinstance(strategy, Family):
            return f"{name}/{strategy.member_name}"
    target = _target(kind)
    raise ConfigurationError(
        f"{target} is not registered as a strategy",
        expected=f"an entry point in the group {GROUP!r}",
        todo=f'add `[project.entry-points."{GROUP}"] name = "{target}"` to its package',
    )


def _registered(kind: type) -> str | None:
    return next((name for name, entry in _entries().items() if entry.value == _target(kind)), None)


def _target(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"
