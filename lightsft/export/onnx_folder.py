"""What lies in an exported folder: the graph, in 8 bits if wanted, and what travels with it."""

from __future__ import annotations

import copy
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightsft import adapter_files
from lightsft.export.onnx_source import PACKAGES, Loaded
from lightsft.files import sha256

MODEL = "model.onnx"


def quantize_weights(folder: Path) -> dict[str, Any]:
    """model.onnx with its weights in 8 bits, in the place of the one in fp32.

    Unsigned on both sides, since signed weights overflow on processors without VNNI; a scale for each output channel.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    from lightsft.export.onnx_tracing import silent

    path, scratch = folder / MODEL, folder / f"int8.{MODEL}"
    before = _size(folder)
    large = any(file.name != MODEL for file in _graph_files(folder))
    with silent():
        quantize_dynamic(path, scratch, weight_type=QuantType.QUInt8, per_channel=True, use_external_data_format=large)
    for file in _graph_files(folder):
        if not file.name.startswith("int8."):
            file.unlink()
    return _put_in_place(folder, scratch) | {"bytes_of_fp32": before, "bytes": _size(folder)}


def _put_in_place(folder: Path, scratch: Path) -> dict[str, Any]:
    """The graph under its own name; a file of weights beside it keeps the name that the graph knows it by."""
    import onnx

    graph = onnx.load(scratch, load_external_data=False).graph
    scratch.rename(folder / MODEL)
    return {"integer_products": sum(node.op_type in ("MatMulInteger", "ConvInteger") for node in graph.node)}


def _graph_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if MODEL in file.name)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in _graph_files(folder))


def write_companions(loaded: Loaded, folder: Path, longest: int | None) -> None:
    """Configuration with the labels, tokenizer cutting where training and graph do, licence."""
    from lightsft.export.companions import copy_licence

    backbone = loaded.backbone
    config = copy.deepcopy(backbone.model.config)
    config.architectures = [type(backbone.model).__name__]
    config.save_pretrained(folder)
    if backbone.tokenizer is not None:
        task = (adapter_files.read_settings(loaded.folder) or {}).get("task") or {}
        limits = (backbone.tokenizer.model_max_length, task.get("max_length"), longest)
        backbone.tokenizer.model_max_length = min(limit for limit in limits if limit)
        backbone.tokenizer.save_pretrained(folder)
    copy_licence(Path(str(backbone.source)), folder)


def origin(loaded: Loaded, folder: Path) -> dict[str, Any]:
    """Folders, hashes and versions."""
    from lightsft.export.provenance import hashes, provenance

    source = str(loaded.backbone.source)
    adapter = None if loaded.injection is None else loaded.folder
    found = provenance(adapter, source)
    return {
        **found,
        "strategy": None if loaded.injection is None else type(loaded.injection.strategy).__name__,
        "versions": found["versions"] | {name: version(name) for name in PACKAGES},
        "sha256": {file.name: sha256(file) for file in _graph_files(folder)},
        "base_sha256": hashes(Path(source)),
    }


def opset(path: Path) -> int:
    """The version of ONNX's own operations that a graph is written in."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    return int(next(used.version for used in model.opset_import if not used.domain))
