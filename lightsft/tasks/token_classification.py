"""Token classification: a tag per word. Named entities, parts of speech, semantic roles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightsft.data.batching import IGNORED, pad_features
from lightsft.data.columns import ColumnKind
from lightsft.data.problems import Problem
from lightsft.data.reading import Row, require_columns
from lightsft.errors import DataError
from lightsft.metrics.entities import (
    broken,
    counts,
    entity_per_type,
    entity_scores,
    find_entities,
    scheme_of,
    types_of,
)
from lightsft.tasks.base import Array, Feature, Metrics, Task
from lightsft.tasks.labelled import in_order
from lightsft.tasks.predicting import Said, by_row
from lightsft.tasks.regression import whole_number
from lightsft.tasks.respelling import Respelling
from lightsft.tasks.tagged import sentence, words_of
from lightsft.tasks.windows import windows_of_words

PLAIN = "plain"  # tags without entities, such as parts of speech
SUMS = 3  # outcomes before the entities: likelihood, right, words


@dataclass(frozen=True, kw_only=True)
class TokenClassification(Task):
    """-log softmax(logits)[tag] at the first sub-token of each word, its mean over words.

    tokens, tags: columns of lists, one tag per word. labels: the tags, in the head's order. scheme: BIO, IOB1, BIOES,
    BILOU, BMES, IO, or plain for tags without entities; by default what the tags look like. predicate: a column with
    the number of a word from 0 (semantic role labelling); that word is a text of its own beside the sentence
    (1904.05255), before it, and stands between marks in it. max_length: in tokens; longer sentences are read in several
    windows, so that no word goes untagged.
    """

    tokens: str = "tokens"
    tags: str = "tags"
    predicate: str | None = None
    labels: tuple[str, ...] = ()
    scheme: str = "BIO"
    max_length: int = 128

    name: ClassVar[str] = "token-classification"
    cuts: ClassVar[bool] = False
    metric_names: ClassVar[tuple[str, ...]] = (
        "f1", "precision", "recall", "macro_f1", "macro_precision", "macro_recall", "weighted_f1", "token_accuracy",
        "loss",
    )  # fmt: skip
    packs: ClassVar[bool] = True
    columns: ClassVar[Mapping[str, ColumnKind]] = {
        "tokens": ColumnKind(("tokens", "words", "text", "sentence"), "tokens"),
        "tags": ColumnKind(("tags", "ner_tags", "labels", "pos_tags", "ner", "upos", "roles"), "tags"),
        "predicate": ColumnKind(("predicate", "predicate_index", "verb"), "number", optional=True),
    }

    @property
    def metric(self) -> str:  # type: ignore[override]
        """F1 over entities, or accuracy over words where there are none."""
        return "token_accuracy" if self.scheme == PLAIN else "f1"

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(str(label) for label in self.labels))
        if len(set(self.labels)) != len(self.labels) or len(self.labels) < 2:
            raise DataError(f"the tags are {', '.join(self.labels)}", expected="at least two different tags")
        if self.scheme != PLAIN:
            find_entities(self.labels, self.scheme)  # refuses what is no scheme, and tags that it does not have

    @classmethod
    def of_labels(cls, labels: Sequence[str], **options: Any) -> Self:
        """The scheme is what the tags look like."""
        return cls(labels=tuple(labels), scheme=scheme_of([[label] for label in labels]), **options)

    @classmethod
    def for_rows(cls, rows: Sequence[Row], source: str, /, **options: Any) -> Self:
        """Columns by name and content, tags as they occur, the scheme that they look like."""
        options = {**cls.found_columns(rows, source, options), **options}
        require_columns(rows, [options["tokens"], options["tags"]], source)
        cells = [row.get(options["tags"]) for row in rows]
        listed = [tuple(map(str, cell)) for cell in cells if isinstance(cell, list | tuple)]
        if not listed:
            raise DataError(
                f"{source}: the column {options['tags']!r} holds no lists",
                expected="a list of tags per row, one per word",
                todo="name the right column with the option tags",
            )
        if options.get("labels") is None:
            options["labels"] = in_order({tag for tags in listed for tag in tags})
        if options.get("scheme") is None:
            options["scheme"] = scheme_of(listed)
        return cls(**options)

    # ---- rows

    def text_of(self, row: Row) -> str:
        """The words, with spaces between them."""
        return " ".join(map(str, row[self.tokens]))

    def classes(self, row: Row) -> tuple[str, ...]:
        """The types of the entities, or the tags where there are none."""
        tags = {str(tag) for tag in row[self.tags]}
        return tuple(sorted(tags)) if self.scheme == PLAIN else tuple(types_of(tags, self.scheme))

    def problems(self, row: Row) -> Iterator[Problem]:
        """Lists that do not match, unknown tags, sequences that the scheme does not allow."""
        words, tags = row.get(self.tokens), row.get(self.tags)
        expected = "a list of words and a list of as many tags"
        if not isinstance(words, list | tuple) or not isinstance(tags, list | tuple):
            yield Problem("no_list", f"has no list in {self.tokens!r} or {self.tags!r}", expected)
        elif not any(str(word).strip() for word in words):
            yield Problem("empty_cell", "has no words", expected, "remove the row")
        elif len(words) != len(tags):
            yield Problem("tags_do_not_match", f"has {len(words)} words and {len(tags)} tags", expected)
        elif unknown := [tag for tag in map(str, tags) if tag not in self.labels]:
            yield Problem(
                "unknown_label",
                f"has the tag {unknown[0]!r}",
                f"one of {', '.join(map(repr, self.labels))}",
                "correct the row, or name all tags with --labels",
            )
        else:
            yield from _blank(words)
            yield from self._broken(tags)
            yield from self._predicate_problems(row, len(words))

    def _broken(self, tags: Sequence[Any]) -> Iterator[Problem]:
        positions = [] if self.scheme == PLAIN else broken(list(map(str, tags)), self.scheme)
        if positions:
            first = positions[0]
            before = str(tags[first - 1]) if first else "the beginning"
            yield Problem(
                "broken_sequence",
                f"has {str(tags[first])!r} after {before!r} (word {first + 1}; {len(positions)} such words)",
                f"a sequence that {self.scheme} allows",
                "correct the tags, or name another scheme; it is trained on as it is",
                severity="warning",
            )

    def _predicate_problems(self, row: Row, words: int) -> Iterator[Problem]:
        if self.predicate is None:
            return
        number = whole_number(row.get(self.predicate))
        if number is None or not 0 <= number < words:
            yield Problem(
                "no_predicate",
                f"has {row.get(self.predicate)!r} in {self.predicate!r}",
                f"the number of a word, from 0 to {words - 1}",
                "correct the row",
            )

    def token_problems(self, row: Row, tokenizer: Any) -> Iterator[Problem]:
        """Words of which the tokenizer leaves nothing: they carry no loss, and are never predicted."""
        try:
            places = {word for feature in self.encode([row], tokenizer) for word in feature["_words"]}
        except DataError as error:
            yield Problem("no_room", f"cannot be read: {error.found}", error.expected, error.todo)
            return
        lost = [number for number in range(len(row[self.tokens])) if number not in places]
        expected, todo = "at least one token per word", "correct the words; such a word is predicted without a tag"
        if len(lost) == len(row[self.tokens]):
            yield Problem("no_tokens", "has no word that leaves a token", expected, todo)
        elif lost and any(str(row[self.tokens][number]).strip() for number in lost):
            number = next(number for number in lost if str(row[self.tokens][number]).strip())
            found = f"has the word {str(row[self.tokens][number])!r}, of which no token is left"
            yield Problem("no_tokens", found, expected, todo, severity="warning")

    # ---- features

    def encode(self, rows: Sequence[Row], tokenizer: Any) -> list[Feature]:
        """Windows of the sentences; the tag's index at the first sub-token of each word, IGNORED elsewhere."""
        index = {label: number for number, label in enumerate(self.labels)}
        features = []
        for number, row in enumerate(rows):
            words = [str(word) for word in row[self.tokens]]
            tags = [index.get(str(tag), IGNORED) for tag in row.get(self.tags) or [None] * len(words)]
            marked = None if self.predicate is None else whole_number(row[self.predicate])
            for feature, places in windows_of_words(words, tokenizer, self.max_length, marked):
                labels = [IGNORED if word is None else tags[word] for word in places]
                features.append({**feature, "labels": labels, "_words": places, "_row": number, "_tags": tags})
        return features

    def collate(self, features: Sequence[Feature], tokenizer: Any) -> dict[str, Tensor]:
        """Padded on the right, whatever the tokenizer does: labels stay beside their tokens."""
        return pad_features(features, tokenizer.pad_token_id)

    # ---- loss and scores

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The formula above, in fp32."""
        total = cross_entropy(outputs.logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="sum")
        return self.mean(total, labels, num_items_in_batch)

    def outcomes(self, outputs: Any, labels: Tensor) -> Tensor:
        """(batch, 1 + max_length): summed negative log-likelihood, then the predicted tag of each token."""
        logits = outputs.logits.float()
        losses = cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none").sum(1)
        predicted = logits.argmax(-1)[:, : self.max_length].float()
        wide = torch.nn.functional.pad(predicted, (0, self.max_length - predicted.shape[1]))
        return torch.cat([losses[:, None], wide], dim=1)

    def by_row(self, outcomes: Array, features: Sequence[Feature], tokenizer: Any) -> Array:
        """(rows, 3 + 3 types): likelihood, right words, words; entities right, predicted, true of each type.

        A word that no window reached counts as predicted without a tag.
        """
        rows: dict[int, list[Any]] = {}
        for (likelihood, *predicted), feature in zip(outcomes.tolist(), features, strict=True):
            row = rows.setdefault(feature["_row"], [0.0, [self.outside] * len(feature["_tags"]), feature["_tags"]])
            row[0] += likelihood
            for place, word in enumerate(feature["_words"]):
                if word is not None:
                    row[1][word] = int(predicted[place])
        return np.array([self._outcome(*rows[number]) for number in sorted(rows)])

    def _outcome(self, likelihood: float, predicted: list[int], truth: list[int]) -> Array:
        right = sum(one == other for one, other in zip(predicted, truth, strict=True))
        sums = [likelihood, right, len(truth)]
        if self.scheme == PLAIN:
            return np.array(sums)
        names = [[self.labels[tag] for tag in tags] for tags in (truth, predicted)]
        return np.concatenate([sums, counts(names[0], names[1], self.types, self.scheme)])

    def read_columns(self) -> list[str]:
        """The words, and the predicate."""
        return [self.tokens] + ([self.predicate] if self.predicate else [])

    def to_predict(self, rows: Sequence[Row], tokenizer: Any) -> list[Feature]:
        """Windows of words; a text is cut into words first."""
        features = self.encode([{**row, self.tokens: words_of(row[self.tokens])[0]} for row in rows], tokenizer)
        return [{**feature, "labels": [IGNORED] * len(feature["labels"])} for feature in features]

    def said(self, outputs: Any, labels: Tensor, features: Sequence[Feature], tokenizer: Any) -> list[Said]:
        """{word: (tag, probability)} of each window."""
        best = outputs.logits.float().softmax(-1).max(dim=-1)
        found = []
        for scores, tags, feature in zip(best.values.tolist(), best.indices.tolist(), features, strict=True):
            places = [(place, word) for place, word in enumerate(feature["_words"]) if word is not None]
            found.append({str(word): (self.labels[tags[place]], scores[place]) for place, word in places})
        return found

    def said_of_rows(self, said: list[Said], features: Sequence[Feature], rows: Sequence[Row]) -> list[Said]:
        """{"words", "tags", "scores", "entities"}; an entity has a type, a text, its characters and a probability."""
        outside = self.labels[self.outside]
        found = []
        for row, windows in zip(rows, by_row(said, features), strict=True):
            tagged = {word: tag for window, _ in windows for word, tag in window.items()}
            found.append(sentence(row[self.tokens], tagged, outside, None if self.scheme == PLAIN else self.scheme))
        return found

    @property
    def outside(self) -> int:
        """The tag of a word that has no token."""
        return self.labels.index("O") if "O" in self.labels else 0

    @cached_property
    def types(self) -> list[str]:
        """The entity types."""
        return types_of(self.labels, self.scheme)

    def metrics(self, outcomes: Array) -> Metrics:
        """Precision, recall and F1 over entities as seqeval defines them, per type too; accuracy over words."""
        likelihood, right, words = outcomes[:, :SUMS].sum(axis=0)
        found: Metrics = {"token_accuracy": float(right / words), "loss": float(likelihood / words)}
        if self.scheme == PLAIN:
            return found
        entities = outcomes[:, SUMS:]
        return found | entity_scores(entities) | {"per_class": entity_per_type(entities, self.types)}

    def respelled(self, row: Row, change: Respelling) -> Row:
        """Other words in the places of the words, so that every tag keeps its own."""
        return {**row, self.tokens: change([str(word) for word in row[self.tokens]])}

    def constant_outcomes(self, train: Sequence[Row], rows: Sequence[Row]) -> Array:
        """Always the most frequent tag of `train`."""
        tags = [str(tag) for row in train for tag in row[self.tags]]
        most = self.labels.index(max(set(tags), key=tags.count))
        index = {label: number for number, label in enumerate(self.labels)}
        truth = [[index[str(tag)] for tag in row[self.tags]] for row in rows]
        likelihood = -np.log(max(1e-12, tags.count(self.labels[most]) / len(tags)))
        return np.array([self._outcome(likelihood * len(t), [most] * len(t), t) for t in truth])


def _blank(words: Sequence[Any]) -> Iterator[Problem]:
    """Words without a letter: no token stands for them."""
    blank = [number for number, word in enumerate(words, 1) if not str(word).strip()]
    if blank:
        found = f"has a word without a character (word {blank[0]}; {len(blank)} such words)"
        todo = "remove them with their tags; such a word is predicted without a tag"
        yield Problem("blank_word", found, "words", todo, severity="warning")
