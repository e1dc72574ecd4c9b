"""What every task answers: which rows it needs, how they become tensors, the loss, and the score."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from lightsft.data.batching import IGNORED, pad_features
from lightsft.data.columns import ColumnKind, Guess, guess
from lightsft.data.problems import Problem
from lightsft.data.reading import Row, require_columns
from lightsft.errors import ConfigurationError, DataError
from lightsft.metrics.units import NO_UNIT, POINTS, POINTS_OF_HUNDRED, Unit
from lightsft.tasks.predicting import Said, require_filled, said_of
from lightsft.tasks.respelling import Respelling, words_changed

Metrics = dict[str, Any]
Array = np.ndarray[Any, Any]
Feature = dict[str, Any]


class Task(ABC):
    """Rows -> features -> batches -> loss and outcomes -> metrics. A subclass is a frozen dataclass of its settings.

    A row becomes one feature, or several where a text is too long for one (`_row` then says which row it is of).
    Keys of a feature that start with `_` are for `by_row` and never become tensors. Outcomes are a small array per
    example: enough to compute every metric again later, on any resample of the examples. They are what is stored,
    not the logits.
    """

    name: ClassVar[str]
    metric: ClassVar[str]  # the default score
    metric_names: ClassVar[tuple[str, ...]]  # the scores that may decide
    lower_is_better: ClassVar[frozenset[str]] = frozenset({"loss", "perplexity"})
    without_unit: ClassVar[frozenset[str]] = frozenset({"loss", "perplexity"})  # the scores that are not said in points
    of_hundred: ClassVar[frozenset[str]] = frozenset({"bleu", "chrf"})  # those from 0 to 100; the rest are shares
    columns: ClassVar[Mapping[str, ColumnKind]] = {}  # the fields that name a column, and what is in it
    targets: ClassVar[frozenset[str]] = frozenset({"label"})  # of these fields, those that are predicted
    asked: ClassVar[str] = "text"  # what a text alone is called in a prediction
    packs: ClassVar[bool] = False  # whether each position's loss depends on its own sequence alone
    key_name: ClassVar[str] = ""  # what `key` is, in a word or two, where it is not the text
    reads_text: ClassVar[bool] = True  # or files, of which `text_of` is a name
    cuts: ClassVar[bool] = True  # whether what exceeds max_length is lost, or read in further windows
    adds_special_tokens: ClassVar[bool] = True  # whether the tokenizer puts its own around the inputs

    # ---- settings

    @property
    def shifts(self) -> bool:
        """Whether the logits of a token are for the next one."""
        return False

    @classmethod
    def for_rows(cls, rows: Sequence[Row], source: str, /, **options: Any) -> Self:
        """The task with what `options` leave open found in the rows: columns, and in subclasses labels."""
        return cls(**{**cls.found_columns(rows, source, options), **options})

    @classmethod
    def found_columns(cls, rows: Sequence[Row], source: str, options: Mapping[str, Any]) -> Guess:
        """Columns for the fields that `options` do not name; DataError for one that is named and not there."""
        require_columns(rows, [options[name] for name in cls.columns if options.get(name) is not None], source)
        taken = {str(options[name]) for name in cls.columns if options.get(name) is not None}
        wanted = {name: kind for name, kind in cls.columns.items() if options.get(name) is None}
        return guess(rows, wanted, taken=taken, source=source)

    def for_model(self, reads_both_ways: bool) -> Self:
        """The task for a model with an encoder and a decoder, or for any other."""
        return self

    def describe(self) -> dict[str, Any]:
        """The settings needed to predict later; `task(**describe())` is this task again."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {"name": self.name, **{k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}}

    def greater_is_better(self, metric: str) -> bool:
        """Whether more of this score is better."""
        return metric not in self.lower_is_better

    def unit(self, metric: str) -> Unit:
        """How differences of this score are said."""
        if metric in self.without_unit:
            return NO_UNIT
        return POINTS_OF_HUNDRED if metric in self.of_hundred else POINTS

    def require_metric(self, metric: str) -> None:
        """Raise ConfigurationError unless this score may decide."""
        if metric not in self.metric_names:
            raise ConfigurationError(
                f"{self.name} has no metric {metric!r}", expected=f"one of {', '.join(self.metric_names)}"
            )

    # ---- rows

    @abstractmethod
    def text_of(self, row: Row) -> str:
        """The text that is read, by which duplicates are told and splits are made."""

    def key(self, row: Row) -> str:
        """The text that decides which split a row belongs to."""
        return self.text_of(row)

    @property
    def compares_nearly(self) -> bool:
        """Whether rows that share most of their words are nearly the same; not where many share one long text."""
        return self.reads_text

    def compared(self, row: Row) -> str:
        """What two rows have to share to be the same example."""
        return self.text_of(row)

    def all_text(self, row: Row) -> str:
        """Every text of the row, the target's too, in which damage is looked for."""
        return self.text_of(row)

    def inputs(self, row: Row, tokenizer: Any = None) -> list[tuple[str, ...]]:
        """The texts, or pairs of texts, that are tokenized as one; without a tokenizer as near to them as it goes."""
        return [(self.text_of(row) if tokenizer is None else self.render(row, tokenizer),)]

    def classes(self, row: Row) -> tuple[str, ...]:
        """The labels of a row; none where there is no such thing."""
        return ()

    @abstractmethod
    def problems(self, row: Row) -> Iterator[Problem]:
        """What is wrong with a row, as far as it can be seen without a tokenizer. It may be any mapping."""

    def token_problems(self, row: Row, tokenizer: Any) -> Iterator[Problem]:
        """What is wrong with a row without problems, once it is cut to the length limit."""
        return iter(())

    def render(self, row: Row, tokenizer: Any) -> str:
        """The text as it is handed to the tokenizer."""
        return self.text_of(row)

    def used_columns(self) -> list[str]:
        """The columns that every row has to have."""
        return [getattr(self, name) for name in self.columns if getattr(self, name) is not None]

    def check(self, rows: Sequence[Row], source: str) -> None:
        """Raise DataError naming the first row that cannot be trained on, and how many more there are."""
        require_columns(rows, self.used_columns(), source)
        bad = [(number, problem) for number, row in enumerate(rows, 1) for problem in errors_of(self.problems(row))]
        require_none(bad, source)

    # ---- features and batches

    @abstractmethod
    def encode(self, rows: Sequence[Row], tokenizer: Any) -> list[Feature]:
        """Features of the rows, in their order, with "labels"."""

    def collate(self, features: Sequence[Feature], tokenizer: Any) -> dict[str, Tensor]:
        """A batch, padded on the tokenizer's side."""
        return pad_features(features, tokenizer.pad_token_id, left=tokenizer.padding_side == "left")

    def drawn(self, feature: Feature, tokenizer: Any, draw: int) -> Feature:
        """A feature to train on; `draw` differs between seeds and epochs, for tasks that leave something to chance."""
        return feature

    def length(self, feature: Feature) -> int:
        """What a feature costs: its tokens."""
        return len(feature["input_ids"])

    # ---- the model

    def model_inputs(self, inputs: Mapping[str, Tensor], labels: Tensor, model: Any) -> dict[str, Tensor]:
        """What the model is called with. A decoder is fed the labels; nothing else looks at them."""
        return dict(inputs)

    def forward(self, model: Any, inputs: Mapping[str, Tensor], labels: Tensor) -> Any:
        """What the model says of a batch."""
        given = self.model_inputs(inputs, labels, getattr(model, "module", model))
        return self.read_outputs(model(**given), inputs)

    def read_outputs(self, outputs: Any, inputs: Mapping[str, Tensor]) -> Any:
        """What `loss` and `outcomes` are given."""
        return outputs

    def items(self, labels: Tensor) -> Tensor:
        """What the summed loss of a batch is divided by, added up over the batches of a step."""
        return labels.ne(IGNORED).sum()

    @abstractmethod
    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Summed loss over the batch divided by `num_items_in_batch` (by its own items when None), in fp32."""

    def mean(self, total: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        """A summed loss divided by its items; 0 for a batch without any."""
        if num_items_in_batch is not None:
            return total / num_items_in_batch
        items = self.items(labels)
        return total / torch.where(items > 0, items, torch.ones_like(items))

    # ---- scores

    @abstractmethod
    def outcomes(self, outputs: Any, labels: Tensor) -> Tensor:
        """(features, width) in fp32: what happened for each of the batch."""

    def generations(self, model: Any, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor | None:
        """(features, new tokens) that the model writes itself, put beside the outcomes; None for most tasks."""
        return None

    def by_row(self, outcomes: Array, features: Sequence[Feature], tokenizer: Any) -> Array:
        """(rows, width): outcomes of features as outcomes of rows, in the order of the rows."""
        return outcomes

    @abstractmethod
    def metrics(self, outcomes: Array) -> Metrics:
        """Every metric of these examples by name."""

    def score(self, outcomes: Array, metric: str) -> float:
        """One metric, not a number where it is undefined; for the thousands of resamples of a bootstrap."""
        value = self.metrics(outcomes)[metric]
        return float("nan") if value is None else float(value)

    def scores_of_each(self, outcomes: Array, metric: str) -> Array:
        """(rows,): the metric of every row alone, not a number where one row does not define it."""
        return np.array([self.score(outcomes[row : row + 1], metric) for row in range(len(outcomes))])

    def answers_in(self, outcomes: Array) -> list[str] | None:
        """What was answered in each row, in words; None where outcomes do not hold it."""
        return None

    def class_probabilities(self, outcomes: Array) -> tuple[Array, Array] | None:
        """((rows, classes) probabilities that sum to 1, (rows,) true classes) of outcomes that hold them."""
        return None

    # ---- without the model

    def truth(self, rows: Sequence[Row]) -> Array | None:
        """What is to be predicted, such that predictions beside it are outcomes; None where one answer is no number.

        (rows,) whole numbers of classes, (rows, classes) of 0 and 1, or (rows,) numbers in floating point.
        """
        return None

    @property
    def label_weights(self) -> tuple[float, ...] | None:
        """How much the loss of each class counts; None where all count the same."""
        return None

    def constant_outcomes(self, train: Sequence[Row], rows: Sequence[Row]) -> Array | None:
        """Outcomes of the best constant answer, or None where there is no such thing."""
        return None

    def baseline(self, train: Sequence[Row], rows: Sequence[Row]) -> Metrics | None:
        """Metrics of the best constant answer, or None where there is no such thing."""
        outcomes = self.constant_outcomes(train, rows)
        return None if outcomes is None else self.metrics(outcomes)

    @property
    def typed_columns(self) -> list[str]:
        """The columns of texts that are read alone: another spelling of them does not change what is right."""
        names = [name for name, wanted in self.columns.items() if wanted.kind == "text" and name not in self.targets]
        return [getattr(self, name) for name in names if getattr(self, name) is not None]

    def respelled(self, row: Row, change: Respelling) -> Row | None:
        """The row with what is read spelled in another way, the target as it was; None where nothing can be."""
        columns = self.typed_columns
        return {**row, **{name: words_changed(str(row[name]), change) for name in columns}} if columns else None

    # ---- predictions

    @classmethod
    def of_labels(cls, labels: Sequence[str], **options: Any) -> Self:
        """The task of a checkpoint that says no more of it than its labels."""
        names = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        return cls(**({"labels": tuple(labels)} if "labels" in names else {}), **options)

    def read_columns(self) -> list[str]:
        """The columns that a row to predict has to have."""
        targets = {getattr(self, name) for name in self.targets if hasattr(self, name)}
        return [column for column in self.used_columns() if column not in targets]

    def row_of(self, text: str) -> Row:
        """The row that a text alone is; ConfigurationError where a prediction reads more."""
        columns = self.read_columns()
        if len(columns) != 1:
            raise ConfigurationError(
                f"{self.name} reads {len(columns)} columns: {', '.join(map(repr, columns))}",
                expected="rows with these columns instead of texts",
                todo="put them into a file: lightsft predict DIR --file FILE",
            )
        return {columns[0]: text}

    def check_to_predict(self, rows: Sequence[Row]) -> None:
        """Raise DataError naming the first row that lacks something to predict from."""
        require_filled(rows, self.read_columns())

    def predict(
        self, model: Any, rows: Sequence[Row], tokenizer: Any, batch_size: int = 32, max_new_tokens: int | None = None
    ) -> list[Said]:
        """What the model says of each row, in plain values; `max_new_tokens` is for those that write."""
        return said_of(self, model, rows, tokenizer, batch_size)

    def to_predict(self, rows: Sequence[Row], tokenizer: Any) -> list[Feature]:
        """Features of rows without a target."""
        return self.encode(rows, tokenizer)

    def said(self, outputs: Any, labels: Tensor, features: Sequence[Feature], tokenizer: Any) -> list[Said]:
        """What outputs of the model mean, for each feature of a batch."""
        raise ConfigurationError(f"{self.name} has no predictions", expected="a task that says what its outputs mean")

    def said_of_rows(self, said: list[Said], features: Sequence[Feature], rows: Sequence[Row]) -> list[Said]:
        """The same for each row."""
        return said

    # ---- showing

    def target_of(self, row: Row) -> str:
        """What is to be predicted, to be shown."""
        return ", ".join(self.classes(row))

    def preview(self, row: Row, tokenizer: Any) -> list[tuple[str, bool]]:
        """An example as it is trained on: pieces of text, each with whether it carries loss."""
        feature = self.encode([row], tokenizer)[0]
        if not isinstance(feature["labels"], list) or len(feature["labels"]) != len(feature["input_ids"]):
            return [(tokenizer.decode(feature["input_ids"]), False), (self.target_of(row), True)]
        carries = [label != IGNORED for label in feature["labels"]]
        runs = groupby(zip(feature["input_ids"], carries, strict=True), key=itemgetter(1))
        return [(tokenizer.decode([token for token, _ in run]), loss) for loss, run in runs]


def errors_of(problems: Iterator[Problem]) -> list[Problem]:
    """Those that make a row unusable."""
    return [problem for problem in problems if problem.severity == "error"]


def require_none(bad: Sequence[tuple[int, Problem]], source: str) -> None:
    """Raise DataError about the first of these (row number, problem), saying how many rows there are."""
    if not bad:
        return
    number, problem = bad[0]
    rows = len({number for number, _ in bad})
    raise DataError(
        f"{source}: row {number} {problem.found}" + (f" ({rows} rows cannot be used)" if rows > 1 else ""),
        expected=problem.expected,
        todo=f"{problem.todo or 'correct the row'}, or leave such rows out with --drop-bad-rows",
    )


def sums_by_row(outcomes: Array, features: Sequence[Feature]) -> Array:
    """(rows, width): the outcomes of a row's features added up, in the order of the rows."""
    rows = np.array([feature["_row"] for feature in features])
    sums = np.zeros((rows.max() + 1, outcomes.shape[1]))
    np.add.at(sums, rows, outcomes)
    return sums
