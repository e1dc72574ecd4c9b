"""`lightsft verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lightsft.cli.merge import show_check

NAME = "verify"


def command(
    folder: Annotated[Path, typer.Argument(help="Folder that lightsft merge wrote.", show_default=False)],
    adapter: Annotated[
        Path | None, typer.Option(help="Where the adapter is now; by default where it was then.", show_default=False)
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Where the base is now; by default where it was then.", show_default=False)
    ] = None,
    data: Annotated[str | None, typer.Option(help="Rows to score before and after.", show_default=False)] = None,
    encoding: Annotated[str, typer.Option(help="Encoding of --data.")] = "utf-8",
    check: Annotated[
        str, typer.Option(help="load, layers, tiles, none (hashes alone) or auto, as of lightsft merge.")
    ] = "auto",
) -> None:
    """Repeat the check of a merged checkpoint against the base and the adapter that its certificate names."""
    from lightsft.export.verify import certified_adapter, verify

    def rows() -> Any:
        from lightsft.export.held_out import held_out

        return held_out(adapter or certified_adapter(folder), data, encoding)

    found = verify(folder, adapter=adapter, base=base, check="load" if data and check == "auto" else check, rows=rows)
    typer.echo(f"verified    {folder}")
    show_check(found)
    for name, digest in sorted(found["checkpoint_sha256"].items()):
        typer.echo(f"sha256      {digest}  {name}")
