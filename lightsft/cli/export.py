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
    to: Annotated[str, typer.Option(help="Format: onnx, or gguf for models that generate text.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist yet.", show_default=False)],
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
    kind: Annotated[
        str | None,
        typer.Option("--type", help="With gguf: f16 (the default), bf16, f32 or q8_0.", show_default=False),
    ] = None,
    lora: Annotated[
        bool, typer.Option("--lora", help="With gguf: the LoRA alone, to be loaded beside its base.")
    ] = False,
) -> None:
    """Write a model with its strategy inside as one ONNX graph or one GGUF file, checked against the model.

    GGUF is written by llama.cpp's own converter, which is fetched (36 MB) the first time.
    """
    _require_used(
        to,
        {
            "onnx": {"--quantize": quantize, "--data": data, "--force": force, "--dequantize": dequantize},
            "gguf": {"--type": kind, "--lora": lora},
        },
    )
    if to == "gguf":
        _to_gguf(adapter, out, base, kind or "f16", lora)
        return
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


def _require_used(to: str, options: Mapping[str, Mapping[str, object]]) -> None:
    """A format that is known, and no option of another."""
    from lightsft.errors import ConfigurationError

    if to not in options:
        raise ConfigurationError(f"no format {to!r}", expected=f"one of {', '.join(options)}")
    unused = [
        name
        for form, given in options.items()
        if form != to
        for name, value in given.items()
        if value not in (None, False)
    ]
    if unused:
        raise ConfigurationError(
            f"{', '.join(unused)} with --to {to}", expected=f"of these options {', '.join(options[to])} or none"
        )


def _to_gguf(source: Path, out: Path, base: str | None, kind: str, lora: bool) -> None:
    from lightsft.export.gguf_file import export_gguf

    certificate = export_gguf(source, out, base=base, kind=kind, lora=lora)
    found = certificate["compared"]
    typer.echo(f"exported    {out / next(iter(certificate['sha256']))}, {certificate['bytes'] / 1e6:.1f} MB")
    typer.echo(
        f"certificate {out / 'certificate.json'}: largest difference {found['largest_difference']:.2g} at logits of up "
        f"to {found['largest_value']:.3g}, limit {found['limit']:.2g}; the same top prediction at "
        f"{found['same_top_prediction']:.1%} of {found['positions']} positions"
    )


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
