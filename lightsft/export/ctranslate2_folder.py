"""Export a model in CTranslate2's format, by its own converter, checked before anything is left.

    model.bin                           weights
    config.json, vocabulary.json        CTranslate2's: special tokens and the vocabulary
    tokenizer, chat template, generation_config.json, licence, README.md, certificate.json

An adapter is merged in fp32 first. CTranslate2 loads the result and computes on random tokens what torch computes from
the checkpoint that it was made of.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightsft import adapter_files
from lightsft.errors import ConfigurationError
from lightsft.export.ctranslate2_check import (
    EXACT,
    LIMITS,
    compared,
    compared_in_8_bits,
    expected,
    random_inputs,
    require_close,
    require_vocabulary,
)
from lightsft.export.ctranslate2_converter import (
    CTRANSLATE2,
    SETTINGS,
    Conversion,
    command,
    convert,
    known,
    read_back,
)
from lightsft.export.plain_checkpoint import architecture, require_plain
from lightsft.files import new_folder, read_json, require_free, sha256, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from lightsft.backbone import Backbone

TYPES = tuple(LIMITS)
MODEL = "model.bin"
_WITHOUT_HEAD = "classifiers and other models with a head beside the language model are exported with --to onnx"


def export_ctranslate2(source: Path, out: Path, *, base: str | None = None, kind: str = "float32") -> dict[str, Any]:
    """Convert, check, write; returns the certificate.

    `source` is a merged checkpoint or an adapter folder, `kind` one of TYPES.

    Raises ConfigurationError for what the converter does not know or fails on, MergeError for an adapter that does not
    merge and for a model that computes something else, OutputError if `out` holds something.
    """
    if kind not in TYPES:
        raise ConfigurationError(f"type {kind!r}", expected=f"one of {', '.join(TYPES)}")
    require_free(out)
    if not adapter_files.is_adapter(source):
        require_plain(source, base)
        with new_folder(out) as folder:
            return _converted(Conversion(source, folder / "converted", kind, command(source, kind)), folder, {})
    task = _require_no_classifier(source)
    with new_folder(out) as folder:
        from lightsft.export.merge import merge_folder

        check = "auto" if task else "tiles"  # what no task is known of cannot be loaded for one
        merged = merge_folder(source, folder / "merged", base=base, dtype="float32", check=check)
        by_hand = f"lightsft merge {source} --dtype float32 --out merged; {command('merged', kind)}"
        conversion = Conversion(folder / "merged", folder / "converted", kind, by_hand)
        certificate = _converted(conversion, folder, {"adapter": source, "merge": merged})
        shutil.rmtree(folder / "merged")
        return certificate


def _converted(conversion: Conversion, folder: Path, merged: dict[str, Any]) -> dict[str, Any]:
    """The converted model with all that goes along, in `folder`."""
    checkpoint = conversion.checkpoint
    require_plain(checkpoint, None)
    kind = _kind(checkpoint, conversion)
    exact = replace(conversion, type=EXACT)
    convert(exact)
    backbone = _loaded(checkpoint)
    left_out = require_vocabulary(_vocabulary(exact.out), backbone.tokenizer)
    inputs = random_inputs(backbone, kind)
    wanted = expected(backbone, inputs, read_json(exact.out / SETTINGS))
    spelled = inputs.as_text(backbone.tokenizer)
    del backbone
    measured = _measured(exact, wanted, spelled)
    if conversion.type != EXACT:  # first that it is converted, then what rounding makes of it
        shutil.rmtree(exact.out)
        convert(conversion)
        measured = {"compared_in_float32": measured["compared"], **_measured(conversion, wanted, spelled)}
    _copy(checkpoint, conversion.out, folder)
    return _certify(conversion, folder, {"kind": kind, "tokens_left_out": left_out, **measured}, merged)


def _measured(conversion: Conversion, wanted: list[Tensor], spelled: dict[str, Any]) -> dict[str, Any]:
    """With the weights as the values that they stand for; and as it computes by default, where that is not the same."""
    found, kind = read_back(conversion.out, spelled), spelled["kind"]
    wider = "nothing was written; a type with more bits is closer: --type float32"
    todo = conversion.with_another() if conversion.type == EXACT else wider
    measured = {"compared": compared(wanted, found.pop(EXACT), kind, conversion.type)}
    require_close(measured["compared"], todo)
    for computed_in, rows in found.items():
        measured["compared_in_8_bits"] = compared_in_8_bits(wanted, rows, kind, conversion.type, computed_in)
        require_close(measured["compared_in_8_bits"], todo)
    return measured


def _kind(checkpoint: Path, conversion: Conversion) -> str:
    """generator, translator or encoder; raises ConfigurationError where the converter makes none of these of it."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    from lightsft.backbone import loading

    with loading(str(checkpoint)):
        config = transformers.AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    name, converted, stored = type(config).__name__, known(), architecture(read_json(checkpoint / SETTINGS))
    if name not in converted:
        raise ConfigurationError(
            f"CTranslate2 ({CTRANSLATE2.requirement}) has no conversion for {name}",
            expected=f"one of {', '.join(sorted(converted))}",
            todo=conversion.with_another(),
        )
    kind: Any = getattr(transformers, stored, None)
    made = converted[name]
    if kind is not None and kind.main_input_name != "input_ids":
        raise ConfigurationError(
            f"{checkpoint} holds {stored}, which takes {kind.main_input_name}",
            expected="a model of token ids, so that both can be compared",
            todo=f"nothing was written; without a check: {conversion.by_hand}",
        )
    generates = kind is not None and kind.can_generate()
    fits = stored == made or (made.startswith("Auto") and generates)
    headless = stored in MODEL_MAPPING_NAMES.values() and not getattr(transformers, made).can_generate()
    if not (headless or (fits and generates)):
        raise ConfigurationError(
            f"{checkpoint} holds {stored}, and of a {name} CTranslate2's converter reads a {made}",
            expected="a language model, an encoder-decoder over tokens, or an encoder without a head",
            todo=f"nothing was written; {_WITHOUT_HEAD}",
        )
    if config.is_encoder_decoder:
        return "translator"
    return "generator" if generates else "encoder"


