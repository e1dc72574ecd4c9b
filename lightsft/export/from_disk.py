"""Merge from disk to disk: the changes that an adapter folder makes to a checkpoint folder, found without a model."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightsft.adapter_files import read_peft_settings, read_settings
from lightsft.errors import ArtifactError, OutputError
from lightsft.export.checkpoint_files import Checkpoint, read_checkpoint
from lightsft.export.companions import copy_companions
from lightsft.export.layout import TYPES, Entry, Made, WrittenFile, entries, plan
from lightsft.export.plain_lora import plain_lora
from lightsft.export.rounding import Rounding
from lightsft.export.stored_rows import StoredRows
from lightsft.export.streaming import Report, write
from lightsft.files import read_json
from lightsft.row_changes import as_matrix
from lightsft.sketch import same_values, sketched

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CODED = 4  # quantized matrices that are compared with what a base is recognised by
SPARE = 2**26  # bytes beside the weights
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*"]


@dataclass(frozen=True)
class DiskMerge:
    """The base's files, what becomes of which tensor, and the adapter folder that says so (None: several).

    `settings`: what config.json says otherwise than the base's; the `tokenizer` where it is another.
    """

    adapter: Path | None
    checkpoint: Checkpoint
    entries: Mapping[str, Entry]
    settings: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    max_shard_size: int | None = None
    tokenizer: Any = None

    @property
    def files(self) -> tuple[WrittenFile, ...]:
        """What is to be written."""
        dtype = None if self.dtype is None else DTYPES[self.dtype]
        return plan(self.checkpoint, self.entries, dtype=dtype, max_shard_size=self.max_shard_size)

    def write(self, files: tuple[WrittenFile, ...], folder: Path, report: Report | None = None) -> list[Rounding]:
        """Write weights and companions; what rounding loses of each change."""
        own = {} if self.dtype is None else {"dtype": self.dtype}
        copy_companions(self.checkpoint.folder, self.adapter, folder, {**self.settings, **own})
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        write(self.checkpoint, files, folder, report)
        written = (tensor for file in files for tensor in file.tensors if tensor.entry.change is not None)
        return [Rounding(t.entry.name, *t.lost.norms(math.prod(t.entry.shape))) for t in written]


def from_disk(
    adapter: Path, base: str | None, *, dtype: str = "checkpoint", max_shard_size: int | None = None
) -> DiskMerge | None:
    """The merge of an adapter folder into a folder of safetensors; None where that takes a model in memory.

    Raises BackboneError for a damaged base, ArtifactError for an adapter that does not fit it.
    """
    folder = base_folder(adapter, base)
    if folder is None or dtype not in ("checkpoint", *DTYPES) or not any(folder.glob("*.safetensors")):
        return None
    checkpoint = read_checkpoint(folder)
    trained_on = (read_settings(adapter) or {}).get("base", {})
    beside_codes = trained_on.get("quantization") is not None
    by_names = _is_same_class(trained_on, folder) and not beside_codes
    changes = plain_lora(adapter, checkpoint) if by_names else None
    made = None if changes is None else Made(entries(checkpoint, changes), {})
    if made is None:
        from lightsft.export.from_shapes import made_by_shapes

        made = made_by_shapes(adapter, checkpoint)
    if made is None:
        return None
    _check_sketch(adapter, trained_on.get("sketch", {}), made.entries, folder)
    wanted = None if dtype == "checkpoint" else dtype
    return DiskMerge(adapter, checkpoint, made.entries, made.settings, wanted, max_shard_size, made.tokenizer)


def base_folder(adapter: Path, base: str | None) -> Path | None:
    """Where the base is: as given, or as the adapter says; None if that is no folder of a checkpoint."""
    settings, peft = read_settings(adapter) or {}, read_peft_settings(adapter) or {}
    source = base or settings.get("base", {}).get("source") or peft.get("base_model_name_or_path")
    folder = _folder_of(str(source)) if source else None
    return folder if folder is not None and (folder / "config.json").is_file() else None


def _folder_of(source: str) -> Path | None:
    """A folder as it is; of a hub id the snapshot in the cache, brought there first if that can be."""
    if Path(source).exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    with suppress(LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError):
        return Path(snapshot_download(source, allow_patterns=HUB_FILES))  # of an unreachable hub, what the cache has
    return None


def _is_same_class(trained_on: Mapping[str, Any], folder: Path) -> bool:
    """Whether it was trained beside a model of the class that wrote the checkpoint; PEFT's folders do not say."""
    architectures = read_json(folder / "config.json").get("architectures") or []
    return not trained_on or trained_on.get("class") in architectures


def _check_sketch(
    adapter: Path, sketch: Mapping[str, Sequence[float]], made: Mapping[str, Entry], folder: Path
) -> None:
    """Refuse a base that holds other values than the one that the adapter was trained on."""
    held = [name for name in sketch if name in made and made[name].dtype in TYPES and made[name].source is not None]
    in_codes = [name for name in held if made[name].recoding is not None][CODED:]  # coding a matrix takes a while
    different = [
        f"{name} holds other values"
        for name in held
        if name not in in_codes and not same_values(_values(made[name]), torch.tensor(sketch[name]))
    ]
    if different:
        shown = "\n  ".join(different[:6]) + (f"\n  and {len(different) - 6} more" if len(different) > 6 else "")
        raise ArtifactError(
            f"{adapter} was trained on another model than the one in {folder}:\n  {shown}",
            expected="the base that it was trained on",
            todo="name that with --base",
        )


def _values(entry: Entry) -> Tensor:
    """Those that a sketch holds of the weight (out, in), read from the file."""
    assert entry.source is not None
    rows, columns = as_matrix(entry.source.shape)
    stored, found = StoredRows(entry), []
    transposed = entry.recoding is not None and entry.recoding.transposed
    for position in sketched(rows * columns):
        row, column = divmod(position, rows)[::-1] if transposed else divmod(position, columns)
        found.append(stored(slice(row, row + 1))[0, column])
    return torch.stack(found)


def require_place(out: Path, base: Path, size: int) -> None:
    """Raise OutputError where `out` would lie in the base's folder or around it, or the disk has no room for it."""
    place, source = out.resolve(), base.resolve()
    if place == source or source in place.parents or place in source.parents:
        raise OutputError(
            f"{out} and the base {base} lie in one another",
            expected="a folder apart from the base's, which is never written to",
            todo="choose another --out",
        )
    existing = next(folder for folder in place.parents if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < size + SPARE:
        raise OutputError(
            f"{out} takes {size / 1e9:.2f} GB, and {existing} has {free / 1e9:.2f} GB left",
            expected="room for the whole checkpoint",
            todo="free some space or choose another --out; nothing was written",
        )
