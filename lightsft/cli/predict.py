"""`lightsft predict`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

NAME = "predict"


def command(
    directory: Annotated[Path, typer.Argument(help="Adapter folder or merged checkpoint.", show_default=False)],
    texts: Annotated[
        list[str] | None,
        typer.Argument(help="Texts to predict; paths, of images and recordings.", show_default=False),
    ] = None,
    file: Annotated[Path | None, typer.Option(help="Rows to predict instead of texts.", show_default=False)] = None,
    text: Annotated[
        str | None,
        typer.Option(help="Column with the text; by default the trained one.", show_default=False),
    ] = None,
    encoding: Annotated[str, typer.Option(help="Encoding of the file.")] = "utf-8",
    out: Annotated[Path | None, typer.Option(help="Write JSON lines here instead.", show_default=False)] = None,
    base: Annotated[str | None, typer.Option(help="Base model of an adapter folder.", show_default=False)] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest text of a model that writes; 64 if not trained otherwise.", min=1)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Predict with any task: labels, numbers, entities, answers, choices, texts, vectors."""
    rows = _rows(texts, file, text, encoding)
    from lightsft.files import require_free
    from lightsft.predict import Predictor

    if out is not None:
        require_free(out)
    predictor = Predictor(directory, base=base)
    if text is not None and file is not None:
        rows = [{**row, predictor.chosen.read_columns()[0]: row.get(text)} for row in rows]
    found = predictor.predict(rows, max_new_tokens=max_new_tokens)
    if out is not None:
        _write(out, found)
    for row in found if out is None else ():
        typer.echo(json.dumps(row, ensure_ascii=False) if as_json else _line(row))


def _rows(texts: list[str] | None, file: Path | None, column: str | None, encoding: str) -> list[Any]:
    """The texts, or the rows of the file."""
    from lightsft.errors import ConfigurationError

    if file is not None and not texts:
        from lightsft.data.reading import read_rows, require_columns

        rows = read_rows(file, encoding=encoding)
        require_columns(rows, [] if column is None else [column], str(file))
        return rows
    if not texts or file is not None:
        raise ConfigurationError(
            "texts and a file were given" if texts else "nothing to predict",
            expected="texts, or --file FILE",
            todo='for example: lightsft predict DIR "a text"',
        )
    return list(texts)


def _write(out: Path, rows: list[dict[str, Any]]) -> None:
    from lightsft.files import write_text

    write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    typer.echo(f"predictions {out}")


def _line(row: dict[str, Any]) -> str:
    """A prediction on one line, or as it was written."""
    for name in ("answer", "generated"):
        if name in row:
            return str(row[name]) or "(no answer)"
    given = str(row.get("text") or row.get("question") or "")[:60]
    return f"{_said(row)}  {given}".rstrip()


def _said(row: dict[str, Any]) -> str:
    if "label" in row:
        return f"{row['label']:<12} {_shares(row['probabilities'])}"
    if "labels" in row:
        return f"{', '.join(row['labels']) or '(none)':<12} {_shares(row['probabilities'])}"
    if "choice" in row:
        return f"{row['choice']:<12} {row['probabilities'][row['index']]:.3f}"
    if "entities" in row:
        return ", ".join(f"{one['type']} {one['text']!r} {one['score']:.3f}" for one in row["entities"]) or "(none)"
    if "tags" in row:
        return " ".join(f"{word}/{tag}" for word, tag in zip(row["words"], row["tags"], strict=True))
    if "masks" in row:
        return " | ".join(_shares({one["token"]: one["probability"] for one in mask}) for mask in row["masks"])
    if "embedding" in row:
        return " ".join(f"{number:.4f}" for number in row["embedding"])
    return f"{row['value'] if 'value' in row else row['similarity']:.4f}"


def _shares(probabilities: dict[str, float]) -> str:
    return "  ".join(f"{label} {p:.3f}" for label, p in probabilities.items())