def _loaded(checkpoint: Path) -> Backbone:
    import transformers

    from lightsft.backbone import Backbone

    kind = getattr(transformers, architecture(read_json(checkpoint / SETTINGS)))
    return Backbone.load(checkpoint, task=None, kind=kind, dtype="float32", device="cpu")


def _vocabulary(folder: Path) -> list[str]:
    """The tokens by number; of a translator, which has one for both sides, that."""
    names = ("vocabulary.json", "shared_vocabulary.json", "source_vocabulary.json")
    found: list[str] = read_json(next(folder / name for name in names if (folder / name).is_file()))
    return found


def _copy(checkpoint: Path, converted: Path, folder: Path) -> None:
    """All but the checkpoint's configuration, whose name CTranslate2 takes for its own."""
    from lightsft.export.companions import copy_companions

    copy_companions(checkpoint, None, folder)
    (folder / "certificate.json").unlink(missing_ok=True)
    for file in converted.iterdir():
        file.replace(folder / file.name)
    converted.rmdir()


def _certify(conversion: Conversion, folder: Path, found: dict[str, Any], merged: dict[str, Any]) -> dict[str, Any]:
    from lightsft.export.model_card import write_export_card
    from lightsft.export.provenance import CERTIFICATE, hashes, provenance

    merge, adapter, checkpoint = merged.get("merge"), merged.get("adapter"), conversion.checkpoint
    origin = provenance(adapter, checkpoint if merge is None else str(merge["base"]))
    certificate = {
        "format": "ctranslate2",
        "type": conversion.type,
        "bytes": (folder / MODEL).stat().st_size,
        "sha256": {MODEL: sha256(folder / MODEL)},
        "converter": {"package": CTRANSLATE2.requirement},
        **found,
        **origin,
        "source_sha256": hashes(checkpoint),
    }
    if merge is not None:
        certificate["merge"] = {name: value for name, value in merge.items() if name != "rounding_by_weight"}
    write_json(folder / CERTIFICATE, certificate)
    write_export_card(folder, certificate)
    return certificate


def _require_no_classifier(adapter: Path) -> str | None:
    """The task that an adapter was trained for, if the folder says; before anything is merged."""
    from lightsft.backbone import AUTO_CLASSES

    settings, peft = adapter_files.read_settings(adapter) or {}, adapter_files.read_peft_settings(adapter) or {}
    task = str((settings.get("task") or {}).get("name"))
    said = AUTO_CLASSES.get(task, "") or str(peft.get("task_type") or "")
    if said.endswith(("Classification", "_CLS")):
        raise ConfigurationError(
            f"{adapter} holds a classifier, and CTranslate2 has no place for its head",
            expected="a language model, an encoder-decoder, or an encoder without a head",
            todo="export it with --to onnx",
        )
    return task if task in AUTO_CLASSES else None
