"""Checks of the options that strategies share."""

from __future__ import annotations

from collections.abc import Iterable

from lightsft.errors import ConfigurationError


def at_least(name: str, value: float, minimum: float) -> None:
    """`value >= minimum`."""
    if not value >= minimum:
        raise ConfigurationError(f"{name}={value}", expected=f"{name} of at least {minimum:g}")


def above(name: str, value: float, limit: float) -> None:
    """`value > limit`."""
    if not value > limit:
        raise ConfigurationError(f"{name}={value}", expected=f"{name} above {limit:g}")


def probability(name: str, value: float) -> None:
    """`0 <= value < 1`."""
    if not 0.0 <= value < 1.0:
        raise ConfigurationError(f"{name}={value}", expected=f"{name} from 0 up to, not including, 1")


def one_of(name: str, value: object, choices: Iterable[str]) -> None:
    """`value in choices`."""
    choices = tuple(choices)
    if value not in choices:
        raise ConfigurationError(f"{name}={value!r}", expected=f"{name} one of {', '.join(choices)}")
