"""Image classification: one label per image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightsft.data.columns import ColumnKind
from lightsft.data.problems import Problem
from lightsft.data.reading import Row
from lightsft.errors import ConfigurationError
from lightsft.tasks.base import Feature
from lightsft.tasks.labelled import LABEL, Labelled


@dataclass(frozen=True, kw_only=True)
class ImageClassification(Labelled):
    """Cross-entropy over `labels`; the checkpoint's image processor resizes and normalises.

    image: a column of paths, of PIL images, or of {"bytes", "path"} as `datasets` keeps them. Images are decoded when
    their batch is made.
    """

    image: str = "image"

    reads_text: ClassVar[bool] = False
    name: ClassVar[str] = "image-classification"
    columns: ClassVar[Mapping[str, ColumnKind]] = {
        "image": ColumnKind(("image", "img", "file", "path", "image_path", "pixels"), "file"),
        "label": LABEL,
    }

    def text_of(self, row: Row) -> str:
        """The file's name, or a digest of what is in memory."""
        return content_of(row[self.image])

    def compared(self, row: Row) -> str:
        """A digest of the image's file."""
        return digest_of(row[self.image])

    def problems(self, row: Row) -> Iterator[Problem]:
        """What is no image, unknown labels."""
        try:
            with _opened(row.get(self.image)) as image:
                image.load()
        except ConfigurationError:
            raise
        except Exception as error:  # whatever a decoder raises on what is broken
            yield Problem(
                "broken_file",
                f"has no readable image in {self.image!r}: {str(error)[:80]}",
                "a path, a PIL image, or a mapping with bytes or path",
                "correct or remove the file",
            )
        yield from self.label_problems(row)

    def encode(self, rows: Sequence[Row], tokenizer: Any) -> list[Feature]:
        """The image as it is, and the label's index."""
        return [{"_image": row[self.image], "labels": self.index(row)} for row in rows]

    def length(self, feature: Feature) -> int:
        """Every image costs the same."""
        return 1

    def collate(self, features: Sequence[Feature], tokenizer: Any) -> dict[str, Tensor]:
        """(batch, channels, height, width) pixels as the processor makes them."""
        images = [_as_rgb(feature["_image"]) for feature in features]
        processed = tokenizer(images, return_tensors="pt")
        return {**processed, "labels": torch.tensor([feature["labels"] for feature in features])}

    def preview(self, row: Row, tokenizer: Any) -> list[tuple[str, bool]]:
        """The image's name and size, and the label."""
        with _opened(row[self.image]) as image:
            shown = f"{content_of(row[self.image])} {image.size[0]} x {image.size[1]}"
        return [(shown, False), (self.target_of(row), True)]


def content_of(cell: Any) -> str:
    """What a file is called: its path, or a digest of its bytes."""
    path = cell.get("path") if isinstance(cell, Mapping) and cell.get("bytes") is None else cell
    return str(path) if isinstance(path, str | Path) else digest_of(cell)


def digest_of(cell: Any) -> str:
    """What tells a file from another, whatever it is called: the SHA-256 of its bytes. OSError if it is not there."""
    from hashlib import sha256

    if isinstance(cell, Mapping):
        cell = cell["path"] if cell.get("bytes") is None else cell["bytes"]
    if isinstance(cell, str | Path):
        cell = Path(cell).read_bytes()
    return sha256(cell if isinstance(cell, bytes) else cell.tobytes()).hexdigest()


def _opened(cell: Any) -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ConfigurationError(
            "images are read with Pillow, which is not installed",
            expected="the package pillow",
            todo="pip install 'lightsft[images]'",
        ) from error
    if isinstance(cell, Image.Image):
        return cell.copy()
    if isinstance(cell, Mapping):
        return Image.open(cell["path"] if cell.get("bytes") is None else BytesIO(cell["bytes"]))
    return Image.open(cell)


def _as_rgb(cell: Any) -> Any:
    """Turned as the camera says it was held; transparency is dropped."""
    from PIL import ImageOps

    with _opened(cell) as image:
        return ImageOps.exif_transpose(image).convert("RGB")
