"""Masked language modeling: an encoder goes on learning what a domain's texts look like."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from lightsft.data.batching import IGNORED, pad_features
from lightsft.data.columns import ColumnKind
from lightsft.data.problems import Problem
from lightsft.data.reading import Row
from lightsft.errors import ConfigurationError, DataError
from lightsft.tasks.base import Array, Feature, sums_by_row
from lightsft.tasks.language import LanguageTask
from lightsft.tasks.predicting import Said, by_row
from lightsft.tasks.texts import TEXT, text_problems

LIKELIEST = 5  # tokens that a prediction names
MASKED, REPLACED = 0.8, 0.9  # of the chosen tokens 80 % are masked, 10 % replaced, 10 % left (1810.04805, section 3.1)


@dataclass(frozen=True, kw_only=True)
class MaskedLM(LanguageTask):
    """-log softmax(logits)[token] at the chosen tokens, its mean; the score is this loss, its exp a pseudo-perplexity.

    share: of the tokens, how many are chosen. whole_word: choose all tokens of a word or none. max_length: in tokens;
    longer texts are read in windows. What is chosen depends on the text and, in training, on the seed and the epoch,
    so every strategy is asked for the same tokens, and a score is always of the same ones.
    """

    text: str = "text"
    share: float = 0.15
    whole_word: bool = False
    max_length: int = 128

    name: ClassVar[str] = "masked-lm"
    cuts: ClassVar[bool] = False
    columns: ClassVar[Mapping[str, ColumnKind]] = {"text": TEXT}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share < 1:
            raise ConfigurationError(f"share={self.share}", expected="a share of the tokens between 0 and 1")

    @property
    def shifts(self) -> bool:
        """Each token is predicted where it stands."""
        return False

    def text_of(self, row: Row) -> str:
        """The text."""
        return str(row[self.text])

    @property
    def typed_columns(self) -> list[str]:
        """None: what is read is what is predicted."""
        return []

    def problems(self, row: Row) -> Iterator[Problem]:
        """An empty text."""
        yield from text_problems(row, [self.text])

    def encode(self, rows: Sequence[Row], tokenizer: Any) -> list[Feature]:
        """Windows of the texts with the tokens that may be chosen, by words."""
        if tokenizer.mask_token_id is None:
            raise DataError(
                "the tokenizer has no mask token",
                expected="a model made for masked language modeling",
                todo="take --task language-modeling for a causal model",
            )
        features = []
        for number, row in enumerate(rows):
            encoded = tokenizer(
                str(row[self.text]),
                truncation=True,
                max_length=min(self.max_length, tokenizer.model_max_length),
                return_overflowing_tokens=True,
                return_special_tokens_mask=True,
            )
            for part in range(len(encoded["input_ids"])):
                special = encoded["special_tokens_mask"][part]
                words = encoded.word_ids(part) if self.whole_word else range(len(special))
                places = [None if hidden else word for word, hidden in zip(words, special, strict=True)]
                names = ("input_ids", "attention_mask", "token_type_ids")
                kept = {name: encoded[name][part] for name in names if name in encoded}
                features.append({**kept, "labels": kept["input_ids"], "_words": places, "_row": number})
        return features

    def to_predict(self, rows: Sequence[Row], tokenizer: Any) -> list[Feature]:
        """Texts that have masks already: nothing more is masked."""
        mask = str(tokenizer.mask_token)
        bare = [number for number, row in enumerate(rows, 1) if mask not in str(row[self.text])]
        if bare:
            raise DataError(f"row {bare[0]} has no mask", expected=f"{mask} in the place of what is to be found")
        return [{**f, "_words": [None] * len(f["input_ids"])} for f in self.encode(rows, tokenizer)]

    def said(self, outputs: Any, labels: Tensor, features: Sequence[Feature], tokenizer: Any) -> list[Said]:
        """{"masks": [[{"token", "probability"}]]}: for each mask the likeliest tokens."""
        found: list[Said] = []
        for logits, feature in zip(outputs.logits, features, strict=True):
            places = [place for place, token in enumerate(feature["input_ids"]) if token == tokenizer.mask_token_id]
            best = logits[places].float().softmax(-1).topk(LIKELIEST)
            pairs = [list(zip(p.tolist(), i.tolist(), strict=True)) for p, i in zip(*best, strict=True)]
            masks = [[{"token": tokenizer.decode([i]).strip(), "probability": p} for p, i in mask] for mask in pairs]
            found.append({"masks": masks})
        return found

    def said_of_rows(self, said: list[Said], features: Sequence[Feature], rows: Sequence[Row]) -> list[Said]:
        """The masks of all windows."""
        return [{"masks": [mask for one, _ in row for mask in one["masks"]]} for row in by_row(said, features)]

    def collate(self, features: Sequence[Feature], tokenizer: Any) -> dict[str, Tensor]:
        """Padded; tokens that are not drawn yet are, the same ones every time."""
        drawn = [feature if "_drawn" in feature else self.drawn(feature, tokenizer, 0) for feature in features]
        return pad_features(drawn, tokenizer.pad_token_id)

    def drawn(self, feature: Feature, tokenizer: Any, draw: int) -> Feature:
        """Chosen tokens are masked, replaced or left, and carry loss."""
        ids = np.array(feature["input_ids"])
        random = np.random.default_rng(_seed(feature["input_ids"], draw))
        chosen = _chosen(feature["_words"], self.share, random)
        fate = random.random(len(ids))
        changed = np.where(chosen & (fate < MASKED), tokenizer.mask_token_id, ids)
        others = random.integers(0, len(tokenizer), len(ids))
        changed = np.where(chosen & (fate >= MASKED) & (fate < REPLACED), others, changed)
        labels = np.where(chosen, ids, IGNORED)
        return {**feature, "input_ids": changed.tolist(), "labels": labels.tolist(), "_drawn": draw}

    def by_row(self, outcomes: Array, features: Sequence[Feature], tokenizer: Any) -> Array:
        """(rows, 3): the sums of each row's windows."""
        return sums_by_row(outcomes, features)

    def preview(self, row: Row, tokenizer: Any) -> list[tuple[str, bool]]:
        """The text with its masks, and which tokens are to be found."""
        feature = self.drawn(self.encode([row], tokenizer)[0], tokenizer, 0)
        tokens = zip(feature["input_ids"], feature["labels"], strict=True)
        runs = groupby(tokens, key=lambda pair: pair[1] != IGNORED)
        return [(tokenizer.decode([token for token, _ in run]), loss) for loss, run in runs]


def _chosen(words: Sequence[int | None], share: float, random: np.random.Generator) -> Array:
    """(tokens,) of bool: `share` of the words, rounded, at least one; tokens without a word never."""
    known = sorted({word for word in words if word is not None})
    if not known:
        return np.zeros(len(words), dtype=bool)
    picked = set(random.choice(known, max(1, round(share * len(known))), replace=False).tolist())
    return np.array([word in picked for word in words])


def _seed(ids: Sequence[int], draw: int) -> int:
    """The same for the same text and draw, on any machine."""
    digest = hashlib.sha256(f"{draw}:{','.join(map(str, ids))}".encode()).digest()
    return int.from_bytes(digest[:8], "big")
