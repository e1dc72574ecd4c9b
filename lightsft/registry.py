"""Strategies by name. Ours and anyone else's come through one door: the entry-point group `lightsft.strategies`.

A name stands for a strategy class (`lora`), or for a family of them, whose members are named `family/member`
(`peft/boft`).
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
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


@runtime_checkable
class ExplainsOptions(Protocol):
    """A strategy class that knows what users may look for among its options in vain."""

    @classmethod
    def instead_of(cls, option: str) -> str | None:
        """What to do instead of giving an option that does not exist; None for one it knows nothing of."""
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

    One that cannot be used is an error that names its package.
    """
    return {name: registered(name) for name in names()}


def names() -> list[str]:
    """The names of all that is installed, of what cannot be imported too, sorted."""
    return sorted(_entries())


def usable() -> dict[str, type[Strategy]]:
    """`strategies()` without those that cannot be used."""
    found = {}
    for name in names():
        with suppress(ConfigurationError):
            found[name] = registered(name)
    return found


def strategy_class(name: str) -> type[Strategy]:
    """The class behind `name` or `family/member`; an unknown name lists what there is and the nearest match."""
    head, slash, member = name.partition("/")
    kind = registered(head)
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


def registered(name: str) -> type[Strategy]:
    """The class or the family that is installed as `name`; an error that names its package if it cannot be used."""
    entries = _entries()
    if name not in entries:
        raise _unknown(f"no strategy named {name!r}", "", name, sorted(entries))
    entry = entries[name]
    try:
        loaded: Any = entry.load()
    except Exception as error:  # whatever a package does when it is imported
        raise ConfigurationError(
            f"the strategy {name!r} of {_origin(entry)} cannot be imported: {type(error).__name__}: {error}",
            expected="an entry point that names a class in an installed module",
            todo="reinstall or uninstall that package",
        ) from error
    if not _is_strategy_class(loaded):
        raise ConfigurationError(
            f"the strategy {name!r} of {_origin(entry)} is no strategy",
            expected="a dataclass with a method inject(backbone, *, seed=0)",
            todo="correct the entry point of that package, or uninstall it",
        )
    kind: type[Strategy] = loaded
    return kind


def _is_strategy_class(loaded: Any) -> bool:
    return isinstance(loaded, type) and dataclasses.is_dataclass(loaded) and callable(getattr(loaded, "inject", None))


def strategy(name: str, **options: Any) -> Strategy:
    """`strategy("lora", rank=16)` is `LoRA(rank=16)`; an unknown option lists the known ones."""
    kind = strategy_class(name)
    known = [field.name for field in dataclasses.fields(kind)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        todo = f"did you mean {near[0]!r}?" if near else "see `lightsft strategies`"
        raise ConfigurationError(
            f"{name} has no option {', '.join(unknown)}",
            expected=f"options of {name}: {', '.join(known) or 'none'}",
            todo=(kind.instead_of(unknown[0]) if isinstance(kind, ExplainsOptions) else None) or todo,
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
    name = _name_by(_at_its_address, strategy) or _name_by(_among_what_is_loaded, strategy)
    if name is None:
        target = _target(type(strategy))
        raise ConfigurationError(
            f"{target} is not registered as a strategy",
            expected=f"an entry point in the group {GROUP!r}",
            todo=f'add `[project.entry-points."{GROUP}"] name = "{target}"` to its package',
        )
    return name


def _name_by(find: Callable[[type], str | None], strategy: Strategy) -> str | None:
    """The name of the strategy's class, or of its family with the member's, as far as `find` finds classes."""
    own = find(type(strategy))
    if own is not None or not isinstance(strategy, Family):
        return own
    families = (base for base in type(strategy).__bases__ if isinstance(base, Family))
    return next((f"{name}/{strategy.member_name}" for name in map(find, families) if name), None)


def _at_its_address(kind: type) -> str | None:
    """The name whose entry point says where the class is defined."""
    return next((name for name, entry in _entries().items() if entry.value == _target(kind)), None)


def _among_what_is_loaded(kind: type) -> str | None:
    """The name that gives this class: a package may export it from elsewhere than it is defined in."""
    return next((name for name, loaded in usable().items() if loaded is kind), None)


def _target(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"
