"""Export a model with its strategy inside as one ONNX graph, which runs where neither lightsft nor torch is installed.

    model.onnx          the graph: input_ids, attention_mask (token_type_ids) -> logits in fp32, any batch and length
    model.onnx.data     its weights, where they are more than 2 GB
    config.json, tokenizer, licence, certificate.json

What a strategy adds runs in hooks, and is traced like the rest of the model. The graph is run by onnxruntime on inputs
of several sizes before anything is left in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightsft.errors import ConfigurationError, MergeError
from lightsft.export.onnx_folder import MODEL, opset, origin, quantize_weights, write_companions
from lightsft.export.onnx_source import Loaded, input_names, load_model, require_no_generation, require_packages
from lightsft.files import new_folder, require_free, write_json

if TYPE_CHECKING:
    from lightsft.export.held_out import HeldOut
    from lightsft.export.onnx_check import Batch

QUANTIZATIONS = ("int8",)
LIMIT = 1e-4  # of the largest logit: fp32 arithmetic in another order
LEAST_AGREEMENT = 0.95  # share of positions at which int8 has to choose what fp32 chooses


def export_folder(
    adapter: Path,
    out: Path,
    *,
    base: str | None = None,
    quantize: str | None = None,
    rows: HeldOut | Callable[[], HeldOut | None] | None = None,
    force: bool = False,
    dequantize: bool = False,
) -> dict[str, Any]:
    """Trace, check on random tokens and on `rows`, write; returns the certificate.

    Raises MergeError where the model cannot be traced or the graph computes something else, ConfigurationError for what
    cannot be asked for, OutputError if `out` holds something.
    """
    _require_known(quantize)
    require_free(out)
    require_packages()
    require_no_generation(adapter)
    loaded = load_model(adapter, base, dequantize)
    held = rows() if callable(rows) else rows
    with new_folder(out) as folder:
        certificate = _exported(loaded, folder, held, quantize, force)
        write_companions(loaded, folder, certificate["longest_input"])
        certificate |= origin(loaded, folder)
        write_json(folder / "certificate.json", certificate)
    return certificate


def _exported(loaded: Loaded, folder: Path, rows: HeldOut | None, quantize: str | None, force: bool) -> dict[str, Any]:
    """Write model.onnx; what was found on the way."""
    from lightsft.export.inputs import score
    from lightsft.export.onnx_check import OnnxModel, answers, compared, onnx_score, random_batches, row_batches
    from lightsft.export.onnx_tracing import trace_to_onnx

    backbone, names = loaded.backbone, input_names(loaded.backbone)
    taken = 0 if loaded.injection is None else int(getattr(loaded.injection.strategy, "positions_taken", 0))
    example = random_batches(backbone, names, None, taken)[5]
    traced = trace_to_onnx(backbone.model, example)
    given = random_batches(backbone, names, traced.longest, taken)
    random, given = len(given), given + row_batches(backbone, names, rows)
    expected = answers(backbone.model, given, traced.outputs)
    traced.program.save(str(folder / MODEL))
    graph = OnnxModel(folder / MODEL)
    found = compared(given, expected, answers(graph, given, traced.outputs))
    certificate: dict[str, Any] = {
        "format": "onnx",
        "opset": opset(folder / MODEL),
        "providers": graph.providers,
        "inputs": list(names),
        "outputs": list(traced.outputs),
        "longest_input": traced.longest,
        "compared": _described(given, random),
        "limit": LIMIT,
        "limit_applies_to": "largest difference in units of the largest value",
        "fp32": found,
    }
    if loaded.injection is not None:
        with loaded.injection.disabled():
            plain = answers(backbone.model, given, traced.outputs)
        certificate["largest_adapter_effect"] = compared(given, plain, expected)["largest_difference"]
    _require_close(found)
    if rows is not None:
        certificate |= {"metric": rows.task.metric, "examples": len(rows.rows), "score": score(backbone, rows)}
        found["score"] = onnx_score(graph, backbone, rows)
    if quantize is not None:
        del graph
        certificate["int8"] = quantize_weights(folder)
        small = OnnxModel(folder / MODEL)
        chosen = slice(random if len(given) > random else 0, None)  # rows say more than random tokens
        lost = compared(given[chosen], expected[chosen], answers(small, given[chosen], traced.outputs))
        certificate["int8"] |= {**lost, "limit": LEAST_AGREEMENT, "limit_applies_to": "agreement", "forced": force}
        if rows is not None:
            certificate["int8"]["score"] = onnx_score(small, backbone, rows)
        _require_agreement(certificate["int8"], force)
    return certificate


def _require_known(quantize: str | None) -> None:
    if quantize is not None and quantize not in QUANTIZATIONS:
        raise ConfigurationError(f"quantize={quantize!r}", expected=f"one of {', '.join(QUANTIZATIONS)}, or none")


def _require_close(found: Mapping[str, Any]) -> None:
    relative = found["relative_difference"]
    if relative is None or relative > LIMIT:
        raise MergeError(
            f"the graph differs from the model by {found['largest_difference']} at values of up to "
            f"{found['largest_value']:.3g}",
            expected=f"at most {LIMIT:g} of the largest value, on every batch size and length",
            todo="nothing was written; ship a merged checkpoint or the adapter folder, and report the model's name",
        )


def _require_agreement(found: Mapping[str, Any], force: bool) -> None:
    agreement = found["agreement"]
    if not force and (agreement is None or agreement < LEAST_AGREEMENT):
        share = "not a number" if agreement is None else f"{100 * agreement:.1f} %"
        raise MergeError(
            f"in int8 the graph agrees with fp32 on {share} of what was compared",
            expected=f"at least {100 * LEAST_AGREEMENT:g} %",
            todo="nothing was written; leave --quantize out, compare on real rows with --data FILE, or keep it all the "
            "same with --force",
        )


def _described(given: Sequence[Batch], random: int) -> dict[str, Any]:
    """What was compared: how many inputs, of which sizes, how many of them padded."""
    padded = [batch for batch in given if "attention_mask" in batch and not bool(batch["attention_mask"].all())]
    return {
        "inputs": sum(len(batch["input_ids"]) for batch in given),
        "random_inputs": sum(len(batch["input_ids"]) for batch in given[:random]),
        "sizes": sorted({tuple(batch["input_ids"].shape) for batch in given}),
        "batches_with_padding": len(padded),
    }
