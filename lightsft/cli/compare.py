"""`lightsft compare`."""

from __future__ import annotations

import shlex
import sys
from typing import Any

import typer

from lightsft.cli.options import takes_fields_of
from lightsft.config import RunConfig

NAME = "compare"


@takes_fields_of(RunConfig)
def command(config: RunConfig) -> None:
    """Train several strategies on the same splits, report which one to use, merge the winner.

    Run the same command again after an interruption to continue.
    """
    run_comparison(config, shlex.join(["lightsft", *sys.argv[1:]]))


def run_comparison(config: RunConfig, command_line: str) -> None:
    """Compare with a live display; print where things are; exit 1 if a trial failed, 130 if interrupted."""
    from lightsft.comparison.compare import Interrupted, compare
    from lightsft.comparison.worker import JobDied, JobFailed

    try:
        results = compare(config, command=command_line)
    except Interrupted as interruption:
        typer.echo(f"\n{interruption}\nRun the same command again to continue.", err=True)
        raise typer.Exit(130) from None
    except (JobDied, JobFailed) as error:  # outside of a trial: a bug, or too little memory for the model
        typer.echo(f"\n{error}\nFinished trials are kept in {config.out}, where the logs are too.", err=True)
        raise typer.Exit(1) from None
    failed = [trial for trial in results["trials"] if trial["status"] == "failed"]
    winner = results["winner"]
    if winner:
        typer.echo("")
        for sentence in _verdicts(results, winner["strategy"]):
            typer.echo(sentence)
        typer.echo(f"\nwinner      {winner['strategy']} (seed {winner['seed']}): {winner['note']}")
        typer.echo(f"adapter     {config.out / winner['adapter']}")
    typer.echo(f"report      {config.out / 'report.html'}")
    if winner and winner["merged"]:
        typer.echo(f"merged      {config.out / winner['merged']}")
    for trial in failed:
        typer.echo(f"failed      {trial['strategy']} seed {trial['seed']}: {trial['error']}", err=True)
    if failed:
        raise typer.Exit(1)


def _verdicts(results: dict[str, Any], winner: str) -> list[str]:
    """How the winner compares with every other strategy and with the baselines; then what is as good and costs less."""
    about = [one for one in results["comparisons"] if winner in (one["first"], one["second"])]
    near = results["non_inferior"]
    return [one["verdict"] for one in about] + ([near["verdict"]] if near else [])
