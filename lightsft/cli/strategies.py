"""`lightsft strategies`."""

from __future__ import annotations

import dataclasses
import inspect
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lightsft.injection import Strategy

NAME = "strategies"


def command(
    name: Annotated[str | None, typer.Argument(help="One strategy, or a member of a family: peft/boft.")] = None,
) -> None:
    """List the installed strategies and their options with defaults."""
    from lightsft.errors import ConfigurationError
    from lightsft.registry import names, registered, strategy_class

    if name is not None:
        _show(name, strategy_class(name))
        return
    for known in names():
        try:
            _show(known, registered(known))
        except ConfigurationError as error:  # of a package that is damaged: the others are listed all the same
            typer.echo(f"{known:<10} {error.found}")


def _show(name: str, kind: type[Strategy]) -> None:
    from lightsft.registry import Family

    text = inspect.getdoc(inspect.getmodule(kind)) or inspect.getdoc(kind) or ""
    typer.echo(f"{name:<10} {text.partition(chr(10))[0]}".rstrip())
    if isinstance(kind, Family) and not kind.member_name:
        typer.echo(f"           {name}/NAME, with NAME one of {', '.join(kind.members())}")
    for field in dataclasses.fields(kind):
        typer.echo(f"           {field.name} = {_default(field)!r}")


def _default(field: dataclasses.Field[object]) -> object:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default
