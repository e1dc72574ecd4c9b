"""`lightsft train`."""

from __future__ import annotations

import os

import typer

from lightsft.cli.options import takes_fields_of
from lightsft.config import SingleConfig

NAME = "train"


@takes_fields_of(SingleConfig)
def command(config: SingleConfig) -> None:
    """Train one strategy and save its adapter folder. The same command continues an interrupted run."""
    from lightsft.training.single import train

    result = train(config, say=lambda text: typer.echo(text))
    if os.environ.get("RANK", "0") != "0":  # of several processes, one speaks
        return
    for name, value in result.test.items():
        if isinstance(value, float):
            typer.echo(f"test {name:<18} {value:.4f}")
    typer.echo(f"adapter     {config.out}")
