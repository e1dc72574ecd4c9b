"""`lightsft export`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

NAME = "export"


def command(
    adapter: Annotated[
        Path, typer.Argument(help="Adapter folder, of lightsft or PEFT; or a checkpoint.", show_default=False)
    ],
    to: Annotated[str, typer.Option(help="Format: onnx.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for the graph; must not exist yet.", show_default=False)],
    base: Annotated[
        str | None, typer.Option(help="Base model; by default the one it was trained on.", show_default=False)
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(help="Keep the weights in 8 bits: int8. Not exact.", show_default=False)
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Rows to score model and graph on; by default the test split of the run, if its data is still there.",
            show_default=False,
        ),
    ] = None,
    encoding: Annotated[str, typer.Option(help="Encoding of --data.")] = "utf-8",
    force: Annotated[
        bool, typer.Option("--force", help="Keep an int8 graph that often differs from the one in fp32.")
    ] = False,
    dequantize: Annotated[
        bool,
        typer.Option("--dequantize", help="Take a base that was kept in codes as the weights that they stand for."),
    ] = False,
) -> None:
    """Write a model with its strategy inside as one ONNX graph, checked with onnxruntime against the model."""
    from lightsft.export.onnx_graph import export_folder

    def rows() -> Any:
        from lightsft.export.held_out import held_out

        return held_out(adapter, data, encoding)

    certificate = export_folder(
        adapter, out, to=to, base=base, quantize=quantize, rows=rows, force=force, dequantize=dequantize
    )
    typer.echo(f"exported    {out}")
    typer.echo(
        f"certificate {out / 'certificate.json'}: largest difference {certificate['fp32']['largest_difference']:.1e} "
        f"on {certificate['compared']['inputs']} inputs"
    )
    typer.echo(f"score       {_scores(certificate)}")
    if "int8" in certificate:
        typer.echo(f"int8        {_int8(certificate['int8'])}")


def _scores(certificate: Mapping[str, Any]) -> str:
    if "metric" not in certificate:
        return "not measured: give rows that were not trained on with --data FILE"
    name, rows = certificate["metric"], certificate["examples"]
    text = f"{name} {certificate['score']:.4f} of the model, {certificate['fp32']['score']:.4f} of the graph"
    if "int8" in certificate:
        text += f", {certificate['int8']['score']:.4f} in int8"
    return f"{text}, on {rows} rows"


def _int8(found: Mapping[str, Any]) -> str:
    return (
        f"agrees with fp32 on {100 * found['agreement']:.1f} % of what was compared, largest difference "
        f"{found['largest_difference']:.2g}; {found['bytes'] / found['bytes_of_fp32']:.0%} of the size"
    )
