"""`lightsft data`: the data doctor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

    from lightsft.doctor.sources import Checkup, SizedProgress

NAME = "data"


def command(
    data: Annotated[str, typer.Argument(help="Rows: a file, a folder, a saved data set, or a hub id.")],
    task: Annotated[str, typer.Option(help='What they are for: classification, chat, "seq2seq(template=...)", ...')] = (
        "classification"
    ),
    model: Annotated[
        str | None, typer.Option(help="Model whose tokenizer to check with; without it, lengths are in words.")
    ] = None,
    validation_data: Annotated[str | None, typer.Option(help="Validation rows in a source of their own.")] = None,
    test_data: Annotated[str | None, typer.Option(help="Test rows in a source of their own.")] = None,
    text: Annotated[str | None, typer.Option(help="Column with the text; by default found.")] = None,
    text_pair: Annotated[str | None, typer.Option(help="Column with a second text, for pairs.")] = None,
    label: Annotated[str | None, typer.Option(help="Column with the label; by default found.")] = None,
    labels: Annotated[
        str | None, typer.Option(help="All labels, comma-separated; by default those that occur.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Longest input in tokens; by default the task's own.", min=1)
    ] = (None),
    chat_template: Annotated[str | None, typer.Option(help="File with a Jinja chat template.")] = None,
    encoding: Annotated[str, typer.Option(help="Encoding of text files.")] = "utf-8",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Check data before training: every row once, in bounded memory. Exit code 1: rows that cannot be used."""
    from rich.console import Console

    from lightsft.config import split_list
    from lightsft.doctor.sources import check_up

    flags = {
        "text": text, "text_pair": text_pair, "label": label, "max_length": max_length, "chat_template": chat_template,
        "labels": None if labels is None else tuple(split_list(labels)),
    }  # fmt: skip
    with _progress(Console(stderr=True), shown=not as_json) as progress:
        found = check_up(
            data,
            task,
            model,
            validation_data=validation_data,
            test_data=test_data,
            encoding=encoding,
            flags=flags,
            progress=progress,
        )
    if as_json:
        typer.echo(json.dumps(found.as_json(), ensure_ascii=False, allow_nan=False))
    else:
        _show(found, Console())
    raise typer.Exit(0 if found.report.usable else 1)


def _show(found: Checkup, console: Console) -> None:
    from rich.text import Text

    from lightsft.doctor import show

    if found.columns:
        console.print(Text(f"columns {found.columns}"))
    show(found.report, console)
    for split, pieces in found.previews.items():
        console.print(Text(f"the first row of {split}:"))
        for text, carries_loss in pieces:
            console.print(Text(f"  {'loss   ' if carries_loss else 'no loss'} | {text!r}"), soft_wrap=True)


@contextmanager
def _progress(console: Console, *, shown: bool) -> Iterator[SizedProgress | None]:
    """Bars in bytes on a terminal; without one, or where `shown` is false, nothing."""
    if not (shown and console.is_terminal):
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        running: dict[str, TaskID] = {}

        def update(split: str, rows: int, position: int, size: int) -> None:
            if split not in running:
                running[split] = bars.add_task(split, total=size or None)
            bars.update(running[split], completed=position, description=f"{split}: {rows:,} rows")

        yield update
