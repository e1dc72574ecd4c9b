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
    for file in _files(base):
        shutil.copyfile(file, out / file.name)
    for file in _files(adapter) if adapter is not None else ():
        if file.name.startswith(_TOKENIZER):
            shutil.copyfile(file, out / file.name)
    if dtype is not None and (out / "config.json").is_file():
        config = read_json(out / "config.json")
        config.pop("torch_dtype", None)
        write_json(out / "config.json", config | {"dtype": dtype})


def copy_licence(base: Path, out: Path) -> None:
    """The licence and the notices of the base."""
    if base.is_dir():
        for file in _files(base):
            if file.name.upper().startswith(_LEGAL):
                shutil.copyfile(file, out / file.name)


def _files(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.iterdir()):
        hidden = file.name.startswith(".")
        weights = file.name.endswith((*_WEIGHTS, _INDEX)) or file.name == "training_args.bin"
        if file.is_file() and not hidden and not weights and file.name != _CARD:
            yield file
