"""Language modeling on plain text: a causal language model goes on learning what a domain's texts look like."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lightsft.data.columns import ColumnKind
from lightsft.data.problems import Problem
from lightsft.data.reading import Row
from lightsft.errors import ConfigurationError
from lightsft.tasks.base import Array, Feature, sums_by_row
from lightsft.tasks.continuing import Continues
from lightsft.tasks.language import LanguageTask
from lightsft.tasks.texts import TEXT, text_problems


@dataclass(frozen=True, kw_only=True)
class LanguageModeling(Continues, LanguageTask):
    """Next-token cross-entropy on every token of plain texts, their end included; the score is the loss per token.

    text: the column. max_length: in tokens; longer texts are read in windows of this length. Each begins with the last
    token of the one before, so that every token of a text but its first is predicted exactly once.
    """

    text: str = "text"
    max_length: int = 512

    name: ClassVar[str] = "language-modeling"
    cuts: ClassVar[bool] = False
    columns: ClassVar[Mapping[str, ColumnKind]] = {"text": TEXT}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length < 2:
            raise ConfigurationError(f"max_length={self.max_length}", expected="at least 2: a token and the next one")

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

    def token_problems(self, row: Row, tokenizer: Any) -> Iterator[Problem]:
        """A text of a single token: nothing follows it."""
        if len(self._ids(row, tokenizer)) < 2:
            yield Problem("too_short", "has a single token", "a text of at least two", "remove the row")

    def encode(self, rows: Sequence[Row], tokenizer: Any) -> list[Feature]:
        """Windows of the texts, each token a label."""
        size = min(self.max_length, tokenizer.model_max_length)
        features = []
        for number, row in enumerate(rows):
            ids = self._ids(row, tokenizer)
            for start in range(0, max(1, len(ids) - 1), size - 1):
                part = ids[start : start + size]
                features.append({"input_ids": part, "attention_mask": [1] * len(part), "labels": part, "_row": number})
        return features

    def prompt_ids(self, row: Row, tokenizer: Any) -> list[int]:
        """The text, which is not over: its last tokens, as many as are read at once in training."""
        ids = list(tokenizer(str(row[self.text]), truncation=False, verbose=False)["input_ids"])
        ended = len(ids) > 1 and ids[-1] == tokenizer.eos_token_id
        return (ids[:-1] if ended else ids)[-min(self.max_length, tokenizer.model_max_length) :]

    def _ids(self, row: Row, tokenizer: Any) -> list[int]:
        ids = list(tokenizer(str(row[self.text]), truncation=False)["input_ids"])
        end = tokenizer.eos_token_id
        return ids if end is None or ids[-1:] == [end] else [*ids, end]

    def by_row(self, outcomes: Array, features: Sequence[Feature], tokenizer: Any) -> Array:
        """(rows, 3): the sums of each row's windows."""
        return sums_by_row(outcomes, features)

    def preview(self, row: Row, tokenizer: Any) -> list[tuple[str, bool]]:
        """The first token is given, the rest carries loss."""
        ids = self.encode([row], tokenizer)[0]["input_ids"]
        return [(tokenizer.decode(ids[:1]), False), (tokenizer.decode(ids[1:]), True)]
