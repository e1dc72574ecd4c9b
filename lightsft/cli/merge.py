"""`lightsft merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

NAME = "merge"


def command(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder, of lightsft or PEFT.", show_default=False)],
    out: Annotated[
        Path, typer.Option(help="Folder for the merged checkpoint; must not exist yet.", show_default=False)
    ],
    base: Annotated[
        str | None, typer.Option(help="Base model; by default the one it was trained on.", show_default=False)
    ] = None,
    dtype: Annotated[str, typer.Option(help="Type of the merged weights: checkpoint (the base's own) or float32.")] = (
        "checkpoint"
    ),
) -> None:
    """Fold a trained strategy into its base: a plain transformers checkpoint, reloaded and verified."""
    from lightsft.export.merge import merge_folder

    certificate = merge_folder(adapter, out, base=base, dtype=dtype)
    typer.echo(f"merged      {out}")
    typer.echo(
        f"certificate {out / 'certificate.json'}: largest logit difference "
        f"{certificate['largest_logit_difference']:.1e} on {certificate['inputs']} inputs"
    )
