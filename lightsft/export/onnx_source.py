"""The model that a graph is made of, loaded in fp32; what no graph can be made of is refused."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from lightsft import adapter_files
from lightsft.errors import ConfigurationError
from lightsft.files import read_json

if TYPE_CHECKING:
    from lightsft.backbone import Backbone
    from lightsft.injection import Injection

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_GENERATIVE = ("CAUSAL_LM", "SEQ_2_SEQ_LM")


@dataclass(frozen=True)
class Loaded:
    """A folder, and the model in it; `injection` if it is an adapter's."""

    folder: Path
    backbone: Backbone
    injection: Injection | None


def require_packages() -> None:
    """Raise ConfigurationError where a package that exporting needs is not installed."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"{', '.join(missing)} is not installed"
            if len(missing) == 1
            else f"{', '.join(missing)} are not installed",
            expected="what exporting to ONNX needs",
            todo="pip install lightsft[onnx]",
        )


def require_no_generation(adapter: Path) -> None:
    """Before any weight is read: the folder says what it was trained for."""
    settings = (adapter_files.read_settings(adapter) or {}) if adapter.is_dir() else {}
    peft = (adapter_files.read_peft_settings(adapter) or {}) if adapter.is_dir() else {}
    chat = (settings.get("task") or {}).get("name") == "chat"
    if chat or (not settings and peft.get("task_type") in _GENERATIVE):
        raise _generates(adapter)


def _generates(folder: Path) -> ConfigurationError:
    return ConfigurationError(
        f"{folder} holds a model that generates text, which is not exported to ONNX here",
        expected="a classifier, a token classifier, a question answering or an embedding model",
        todo=f"lightsft merge {folder} --out DIR makes a plain checkpoint that inference servers load; what does not "
        f"merge becomes a folder with code of its own: lightsft export {folder} --to transformers --out DIR",
    )


def load_model(folder: Path, base: str | None, dequantize: bool) -> Loaded:
    """In fp32 on the CPU: an adapter folder on its base, or a checkpoint."""
    from lightsft import artifact
    from lightsft.plain_layers import make_model_plain
    from lightsft.quantization import quantized_layers

    injection: Injection | None = None
    if adapter_files.is_adapter(folder):
        backbone = artifact.load_base(folder, base, dtype="float32", device="cpu")
        injection = artifact.load(folder, backbone)
    else:
        backbone = _checkpoint(folder, base)
    if backbone.quantization is not None:
        import torch

        if not dequantize:
            raise _in_codes(folder, backbone.quantization)
        make_model_plain(backbone.model, quantized_layers(backbone.model).values(), torch.float32)
        backbone.__dict__.pop("quantization", None)
    if backbone.model.can_generate():
        raise _generates(folder)
    return Loaded(folder, backbone, injection)


def _in_codes(folder: Path, quantization: str) -> ConfigurationError:
    return ConfigurationError(
        f"the base of {folder} is kept in codes ({quantization}), for which ONNX has no operation",
        expected="weights in floating point",
        todo="merge first (lightsft merge) and export that folder, or add --dequantize: the graph then holds the "
        "weights that the codes stand for, beside which it was trained",
    )


def _checkpoint(folder: Path, base: str | None) -> Backbone:
    """A whole model, as the class that its configuration names."""
    import transformers

    from lightsft.backbone import Backbone

    if not (folder / "config.json").is_file():
        raise ConfigurationError(
            f"{folder} is neither an adapter folder nor a checkpoint",
            expected="a folder written by lightsft train, merge or compare, or by transformers",
            todo="check the path",
        )
    if base is not None:
        raise ConfigurationError(
            f"{folder} is a whole checkpoint, and --base {base} was given", expected="no base", todo="leave --base out"
        )
    name = (read_json(folder / "config.json").get("architectures") or [""])[0]
    kind = getattr(transformers, name, None)
    if kind is None:
        raise ConfigurationError(f"{folder} holds a {name or 'model of no class'}", expected="a class of transformers")
    if kind.can_generate():
        raise _generates(folder)
    return Backbone.load(folder, task=None, kind=kind, dtype="float32", device="cpu")


def input_names(backbone: Backbone) -> tuple[str, ...]:
    """What the tokenizer gives and the model takes."""
    model = backbone.model
    accepted = inspect.signature(model.forward).parameters
    given = getattr(backbone.tokenizer, "model_input_names", _INPUTS[:2])
    names = tuple(name for name in _INPUTS if name in accepted and name in given)
    if "input_ids" not in names:
        raise ConfigurationError(
            f"{type(model).__name__} takes {model.main_input_name}",
            expected="a model of token ids",
            todo="export it with torch.onnx.export",
        )
    return names
