"""`lightsft strategies`."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Annotated

import typer

NAME = "strategies"


def command(
    name: Annotated[str | None, typer.Argument(help="One strategy, or a member of a family: peft/boft.")] = None,
) -> None:
    """List the installed strategies and their options with defaults."""
    from lightsft.registry import Family, strategies, strategy_class

    for known, kind in strategies().items() if name is None else [(name, strategy_class(name))]:
        module = inspect.getmodule(kind)
        summary = (inspect.getdoc(module) or inspect.getdoc(kind) or "").splitlines()[0]
        typer.echo(f"{known:<10} {summary}")
        if isinstance(kind, Family) and not kind.member_name:
            typer.echo(f"           {known}/NAME, with NAME one of {', '.join(kind.members())}")
        for field in dataclasses.fields(kind):
            typer.echo(f"           {field.name} = {_default(field)!r}")


def _default(field: dataclasses.Field[object]) -> object:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default
