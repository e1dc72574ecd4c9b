"""`lightsft merge`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lightsft.errors import ConfigurationError

if TYPE_CHECKING:
    from lightsft.export.merge import Report

NAME = "merge"
_SIZES = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


def command(
    adapters: Annotated[
        list[Path],
        typer.Argument(help="Adapter folder of lightsft or PEFT, or several.", show_default=False),
    ],
    out: Annotated[
        Path, typer.Option(help="Folder for the merged checkpoint; must not exist yet.", show_default=False)
    ],
    base: Annotated[
        str | None, typer.Option(help="Base model; by default the one it was trained on.", show_default=False)
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Type of the merged weights: checkpoint (the base's own), float32, bfloat16 or float16.")
    ] = ("checkpoint"),
    onto: Annotated[
        str,
        typer.Option(
            help="Of a strategy trained beside codes: base (the dequantized weights), original (the weights that the "
            "codes were made of), or codes again: int8, nf4, fp4."
        ),
    ] = "base",
    most_rounding: Annotated[
        float, typer.Option(help="Refuse to lose more than this share of what was trained by storing it.")
    ] = 0.5,
    data: Annotated[
        str | None,
        typer.Option(
            help="Rows to score before and after; by default the test split of the run, if its data is still there.",
            show_default=False,
        ),
    ] = None,
    encoding: Annotated[str, typer.Option(help="Encoding of --data.")] = "utf-8",
    correction_rank: Annotated[
        int, typer.Option(help="With codes: rank of a LoRA, written beside, for what they lose; 0 for none.", min=0)
    ] = 0,
    check: Annotated[
        str,
        typer.Option(
            help="How the result is checked: load (plain transformers against base + adapter), layers (the same, a "
            "layer at a time from disk), tiles (rows recomputed), none, or auto: load up to 1 GiB, tiles above."
        ),
    ] = "auto",
    max_shard_size: Annotated[
        str | None,
        typer.Option(help="Largest file of weights, such as 5GB; by default those of the base.", show_default=False),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Of several adapters: the weight of each, such as 0.7,0.3.", show_default=False)
    ] = None,
    method: Annotated[
        str, typer.Option(help="Of several adapters: linear (task arithmetic), ties, dare_linear or dare_ties.")
    ] = "linear",
    density: Annotated[
        float | None,
        typer.Option(help="Share of the values that ties and dare keep; by default 0.2 and 0.5.", show_default=False),
    ] = None,
    in_memory: Annotated[
        bool, typer.Option("--in-memory", help="Merge through the model in memory, not from disk to disk.")
    ] = False,
) -> None:
    """Fold a trained strategy into its base: a plain transformers checkpoint, checked against base + adapter."""
    from lightsft.export.merge import merge_folder, merge_several
    from lightsft.export.several import Combination

    def rows() -> Any:
        from lightsft.export.held_out import held_out

        return held_out(adapters[0], data, encoding)

    size = None if max_shard_size is None else _bytes(max_shard_size)
    if len(adapters) > 1 or weights is not None:
        if data is not None or in_memory or correction_rank or onto != "base":
            raise ConfigurationError(
                "several adapters with --data, --in-memory, --onto or --correction-rank",
                expected="a merge from disk to disk, checked there",
                todo="leave these out",
            )
        several = Combination(tuple(adapters), _numbers(weights, len(adapters)), method, density)
        with _progress() as report:
            certificate = merge_several(
                several,
                out,
                base=base,
                dtype=dtype,
                most_rounding=most_rounding,
                check=check,
                max_shard_size=size,
                report=report,
            )
        _show(certificate, out)
        return
    if method != "linear" or density is not None:
        raise ConfigurationError(
            "--method or --density with one adapter", expected="several: they say how adapters are put together"
        )
    with _progress() as report:
        certificate = merge_folder(
            adapters[0],
            out,
            base=base,
            rows=rows,
            dtype=dtype,
            onto=onto,
            most_rounding=most_rounding,
            correction_rank=correction_rank,
            check="load" if data is not None and check == "auto" else check,
            max_shard_size=size,
            streaming=not in_memory,
            report=report,
        )
    _show(certificate, out)


def _show(certificate: Mapping[str, Any], out: Path) -> None:
    typer.echo(f"merged      {out}")
    typer.echo(f"certificate {out / 'certificate.json'}")
    show_check(certificate)
    lost, without = certificate["rounding"], certificate.get("rounding_without_correction")
    typer.echo(f"rounding    {_share(lost)} of what was trained is lost by rounding, onto {certificate['onto']}")
    if without is not None:
        typer.echo(f"correction  {out / 'correction'}: without it {_share(without)} would be lost")


@contextmanager
def _progress() -> Iterator[Report]:
    """A bar in bytes, where somebody watches."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (BarColumn(bar_width=32), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("merging", total=None, visible=False)
        yield lambda written, whole: progress.update(bar, advance=written, total=whole, visible=True)


def _numbers(text: str | None, count: int) -> tuple[float, ...]:
    try:
        return (1.0,) * count if text is None else tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigurationError(f"--weights {text!r}", expected="a number for each adapter: 0.7,0.3") from error


def _bytes(text: str) -> int:
    match = re.fullmatch(r"\s*([\d.]+)\s*([kmgt]?b)?\s*", text.lower())
    try:
        return round(float(match[1]) * _SIZES[match[2] or ""]) if match else int(text)
    except ValueError as error:
        raise ConfigurationError(
            f"--max-shard-size {text!r}", expected="a number of bytes, or of KB, MB, GB or TB: 5GB"
        ) from error


def show_check(certificate: Mapping[str, Any]) -> None:
    """What was compared, and how far apart it is."""
    if certificate["check"] in ("load", "layers"):
        found = certificate["largest_logit_difference"]
        typer.echo(f"checked     largest logit difference {found:.1e} on {certificate['inputs']} inputs")
    if certificate["check"] == "load":
        typer.echo(f"score       {_scores(certificate)}")
    elif certificate["check"] == "tiles":
        values, weights = certificate["values_compared"], certificate["changed_tensors"]
        typer.echo(f"checked     {values:,} values of {weights} changed weights against the formula in fp64")
    elif certificate["check"] == "none":
        typer.echo("checked     not at all")


def _scores(certificate: Mapping[str, Any]) -> str:
    if "metric" not in certificate:
        return "not measured: give rows that were not trained on with --data FILE"
    name, rows = certificate["metric"], certificate["examples"]
    text = f"{name} {certificate['score_before']:.4f} before, {certificate['score_after']:.4f} merged, on {rows} rows"
    return text + (f"; {certificate['score_corrected']:.4f} corrected" if "score_corrected" in certificate else "")


def _share(rounding: Mapping[str, Any]) -> str:
    if rounding["ratio"] is None:
        return "0 %" if rounding["error"] == 0 else "more than all"
    return f"{100 * rounding['ratio']:.3g} %"
