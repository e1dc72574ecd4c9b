"""`lightsft`: the commands, and how errors end them (one screen, exit code 2)."""

from __future__ import annotations

import sys

import typer
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from lightsft import __version__
from lightsft.cli import (
    compare,
    convert,
    data,
    demo,
    export,
    inspect,
    merge,
    predict,
    report,
    strategies,
    train,
    verify,
)
from lightsft.errors import LightsftError
from lightsft.process import prepare_process

app = typer.Typer(
    name="lightsft",
    help="Compare fine-tuning strategies on any Transformer, train one, ship a verified merged checkpoint.",
    no_args_is_help=True,
    rich_markup_mode=None,  # plain two columns: boxes leave the descriptions 20 characters on a narrow terminal
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (data, compare, report, train, merge, convert, export, verify, predict, inspect, strategies, demo):
    app.command(module.NAME)(module.command)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Print the version."),
) -> None:
    """Applies to every command."""


def main() -> None:
    """Run the command line.

    Exit code 0: done; 1: some trials failed, or some rows cannot be used; 2: bad input; 130: interrupted.
    """
    prepare_process()
    try:
        app()
    except LightsftError as error:
        show_error(error)
        sys.exit(2)


def show_error(error: LightsftError) -> None:
    """What was found, what was expected, what to do, in a box on standard error."""
    text = Text(error.found)
    for title, part in (("Expected", error.expected), ("What to do", error.todo)):
        if part:
            text.append(f"\n\n{title}: ", style="bold")
            text.append(part)
    Console(stderr=True).print(Panel(text, title=type(error).__name__, title_align="left", border_style="red"))
