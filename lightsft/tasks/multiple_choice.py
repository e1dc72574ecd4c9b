"""Multiple choice: which of a few answers to a question is the right one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightsft.data.batching import pad_features
from lightsft.data.columns import ColumnKind
from lightsft.data.problems import Problem
from lightsft.data.reading import Row
from lightsft.errors import DataError
from lightsft.tasks.base import Array, Feature, Metrics, Task
from lightsft.tasks.predicting import Said
from lightsft.tasks.regression import whole_number
from lightsft.tasks.texts import empty, filled, text_problems

# Columns that hold one choice each, in the order in which they are looked for.
SPREAD = (("choice", 0), ("choice", 1), ("ending", 0), ("option", 0), ("option", 1), ("answer", 0), ("sol", 1))
LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True, kw_only=True)
class MultipleChoice(Task):
    """-log softmax(logits)[right choice] over the choices of each question; the score is the accuracy.

    question: a column. choices: a column of lists; or several columns, a choice each (choice0, choice1, ...; A, B,
    ...). label: the number of the right one, its name in the data ({"text": [...], "label": [...]}), its letter or its
    text. counts_from: the number of the first choice, None where labels are no numbers even if they look like it; found
    from the rows. max_length: in tokens, of a question with one choice; the longer of the two is cut.
    """

    question: str = "question"
    choices: tuple[str, ...] = ("choices",)
    label: str = "label"
    counts_from: int | None = 0
    max_length: int = 128

    name: ClassVar[str] = "multiple-choice"
    metric: ClassVar[str] = "accuracy"
    metric_names: ClassVar[tuple[str, ...]] = ("accuracy", "loss")
    columns: ClassVar[Mapping[str, ColumnKind]] = {
        "question": ColumnKind(("question", "context", "ctx", "premise", "sent1", "sentence", "goal"), "text"),
        "label": ColumnKind(("label", "answer", "answerkey", "correct", "target"), "label"),
    }

    def __post_init__(self) -> None:
        choices = (self.choices,) if isinstance(self.choices, str) else tuple(self.choices)
        object.__setattr__(self, "choices", choices)

    @classmethod
    def for_rows(cls, rows: Sequence[Row], source: str, /, **options: Any) -> Self:
        """Columns by name, and from where the labels count."""
        options = {**cls.found_columns(rows, source, options), **options}
        if options.get("choices") is None:
            options["choices"] = choice_columns(list(rows[0]), source)
        made = cls(**options)
        return made if "counts_from" in options else dataclasses.replace(made, counts_from=made._first_number(rows))

    def _first_number(self, rows: Sequence[Row]) -> int | None:
        """1 where all labels are numbers and none is 0; None where all of them are texts of their choices."""
        given = [row for row in rows if filled(row, self.label)]
        if given and all(str(row[self.label]).strip() in self.choices_of(row) for row in given):
            return None
        numbers = [whole_number(row[self.label]) for row in given]
        return int(bool(numbers) and None not in numbers and 0 not in numbers)

    def used_columns(self) -> list[str]:
        """The question, the choices and the label."""
        return [self.question, *self.choices, self.label]

    def read_columns(self) -> list[str]:
        """The question and the first two choices: not every question has all."""
        return [self.question, *self.choices[:2]]

    # ---- rows

    def text_of(self, row: Row) -> str:
        """The question and its choices."""
        return "\n".join([str(row[self.question]), *self.choices_of(row)])

    def inputs(self, row: Row, tokenizer: Any = None) -> list[tuple[str, ...]]:
        """The question with each choice."""
        return [(str(row[self.question]), choice) for choice in self.choices_of(row)]

    def choices_of(self, row: Row) -> list[str]:
        """The choices as texts."""
        if len(self.choices) > 1:
            return [str(row[column]) for column in self.choices if filled(row, column)]
        cell = row.get(self.choices[0])
        cell = cell.get("text", ()) if isinstance(cell, Mapping) else cell  # ARC's form
        return [str(choice) for choice in cell] if isinstance(cell, list | tuple) else []

    def index(self, row: Row) -> int:
        """The number of the right choice from 0; -1 where there is none."""
        choices, label = self.choices_of(row), str(row.get(self.label)).strip()
        cell = row.get(self.choices[0])
        names = [str(name) for name in cell.get("label") or ()] if isinstance(cell, Mapping) else []
        number = None if self.counts_from is None else whole_number(row.get(self.label))
        if label in names:
            found = names.index(label)
        elif number is not None and 0 <= number - (self.counts_from or 0) < len(choices):
            found = number - (self.counts_from or 0)
        elif label in choices:
            found = choices.index(label)
        else:
            found = LETTERS.find(label.upper()) if len(label) == 1 else -1
        return found if found < len(choices) else -1

    def target_of(self, row: Row) -> str:
        """The right choice."""
        return self.choices_of(row)[self.index(row)]

    def problems(self, row: Row) -> Iterator[Problem]:
        """An empty question, fewer than two choices, a label that is none of them."""
        yield from text_problems(row, [self.question])
        if len(self.choices_of(row)) < 2:
            yield Problem("too_few_choices", "has fewer than two choices", "at least two", "correct the row")
        elif not filled(row, self.label):
            yield empty(self.label, "a label in every row")
        elif self.index(row) < 0:
            yield Problem(
                "unknown_label",
                f"has the label {str(row[self.label])!r} with {len(self.choices_of(row))} choices",
                "the number, the letter or the text of one of its choices",
                "correct the row",
            )

    # ---- features and batches

    def encode(self, rows: Sequence[Row], tokenizer: Any) -> list[Feature]:
        """Question and choice as a pair, for each choice; the label's number."""
        limit = min(self.max_length, tokenizer.model_max_length)
        features = []
        for row in rows:
            choices = self.choices_of(row)
            encoded = tokenizer([str(row[self.question])] * len(choices), choices, truncation=True, max_length=limit)
            features.append({**encoded, "labels": self.index(row), "_choices": choices})
        return features

    def length(self, feature: Feature) -> int:
        """Tokens of the longest choice, times the choices."""
        return max(map(len, feature["input_ids"])) * len(feature["input_ids"])

    def collate(self, features: Sequence[Feature], tokenizer: Any) -> dict[str, Tensor]:
        """(batch, choices, tokens); a question with fewer choices repeats its last. labels: right one, choices."""
        names = [name for name in features[0] if name != "labels" and not name.startswith("_")]
        most = max(len(feature["input_ids"]) for feature in features)
        flat = [
            {name: feature[name][min(choice, len(feature[name]) - 1)] for name in names}
            for feature in features
            for choice in range(most)
        ]
        padded = pad_features(flat, tokenizer.pad_token_id)
        labels = torch.tensor([[feature["labels"], len(feature["input_ids"])] for feature in features])
        return {name: value.reshape(len(features), most, -1) for name, value in padded.items()} | {"labels": labels}

    def preview(self, row: Row, tokenizer: Any) -> list[tuple[str, bool]]:
        """Every choice; the right one carries the loss."""
        feature = self.encode([row], tokenizer)[0]
        return [(tokenizer.decode(ids), n == feature["labels"]) for n, ids in enumerate(feature["input_ids"])]

    # ---- loss and scores

    def items(self, labels: Tensor) -> Tensor:
        """The questions."""
        return torch.tensor(labels.shape[0], device=labels.device)

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The formula above, in fp32, over the choices that are there."""
        total = cross_entropy(_of_choices(outputs.logits, labels), labels[:, 0], reduction="sum")
        return self.mean(total, labels, num_items_in_batch)

    def outcomes(self, outputs: Any, labels: Tensor) -> Tensor:
        """(batch, 2): right or not, negative log-likelihood."""
        logits = _of_choices(outputs.logits, labels)
        right = logits.argmax(-1) == labels[:, 0]
        return torch.stack([right.float(), cross_entropy(logits, labels[:, 0], reduction="none")], dim=1)

    def said(self, outputs: Any, labels: Tensor, features: Sequence[Feature], tokenizer: Any) -> list[Said]:
        """{"choice", "index", "probabilities"}: the text of a choice, its number from 0, and a number for each."""
        found = _of_choices(outputs.logits, labels).softmax(-1).cpu()
        kept = [row[: len(f["_choices"])].tolist() for row, f in zip(found, features, strict=True)]
        best = [max(range(len(row)), key=row.__getitem__) for row in kept]
        return [
            {"choice": feature["_choices"][index], "index": index, "probabilities": row}
            for row, index, feature in zip(kept, best, features, strict=True)
        ]

    def metrics(self, outcomes: Array) -> Metrics:
        """Accuracy and loss."""
        return {"accuracy": float(outcomes[:, 0].mean()), "loss": float(outcomes[:, 1].mean())}

    def constant_outcomes(self, train: Sequence[Row], rows: Sequence[Row]) -> Array:
        """Every choice with the same probability."""
        chances = [1 / len(self.choices_of(row)) for row in rows]
        return np.array([[chance, -np.log(chance)] for chance in chances])


def choice_columns(columns: Sequence[str], source: str) -> tuple[str, ...]:
    """The column of lists, or the columns with a choice each, by their names."""
    for name in ("choices", "options", "endings", "answers"):
        if name in columns:
            return (name,)
    lower = {column.lower(): column for column in columns}
    spread = [[f"{stem}{joint}{n}" for n in range(first, first + 10)] for stem, first in SPREAD for joint in ("", "_")]
    for names in (*spread, list(LETTERS.lower())):
        found = [lower[name] for name in names if name in lower]
        if len(found) >= 2:
            return tuple(found)
    raise DataError(
        f"{source} has no column of choices",
        expected=f"a list in choices, or columns choice0, choice1, ...; there are {', '.join(map(repr, columns))}",
        todo='name them: --task "multiple-choice(choices=[first, second])"',
    )


def _of_choices(logits: Tensor, labels: Tensor) -> Tensor:
    """(batch, choices) in fp32, -inf where a question has no such choice."""
    there = torch.arange(logits.shape[1], device=labels.device) < labels[:, 1:2]
    return logits.float().masked_fill(~there, -torch.inf)
