"""`lightsft export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

NAME = "export"


def command(
    adapter: Annotated[
        Path, typer.Argument(help="Adapter folder, of lightsft or PEFT; or a checkpoint.", show_default=False)
    ],
    to: Annotated[
        str,
        typer.Option(
            help="Format: onnx; gguf for models that generate text; ctranslate2 for these and encoders; transformers, "
            "a folder with code of its own.",
            show_default=False,
        ),
    ],
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
        typer.Option(
            "--type",
            help="With gguf: f16 (the default), bf16, f32 or q8_0. With ctranslate2: float32 (the default), float16, "
            "bfloat16, int16, int8, or int8_float32, int8_float16, int8_bfloat16.",
            show_default=False,
        ),
    ] = None,
    lora: Annotated[
        bool, typer.Option("--lora", help="With gguf: the LoRA alone, to be loaded beside its base.")
    ] = False,
) -> None:
    """Write a model with its strategy inside for another tool, checked against the model.

    The transformers folder is for what no weight can express, and brings its own modelling file (trust_remote_code).
    GGUF and CTranslate2's files are written by their own converters, which are fetched (36 and 43 MB) the first time.
    """
    from lightsft.export.formats import export

    given = {"quantize": quantize, "data": data, "force": force, "dequantize": dequantize, "type": kind, "lora": lora}
    options = {name: value for name, value in given.items() if value not in (None, False)}
    if encoding != "utf-8":
        options["encoding"] = encoding
    exported = export(adapter, out, to=to, base=base, **options)
    for label, text in exported.said.items():
        typer.echo(f"{label:11} {text}")
