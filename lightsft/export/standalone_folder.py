"""Export a model with a strategy that no weight can express as a transformers folder that brings its own code.

    model.safetensors       the base's weights under their names, with what merges in them; the parts' tensors
    modeling_lightsft.py    the base's class with the parts on it; imports torch and transformers alone
    config.json             the parts, and which Auto classes load it (`trust_remote_code=True`)
    tokenizer, chat template, generation settings, licence, README.md, certificate.json

What a part is made of there it says itself (`Part.standalone`). Before the folder is left in place, a process where
lightsft cannot be imported loads it and answers what base + strategy have answered here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from lightsft import artifact
from lightsft.adapter_files import is_adapter
from lightsft.errors import ArtifactError, ConfigurationError
from lightsft.export.companions import copy_licence, keep_length
from lightsft.export.inputs import score
from lightsft.export.provenance import CERTIFICATE, provenance
from lightsft.export.standalone_card import write_standalone_card
from lightsft.export.standalone_check import answers_elsewhere, answers_here, certified, questions, require_passed
from lightsft.export.standalone_model import parts_of, write_model
from lightsft.files import new_folder, require_free, write_json
from lightsft.plain_layers import make_model_plain
from lightsft.quantization import quantized_layers
from lightsft.quiet import quiet

if TYPE_CHECKING:
    from lightsft.backbone import Backbone
    from lightsft.export.held_out import HeldOut
    from lightsft.injection import Injection

FORMAT = "transformers"


def export_standalone(
    adapter: str | Path,
    out: str | Path,
    *,
    base: str | None = None,
    rows: HeldOut | Callable[[], HeldOut | None] | None = None,
    dequantize: bool = False,
    max_shard_size: int | None = None,
) -> dict[str, Any]:
    """Write the folder, check it on random inputs and on `rows`; returns the certificate.

    `dequantize` takes a base that was kept in codes as the weights that they stand for. `max_shard_size` in bytes.

    Raises ConfigurationError where nothing but weights changes (`lightsft merge` needs no code) and for what has no
    stand-in outside lightsft, MergeError where the folder does not run or answers something else, OutputError if `out`
    holds something.
    """
    adapter, out = Path(adapter), Path(out)
    require_free(out)
    injection = _loaded(adapter, base, dequantize)
    backbone, parts = injection.backbone, parts_of(injection, adapter)
    held = rows() if callable(rows) else rows
    asked = questions(backbone, held, int(getattr(injection.strategy, "positions_taken", 0)))
    tuned = answers_here(backbone, asked)
    with injection.disabled():
        plain = answers_here(backbone, asked)
    certificate: dict[str, Any] = {"format": FORMAT, "strategy": type(injection.strategy).__name__}
    if held is not None:
        certificate |= {"metric": held.task.metric, "examples": len(held.rows), "score_before": score(backbone, held)}
    with quiet(), new_folder(out) as folder:
        written = write_model(injection, parts, folder, max_shard_size)
        _write_companions(backbone, adapter, folder)
        elsewhere = answers_elsewhere(folder, written.auto_classes[0], asked)
        half_precision = backbone.stored_dtype != torch.float32
        certificate |= certified(asked, plain=plain, tuned=tuned, elsewhere=elsewhere, half_precision=half_precision)
        require_passed(certificate)
        if held is not None:
            exported: Any = SimpleNamespace(model=written.model, tokenizer=backbone.tokenizer)
            certificate["score_after"] = score(exported, held)
        certificate |= {"auto_classes": written.auto_classes, "parts": [part.listed for part in written.parts]}
        certificate |= provenance(adapter, str(backbone.source), checked=folder)
        write_json(folder / CERTIFICATE, certificate)
        write_standalone_card(folder, certificate)
    return certificate


def _loaded(adapter: Path, base: str | None, dequantize: bool) -> Injection:
    """The strategy on its base, whose weights are in floating point, and of a class of transformers."""
    if not is_adapter(adapter):
        raise ArtifactError(
            f"{adapter} holds no adapter",
            expected="an adapter folder written by lightsft or PEFT",
            todo="check the path; a merged checkpoint is loaded by transformers as it is",
        )
    backbone = artifact.load_base(adapter, base, dtype="checkpoint", device="cpu")
    kind = type(backbone.model)
    if not kind.__module__.startswith("transformers."):
        raise ConfigurationError(
            f"{kind.__name__} is defined in {kind.__module__}",
            expected="a class of transformers, which the exported file can import",
            todo="use the adapter folder beside the model's own code (lightsft.load)",
        )
    if backbone.quantization is not None and not dequantize:
        raise ConfigurationError(
            f"the base of {adapter} is kept in codes ({backbone.quantization})",
            expected="weights in floating point",
            todo="add --dequantize: the folder then holds the weights that the codes stand for, beside which it was "
            "trained",
        )
    injection = artifact.load(adapter, backbone)
    if backbone.quantization is not None:
        make_model_plain(backbone.model, quantized_layers(backbone.model).values(), backbone.stored_dtype)
        backbone.__dict__.pop("quantization", None)
    return injection


def _write_companions(backbone: Backbone, adapter: Path, folder: Path) -> None:
    if backbone.tokenizer is not None:
        keep_length(backbone.tokenizer, adapter)
        backbone.tokenizer.save_pretrained(folder)
    copy_licence(Path(str(backbone.source)), folder)
