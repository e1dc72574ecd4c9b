"""Audio classification: one label per recording."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from math import gcd
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lightsft.data.columns import ColumnKind
from lightsft.data.problems import Problem
from lightsft.data.reading import Row
from lightsft.errors import ConfigurationError
from lightsft.tasks.base import Array, Feature
from lightsft.tasks.image_classification import content_of, digest_of
from lightsft.tasks.labelled import LABEL, Labelled

SHORTEST = 0.1  # seconds


@dataclass(frozen=True, kw_only=True)
class AudioClassification(Labelled):
    """Cross-entropy over `labels`; the checkpoint's feature extractor turns samples into what the model reads.

    audio: a column of paths, of {"bytes", "path"} or of {"array", "sampling_rate"} as `datasets` keeps them. Channels
    are averaged, the rate is brought to the extractor's. max_seconds: longer recordings are cut. Silence is added to
    what is shorter than a tenth of a second: less than a model's first layer reads at once has no output.
    """

    audio: str = "audio"
    max_seconds: float = 10.0

    reads_text: ClassVar[bool] = False
    name: ClassVar[str] = "audio-classification"
    columns: ClassVar[Mapping[str, ColumnKind]] = {
        "audio": ColumnKind(("audio", "sound", "file", "path", "recording", "speech"), "file"),
        "label": LABEL,
    }

    def text_of(self, row: Row) -> str:
        """The file's name, or a digest of what is in memory."""
        return content_of(_samples_or_file(row[self.audio]))

    def compared(self, row: Row) -> str:
        """A digest of the recording's file, or of its samples."""
        return digest_of(_samples_or_file(row[self.audio]))

    def problems(self, row: Row) -> Iterator[Problem]:
        """What is no recording, unknown labels."""
        try:
            samples, rate = samples_of(row.get(self.audio))
            if not len(samples) or rate <= 0:
                raise ValueError("it has no samples")
        except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
            yield Problem(
                "broken_file",
                f"has no readable recording in {self.audio!r}: {str(error)[:80]}",
                "a path, a mapping with bytes or path, or one with array and sampling_rate",
                "correct or remove the file",
            )
        yield from self.label_problems(row)

    def encode(self, rows: Sequence[Row], tokenizer: Any) -> list[Feature]:
        """The recording as it is, and the label's index."""
        return [{"_audio": row[self.audio], "labels": self.index(row)} for row in rows]

    def length(self, feature: Feature) -> int:
        """Recordings are not sorted by length: that would take decoding all of them."""
        return 1

    def collate(self, features: Sequence[Feature], tokenizer: Any) -> dict[str, Tensor]:
        """What the extractor makes of the samples, padded."""
        rate = int(tokenizer.sampling_rate)
        recordings = [self._heard(feature["_audio"], rate) for feature in features]
        options = {"padding": True} if _pads_on_demand(tokenizer) else {}
        processed = tokenizer(recordings, sampling_rate=rate, return_tensors="pt", **options)
        return {**processed, "labels": torch.tensor([feature["labels"] for feature in features])}

    def _heard(self, cell: Any, rate: int) -> Array:
        """(samples,) at this rate, of at most max_seconds and at least SHORTEST."""
        samples, own = samples_of(cell)
        sound = resampled(samples[: int(self.max_seconds * own)], own, rate)
        return np.pad(sound, (0, max(0, int(SHORTEST * rate) - len(sound))))

    def preview(self, row: Row, tokenizer: Any) -> list[tuple[str, bool]]:
        """The recording's name and length, and the label."""
        samples, rate = samples_of(row[self.audio])
        return [(f"{self.text_of(row)} {len(samples) / rate:.2f} s at {rate} Hz", False), (self.target_of(row), True)]


def _samples_or_file(cell: Any) -> Any:
    return np.asarray(cell["array"]) if isinstance(cell, Mapping) and "array" in cell else cell


def samples_of(cell: Any) -> tuple[Array, int]:
    """(samples,) in fp32, the mean of all channels, and the rate in Hz."""
    if isinstance(cell, Mapping) and "array" in cell:
        array = np.asarray(cell["array"])
        scale = -float(np.iinfo(array.dtype).min) if array.dtype.kind == "i" else 1.0
        return _mono(array.T.astype(np.float32) / np.float32(scale)), int(cell["sampling_rate"])
    try:
        import soundfile
    except ImportError as error:
        raise ConfigurationError(
            "recordings are read with soundfile, which is not installed",
            expected="the package soundfile",
            todo="pip install 'lightsft[audio]'",
        ) from error
    file = cell
    if isinstance(cell, Mapping):
        file = cell["path"] if cell.get("bytes") is None else BytesIO(cell["bytes"])
    samples, rate = soundfile.read(file, dtype="float32", always_2d=True)
    return _mono(samples), int(rate)


def _mono(samples: Array) -> Array:
    return samples.mean(axis=1) if samples.ndim == 2 else samples


def _pads_on_demand(extractor: Any) -> bool:
    """Whether a batch is padded only if asked for; others pad every recording to the length that their model reads."""
    asked = inspect.signature(extractor.__call__).parameters.get("padding")
    return asked is not None and not asked.default


def resampled(samples: Array, rate: int, wanted: int) -> Array:
    """The same sound at another rate, by a polyphase filter."""
    if rate == wanted:
        return samples
    from scipy.signal import resample_poly

    common = gcd(rate, wanted)
    return np.asarray(resample_poly(samples, wanted // common, rate // common), dtype=np.float32)
