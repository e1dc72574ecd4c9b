"""One way to every format: `export(source, out, to=...)`, which the command line calls as well.

A format is a function of a source, an output folder and a base; what else it takes, by keyword, are its options, named
like the flags of `lightsft export`. It returns the certificate and what there is to say about it. FORMATS has an entry
for each.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightsft.errors import ConfigurationError

if TYPE_CHECKING:
    from lightsft.export.held_out import HeldOut


@dataclass(frozen=True)
class Exported:
    """A folder that was written, its certificate, and its lines for a reader: a label and what is said of it."""

    folder: Path
    certificate: Mapping[str, Any]
    said: Mapping[str, str] = field(default_factory=dict)


def export(source: str | Path, out: str | Path, *, to: str, base: str | Path | None = None, **options: Any) -> Exported:
    """Write an adapter folder, or a merged checkpoint folder, to `out` in another format.

        export("adapter", "graph", to="onnx", quantize="int8")
        export("adapter", "small", to="gguf", type="q8_0")
        export("adapter", "fast", to="ctranslate2", type="int8")
        export("adapter", "folder", to="transformers")

    `base` defaults to where the adapter was trained from. `options` are those of the format: its function below names
    them.

    Raises ConfigurationError for a format or an option that is not known and for what cannot be converted, MergeError
    where something else is computed, OutputError if `out` holds something. Only what passed its check is left there.
    """
    require_known(to, options)
    write = FORMATS[to]
    return write(Path(source), Path(out), None if base is None else str(base), **options)


def require_known(to: str, options: Iterable[str]) -> None:
    """A format that is known, and no option of another."""
    if to not in FORMATS:
        raise ConfigurationError(f"no format {to!r}", expected=f"one of {', '.join(FORMATS)}")
    taken = options_of(to)
    unused = [f"--{name}" for name in options if name not in taken]
    if unused:
        raise ConfigurationError(
            f"{', '.join(unused)} with --to {to}",
            expected=f"of these options {', '.join(f'--{name}' for name in taken)} or none",
        )


def options_of(to: str) -> tuple[str, ...]:
    """The names of a format's options."""
    parameters = inspect.signature(FORMATS[to]).parameters.values()
    return tuple(one.name for one in parameters if one.kind is inspect.Parameter.KEYWORD_ONLY)


def _onnx(
    source: Path,
    out: Path,
    base: str | None,
    *,
    quantize: str | None = None,
    data: str | Path | None = None,
    encoding: str = "utf-8",
    force: bool = False,
    dequantize: bool = False,
) -> Exported:
    """One graph. `quantize="int8"` keeps weights in 8 bits, `force` keeps it even if it often chooses another label;
    `data` are rows to score, by default those of the run; `dequantize` takes codes as the weights they stand for."""
    from lightsft.export.onnx_graph import export_folder

    rows = _held_out(source, data, encoding)
    certificate = export_folder(
        source, out, base=base, quantize=quantize, rows=rows, force=force, dequantize=dequantize
    )
    said = {
        "exported": str(out),
        "certificate": f"{out / 'certificate.json'}: largest difference "
        f"{certificate['fp32']['largest_difference']:.1e} on {certificate['compared']['inputs']} inputs",
        "score": _scores(certificate),
    }
    if "int8" in certificate:
        said["int8"] = _int8(certificate["int8"])
    return Exported(out, certificate, said)


def _gguf(source: Path, out: Path, base: str | None, *, type: str = "f16", lora: bool = False) -> Exported:
    """One file for llama.cpp, in `type`; with `lora`, the LoRA alone."""
    from lightsft.export.gguf_file import export_gguf

    certificate = export_gguf(source, out, base=base, kind=type, lora=lora)
    return Exported(out, certificate, _one_file(out, certificate))


def _ctranslate2(source: Path, out: Path, base: str | None, *, type: str = "float32") -> Exported:
    """A folder for CTranslate2, its weights in `type`."""
    from lightsft.export.ctranslate2_folder import export_ctranslate2

    certificate = export_ctranslate2(source, out, base=base, kind=type)
    said = _one_file(out, certificate)
    if "compared_in_8_bits" in certificate:
        found = certificate["compared_in_8_bits"]
        same = (
            f", the same top prediction at {found['same_top_prediction']:.1%}" if "same_top_prediction" in found else ""
        )
        said["in 8 bits"] = f"mean difference {found['mean_difference']:.2g}, as {found['computed_in']} computes{same}"
    return Exported(out, certificate, said)


def _transformers(
    source: Path,
    out: Path,
    base: str | None,
    *,
    data: str | Path | None = None,
    encoding: str = "utf-8",
    dequantize: bool = False,
) -> Exported:
    """A folder with its own modelling file. `data` and `dequantize` as of onnx."""
    from lightsft.export.standalone_folder import export_standalone

    found = export_standalone(source, out, base=base, rows=_held_out(source, data, encoding), dequantize=dequantize)
    said = {
        "exported": f"{out}: {found['auto_classes'][0]}.from_pretrained(..., trust_remote_code=True)",
        "certificate": f"{out / 'certificate.json'}: largest difference {found['largest_logit_difference']:.1e} on "
        f"{found['inputs']} inputs",
    }
    if "metric" in found:
        before, after = found["score_before"], found["score_after"]
        score = f"{found['metric']} {before:.4f} of base + strategy, {after:.4f} of the folder"
        said["score"] = f"{score}, on {found['examples']} rows"
    return Exported(out, found, said)


FORMATS: Mapping[str, Callable[..., Exported]] = {
    "onnx": _onnx,
    "gguf": _gguf,
    "ctranslate2": _ctranslate2,
    "transformers": _transformers,
}


def _held_out(source: Path, data: str | Path | None, encoding: str) -> Callable[[], HeldOut | None]:
    def rows() -> HeldOut | None:
        from lightsft.export.held_out import held_out

        return held_out(source, None if data is None else str(data), encoding)

    return rows


def _one_file(out: Path, certificate: Mapping[str, Any]) -> dict[str, str]:
    found = certificate["compared"]
    limited = found.get("limited", "largest_difference")
    same = "at"
    if "same_top_prediction" in found:
        same = f"the same top prediction at {found['same_top_prediction']:.1%} of"
    return {
        "exported": f"{out / next(iter(certificate['sha256']))}, {certificate['bytes'] / 1e6:.1f} MB",
        "certificate": f"{out / 'certificate.json'}: {limited.replace('_', ' ')} {found[limited]:.2g} at "
        f"{found.get('compared', 'logits')} of up to {found['largest_value']:.3g}, limit {found['limit']:.2g}; "
        f"{same} {found['positions']} positions",
    }


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
