"""Export a model that generates text as GGUF, by llama.cpp's own converter, checked before anything is left.

    model-TYPE.gguf    weights, configuration, tokenizer and chat template, for llama.cpp and what is built on it
    lora-TYPE.gguf     with lora=True: the LoRA alone, to be loaded beside a GGUF file of its base
    certificate.json, licence

An adapter is merged in fp32 first. The file is read back with transformers and its logits are compared with those of
the checkpoint that it was made of; a LoRA is added to the base as llama.cpp adds it.
"""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightsft import adapter_files
from lightsft.errors import ConfigurationError
from lightsft.export.gguf_check import LIMITS, add_lora, compared, compared_lora, read_back, require_close, same_tokens
from lightsft.export.gguf_converter import LLAMA_CPP, LORA, MODEL, Conversion, convert
from lightsft.export.plain_checkpoint import architecture, require_plain
from lightsft.files import new_folder, read_json, require_free, sha256, write_json

TYPES = tuple(LIMITS)


def export_gguf(
    source: Path, out: Path, *, base: str | None = None, kind: str = "f16", lora: bool = False
) -> dict[str, Any]:
    """Convert, check, write; returns the certificate.

    `source` is a merged checkpoint or an adapter folder, `kind` one of f32, f16, bf16, q8_0. With `lora`, the LoRA in
    an adapter folder is written alone.

    Raises ConfigurationError for what the converter or the check does not know, MergeError for an adapter that does not
    merge and for a file that computes something else, OutputError if `out` holds something.
    """
    if kind not in TYPES:
        raise ConfigurationError(f"type {kind!r}", expected=f"one of {', '.join(TYPES)}")
    require_free(out)
    adapter = adapter_files.is_adapter(source)
    if lora:
        _require_lora(source)
    elif not adapter:
        _require_checkpoint(source, base)
    with new_folder(out) as folder:
        if lora:
            return _lora(source, folder, base, kind, out)
        merged: dict[str, Any] = {}
        if not adapter:
            return _model(source, folder, kind, out, merged)
        from lightsft.export.merge import merge_folder

        merged = merge_folder(source, folder / "merged", base=base, dtype="float32")
        _require_checkpoint(folder / "merged", None)
        certificate = _model(folder / "merged", folder, kind, out, {"adapter": source, "merge": merged})
        shutil.rmtree(folder / "merged")
        return certificate


def _model(source: Path, folder: Path, kind: str, out: Path, merged: dict[str, Any]) -> dict[str, Any]:
    """model-TYPE.gguf and its certificate."""
    from lightsft.backbone import Backbone
    from lightsft.export.certificate import logits_of
    from lightsft.export.inputs import inputs_to_compare

    file = folder / f"model-{kind}.gguf"
    conversion = Conversion(MODEL, source, file, kind, ("--model-name", out.resolve().name))
    by_hand = conversion.by_hand(source, file.name)
    if merged:
        by_hand = f"lightsft merge {merged['adapter']} --out merged; {conversion.by_hand(Path('merged'), file.name)}"
    convert(conversion, by_hand)
    backbone = Backbone.load(source, task="chat", dtype="float32", device="cpu")
    batches = inputs_to_compare(backbone, None)
    expected = logits_of(backbone, batches)
    tokenizer = backbone.tokenizer
    del backbone
    logits, read = read_back(file, batches, by_hand)
    found = compared(expected, logits, kind)
    require_close(found, "a type with more bits is closer: --type f32")
    same = same_tokens(tokenizer, read)
    return _certify(source, folder, conversion, {"compared": found, "same_tokens": same}, merged)


def _lora(source: Path, folder: Path, base: str | None, kind: str, out: Path) -> dict[str, Any]:
    """lora-TYPE.gguf and its certificate."""
    from lightsft import artifact
    from lightsft.export.certificate import logits_of
    from lightsft.export.inputs import inputs_to_compare

    backbone = artifact.load_base(source, base, dtype="float32", device="cpu", as_quantized=False)
    injection = artifact.load(source, backbone, other_quantization=True)
    origin = Path(str(backbone.source))
    _require_checkpoint(origin, None)
    batches = inputs_to_compare(backbone, None)
    tuned = logits_of(backbone, batches)
    with injection.disabled():
        plain = logits_of(backbone, batches)
    del backbone, injection
    file, weights = folder / f"lora-{kind}.gguf", folder / "base.gguf"
    conversion = Conversion(LORA, source, file, kind, ("--base", str(origin)))
    convert(conversion, conversion.by_hand(source, file.name))
    convert(Conversion(MODEL, origin, weights, "f32"), conversion.by_hand(source, file.name))
    matrices = add_lora(weights, file)
    read, _ = read_back(weights, batches, conversion.by_hand(source, file.name))
    weights.unlink()
    found = compared_lora(plain, tuned, read, kind)
    require_close(found, "leave --lora out: the adapter is merged first")
    return _certify(origin, folder, conversion, {"compared": found, "matrices": matrices}, {"adapter": source})


def _certify(
    source: Path, folder: Path, conversion: Conversion, found: dict[str, Any], merged: dict[str, Any]
) -> dict[str, Any]:
    from lightsft.export.companions import copy_licence
    from lightsft.export.provenance import CERTIFICATE, hashes, provenance

    merge = merged.get("merge")
    origin = provenance(merged.get("adapter"), source if merge is None else str(merge["base"]))
    certificate = {
        "format": "gguf",
        "type": conversion.type,
        "bytes": conversion.file.stat().st_size,
        "sha256": {conversion.file.name: sha256(conversion.file)},
        "converter": {
            "package": LLAMA_CPP.requirement,
            "script": conversion.script,
            "sha256": sha256(conversion.path()),
        },
        **found,
        **origin,
        "versions": origin["versions"] | {"gguf": version("gguf")},
        "source_sha256": hashes(source),
    }
    if merge is not None:
        certificate["merge"] = {name: value for name, value in merge.items() if name != "rounding_by_weight"}
    copy_licence(source, folder)
    write_json(folder / CERTIFICATE, certificate)
    return certificate


def _require_lora(source: Path) -> None:
    settings = (adapter_files.read_peft_settings(source) or {}) if adapter_files.is_adapter(source) else {}
    if settings.get("peft_type") != "LORA":
        raise ConfigurationError(
            f"{source} holds no LoRA that llama.cpp's converter reads",
            expected="an adapter folder with adapter_config.json of PEFT's LoRA",
            todo=f"leave --lora out, or make a LoRA of it first: lightsft convert {source} --to lora --out DIR",
        )
    if settings.get("use_dora"):
        raise ConfigurationError(
            f"{source} holds a DoRA", expected="a LoRA; GGUF has no place for DoRA's lengths", todo="leave --lora out"
        )


def _require_checkpoint(folder: Path, base: str | None) -> None:
    """A checkpoint in floating point of a model that generates text, of a class of transformers."""
    config = require_plain(folder, base)
    _require_no_code(folder)
    _require_generative(folder, architecture(config))


def _require_generative(folder: Path, name: str) -> None:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() and hasattr(transformers, name):
        raise ConfigurationError(
            f"{folder} holds {name}",
            expected="a causal language model, whose logits can be compared",
            todo="classifiers and embedding models are exported with --to onnx",
        )


def _require_no_code(folder: Path) -> None:
    """The converter loads tokenizers with trust_remote_code."""
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).is_file() and "auto_map" in read_json(folder / name):
            raise ConfigurationError(
                f"{folder / name} names code of its own, which the converter would run",
                expected="a model and a tokenizer that transformers has",
                todo="if you trust it, run convert_hf_to_gguf.py of llama.cpp yourself",
            )
