"""`lightsft merge`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

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
) -> None:
    """Fold a trained strategy into its base: a plain transformers checkpoint, reloaded and verified."""
    from lightsft.export.held_out import held_out
    from lightsft.export.merge import merge_folder

    certificate = merge_folder(
        adapter,
        out,
        base=base,
        rows=held_out(adapter, data, encoding),
        dtype=dtype,
        onto=onto,
        most_rounding=most_rounding,
        correction_rank=correction_rank,
    )
    typer.echo(f"merged      {out}")
    typer.echo(
        f"certificate {out / 'certificate.json'}: largest logit difference "
        f"{certificate['largest_logit_difference']:.1e} on {certificate['inputs']} inputs"
    )
    typer.echo(f"score       {_scores(certificate)}")
    lost, without = certificate["rounding"], certificate.get("rounding_without_correction")
    typer.echo(f"rounding    {_share(lost)} of what was trained is lost by storing it as {certificate['onto']}")
    if without is not None:
        typer.echo(f"correction  {out / 'correction'}: without it {_share(without)} would be lost")


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
