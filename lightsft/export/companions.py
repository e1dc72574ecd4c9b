"""Everything of a checkpoint but its weights, which travels with every export."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from lightsft.files import read_json, write_json

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".ot", ".npz")
_INDEX = ".index.json"
_CARD = "README.md"
_TOKENIZER = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "chat_template", "spiece")
_LEGAL = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "COPYING")


def copy_companions(base: Path, adapter: Path | None, out: Path, dtype: str | None = None) -> None:
    """Configuration, tokenizer, templates, licence: the base's, and over them the adapter's own tokenizer.

    With `dtype`, the configuration says that the weights are kept in it. The base's card describes the base, and stays.
    """
    for name in _files(base):
        (out / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(base / name, out / name)
    if adapter is not None:
        for name in _files(adapter):
            if str(name).startswith(_TOKENIZER):
                shutil.copyfile(adapter / name, out / name)
    if dtype is not None and (out / "config.json").is_file():
        config = read_json(out / "config.json")
        config.pop("torch_dtype", None)
        write_json(out / "config.json", config | {"dtype": dtype})


def copy_licence(base: Path, out: Path) -> None:
    """The licence and the notices of the base."""
    if base.is_dir():
        for name in _files(base):
            if str(name).upper().startswith(_LEGAL):
                shutil.copyfile(base / name, out / name)


def _files(folder: Path) -> Iterator[Path]:
    """Relative to the folder: what is no weight, in it and in the folders that lie in it (1_Pooling/config.json)."""
    for file in sorted((*folder.glob("*"), *folder.glob("*/*"))):
        name = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        weights = file.name.endswith((*_WEIGHTS, _INDEX)) or file.name == "training_args.bin"
        if file.is_file() and not hidden and not weights and str(name) != _CARD:
            yield name
