"""`lightsft strategies`."""

from __future__ import annotations

import dataclasses
import inspect

import typer

NAME = "strategies"


def command() -> None:
    """List the installed strategies and their options with defaults."""
    from lightsft.registry import strategies

    for name, kind in strategies().items():
        module = inspect.getmodule(kind)
        summary = (inspect.getdoc(module) or inspect.getdoc(kind) or "").splitlines()[0]
        typer.echo(f"{name:<10} {summary}")
        for field in dataclasses.fields(kind):
            typer.echo(f"           {field.name} = {_default(field)!r}")


def _default(field: dataclasses.Field[object]) -> object:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default
