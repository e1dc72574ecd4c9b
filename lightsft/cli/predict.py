"""`lightsft predict`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

NAME = "predict"


def command(
    directory: Annotated[Path, typer.Argument(help="Adapter folder or merged checkpoint.", show_default=False)],
    texts: Annotated[list[str] | None, typer.Argument(help="Texts to predict.", show_default=False)] = None,
    file: Annotated[Path | None, typer.Option(help="Rows to predict instead of texts.", show_default=False)] = None,
    text: Annotated[
        str | None,
        typer.Option(help="Column with the text; by default the trained one.", show_default=False),
    ] = None,
    encoding: Annotated[str, typer.Option(help="Encoding of the file.")] = "utf-8",
    out: Annotated[Path | None, typer.Option(help="Write JSON lines here instead.", show_default=False)] = None,
    base: Annotated[str | None, typer.Option(help="Base model of an adapter folder.", show_default=False)] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer of a chat model.", min=1)] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Label texts with probabilities, or answer prompts with a chat model."""
    inputs = _inputs(texts, file, text or (_trained_column(directory) if file else ""), encoding)
    from lightsft.files import require_free
    from lightsft.predict import Predictor

    if out is not None:
        require_free(out)
    predictor = Predictor(directory, base=base)
    rows = predictor.answer(inputs, max_new_tokens) if predictor.task == "chat" else predictor.classify(inputs)
    if out is not None:
        _write(out, rows)
    for row in rows if out is None else ():
        typer.echo(json.dumps(row, ensure_ascii=False) if as_json else _line(row))


def _trained_column(directory: Path) -> str:
    """The text column that an adapter folder was trained with; "text" for anything else."""
    from lightsft.files import read_json

    settings = directory / "lightsft.json"
    task = (read_json(settings).get("task") if settings.is_file() else None) or {}
    return str(task.get("text", "text"))


def _inputs(texts: list[str] | None, file: Path | None, column: str, encoding: str) -> list[str]:
    from lightsft.errors import ConfigurationError

    if file is not None and not texts:
        from lightsft.data.reading import read_rows, require_columns

        rows = read_rows(file, encoding=encoding)
        require_columns(rows, [column], str(file))
        return [str(row[column]) for row in rows]
    if not texts or file is not None:
        raise ConfigurationError(
            "texts and a file were given" if texts else "nothing to predict",
            expected="texts, or --file FILE",
            todo='for example: lightsft predict DIR "a text"',
        )
    return texts


def _write(out: Path, rows: list[dict[str, Any]]) -> None:
    from lightsft.files import write_text

    write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    typer.echo(f"predictions {out}")


def _line(row: dict[str, Any]) -> str:
    if "answer" in row:
        return str(row["answer"])
    shares = "  ".join(f"{label} {p:.3f}" for label, p in row["probabilities"].items())
    return f"{row['label']:<12} {shares}  {row['text'][:60]}"
