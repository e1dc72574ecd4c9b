"""`lightsft report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

NAME = "report"


def command(
    folders: Annotated[list[Path], typer.Argument(help="Folders that lightsft compare wrote.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="New folder for the report; needed for several runs.", show_default=False)
    ] = None,
) -> None:
    """Write report.html and report.md of a comparison anew, or one report of several over the same splits."""
    from lightsft.comparison.rebuilding import rebuild

    markdown, html = rebuild(folders, out)
    typer.echo(f"report      {html}")
    typer.echo(f"in short    {markdown}")
    if len(folders) > 1:
        typer.echo(f"results     {html.with_name('results.json')}")
