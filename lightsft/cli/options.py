"""Command-line options from a configuration's fields: one definition serves YAML, flags and Python."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from lightsft.config import StrategySpec, TrainConfig, build, read_yaml, with_settings

Config = TypeVar("Config", bound=TrainConfig)
Command = Callable[..., None]


def takes_fields_of(kind: type[Config]) -> Callable[[Callable[[Config], None]], Command]:
    """Turn `run(config)` into a command with a YAML file argument, an option per field of `kind`, and --set."""

    def decorate(run: Callable[[Config], None]) -> Command:
        def command(**given: Any) -> None:
            file, settings = given.pop("config_file"), given.pop("settings")
            values = read_yaml(file) if file is not None else {}
            values |= {name: value for name, value in given.items() if value is not None}
            run(build(kind, with_settings(_opened(values, settings or ()), settings or ())))

        command.__doc__ = run.__doc__
        command.__signature__ = inspect.Signature([*_general(), *_fields(kind)])  # type: ignore[attr-defined]
        return command

    return decorate


def _opened(values: dict[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """A strategy given by its name, as a mapping if an option of it is set: --strategy lora --set strategy.rank=4."""
    named = values.get("strategy")
    if isinstance(named, str) and any(setting.startswith("strategy.") for setting in settings):
        return {**values, "strategy": StrategySpec.parse(named).model_dump(exclude_none=True)}
    return values


def _general() -> list[inspect.Parameter]:
    file = typer.Argument(help="YAML file with the same keys as the options.", show_default=False)
    settings = typer.Option("--set", help="key=value, for anything in the file (repeatable).", show_default=False)
    return [
        _parameter("config_file", Annotated[Path | None, file], None),
        _parameter("settings", Annotated[list[str] | None, settings], None),
    ]


def _fields(kind: type[TrainConfig]) -> list[inspect.Parameter]:
    parameters = []
    for name, field in kind.model_fields.items():
        required = field.is_required()
        default = "" if required or field.default is None else f" [default: {_shown(field.default)}]"
        flag = f"--{name.replace('_', '-')}"
        if field.annotation is bool:
            option = typer.Option(f"{flag}/--no-{name.replace('_', '-')}", help=f"{field.description}{default}")
            parameters.append(_parameter(name, Annotated[bool | None, option], None))
        else:
            text = f"{field.description}{' (required)' if required else default}"
            option = typer.Option(flag, help=text, show_default=False, metavar=_metavar(name))
            parameters.append(_parameter(name, Annotated[str | None, option], None))
    return parameters


def _shown(value: Any) -> Any:
    return getattr(value, "label", value)


def _metavar(name: str) -> str:
    return name.rpartition("_")[2].upper()


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
