"""`lightsft demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

NAME = "demo"


def command(
    out: Annotated[Path, typer.Option(help="Folder for the demo's run.")] = Path("runs/demo"),
) -> None:
    """The main job on real shipped data: five strategies on sentiment texts, the winner merged and verified."""
    from lightsft.cli.compare import run_comparison
    from lightsft.demo import demo_config

    run_comparison(demo_config(out), f"lightsft demo --out {out}")
