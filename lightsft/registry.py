"""Strategies by name. Ours and anyone else's come through one door: the entry-point group `lightsft.strategies`."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from lightsft.errors import ConfigurationError
from lightsft.injection import Strategy

GROUP = "lightsft.strategies"


@cache
def _entries() -> Mapping[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=GROUP):
        other = found.setdefault(entry.name, entry)
        if other.value != entry.value:
            raise ConfigurationError(
                f"two packages offer a strategy named {entry.name!r}: {other.value} and {entry.value}",
                expected="one package per strategy name",
                todo="uninstall one of them, or rename its entry point",
            )
    return found


def strategies() -> dict[str, type[Strategy]]:
    """Every installed strategy class by the name users type, sorted. Loading one that fails names its package."""
    return {name: strategy_class(name) for name in sorted(_entries())}


def strategy_class(name: str) -> type[Strategy]:
    """The class behind `name`; an unknown name lists what is installed and the nearest match."""
    entries = _entries()
    if name not in entries:
        near = difflib.get_close_matches(name, entries, n=1)
        raise ConfigurationError(
            f"no strategy named {name!r}",
            expected=f"one of {', '.join(sorted(entries))}",
            todo=f"did you mean {near[0]!r}?" if near else "see `lightsft strategies` for their options",
        )
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


def name_of(strategy: Strategy) -> str:
    """The name under which a strategy's class is registered."""
    target = f"{type(strategy).__module__}:{type(strategy).__qualname__}"
    for name, entry in _entries().items():
        if entry.value == target:
            return name
    raise ConfigurationError(
        f"{target} is not registered as a strategy",
        expected=f"an entry point in the group {GROUP!r}",
        todo=f'add `[project.entry-points."{GROUP}"] name = "{target}"` to its package',
    )
