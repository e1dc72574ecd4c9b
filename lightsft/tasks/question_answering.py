"""Extractive question answering: where in a context the answer stands, or that it is not there."""

from __future__ import annotations

import math
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
from lightsft.errors import ConfigurationError, DataError
from lightsft.metrics.answers import answer_outcome, answer_scores, best_threshold
from lightsft.tasks.answer_cells import answers_of, characters_of
from lightsft.tasks.base import Array, Feature, Metrics, Task
from lightsft.tasks.predicting import Said, by_row
from lightsft.tasks.spans import best_spans, within
from lightsft.tasks.texts import text_problems
from lightsft.tasks.windows import room_beside

READ = ("input_ids", "attention_mask", "token_type_ids")  # what models read of a feature

NEVER = 1e6  # a margin of "none" that no model's logits reach


@dataclass(frozen=True, kw_only=True)
class QuestionAnswering(Task):
    """(-log p(start) - log p(end)) / 2; p = softmax over the context's tokens and the first token, which says "none".

    question, context, answers: columns; answers in SQuAD's form ({"text": [...], "answer_start": [...]}), a list of
    answers, or one text. Several answers are trained on by the first and scored by the best. max_length, stride: in
    tokens; longer contexts are read in windows that overlap by `stride` (by half of a window's room for the context if
    that is less), and the best span of all windows is taken.
    max_answer_length: of a predicted span, in tokens. unanswerable: whether "none" may be predicted, which it is where
    its score exceeds the best span's by `null_threshold` (1806.03822). language: of the answers' normalisation.
    """

    question: str = "question"
    context: str = "context"
    answers: str = "answers"
    max_length: int = 384
    stride: int = 128
    max_answer_length: int = 30
    unanswerable: bool = False
    null_threshold: float = 0.0
    language: str = "en"

    name: ClassVar[str] = "question-answering"
    targets: ClassVar[frozenset[str]] = frozenset({"answers"})
    key_name: ClassVar[str] = "context"
    cuts: ClassVar[bool] = False
    metric: ClassVar[str] = "f1"
    metric_names: ClassVar[tuple[str, ...]] = (
        "f1", "exact_match", "has_answer_f1", "has_answer_exact_match", "no_answer_accuracy", "loss",
    )  # fmt: skip
    columns: ClassVar[Mapping[str, ColumnKind]] = {
        "question": ColumnKind(("question", "query"), "text"),
        "context": ColumnKind(("context", "passage", "paragraph", "document"), "text"),
        "answers": ColumnKind(("answers", "answer"), "answers"),
    }

    def __post_init__(self) -> None:
        if self.stride < 0 or self.max_answer_length < 1:
            raise ConfigurationError(
                f"stride={self.stride}, max_answer_length={self.max_answer_length}",
                expected="a stride of at least 0 and answers of at least one token",
            )

    @classmethod
    def for_rows(cls, rows: Sequence[Row], source: str, /, **options: Any) -> Self:
        """Columns by name; "none" may be predicted where a question has no answer."""
        options = {**cls.found_columns(rows, source, options), **options}
        options.setdefault("unanswerable", any(not answers_of(row, options["answers"]) for row in rows))
        return cls(**options)

    # ---- rows

    def text_of(self, row: Row) -> str:
        """Question and context."""
        return f"{row[self.question]}\n{row[self.context]}"

    @property
    def compares_nearly(self) -> bool:
        """Several questions share a context."""
        return False

    def inputs(self, row: Row, tokenizer: Any = None) -> list[tuple[str, ...]]:
        """Question and context as a pair."""
        return [(str(row[self.question]).strip(), str(row[self.context]))]

    def key(self, row: Row) -> str:
        """The context: questions about the same text never are in two splits."""
        return str(row[self.context])

    def target_of(self, row: Row) -> str:
        """The answers."""
        return " | ".join(answer.text for answer in answers_of(row, self.answers)) or "no answer"

    def problems(self, row: Row) -> Iterator[Problem]:
        """Empty texts, answers that are not where they are said to be."""
        yield from text_problems(row, [self.question, self.context])
        context = str(row.get(self.context) or "")
        for answer in answers_of(row, self.answers):
            if answer.start >= 0 and context[answer.start : answer.start + len(answer.text)] == answer.text:
                continue
            place = context.find(answer.text)
            if place < 0:
                yield Problem(
                    "answer_not_found",
                    f"has the answer {answer.text[:60]!r}, which is not in its context",
                    "an answer that is a part of the context, letter by letter",
                    "correct the answer",
                )
            elif answer.start >= 0:
                yield Problem(
                    "answer_elsewhere",
                    f"has the answer {answer.text[:60]!r} at {answer.start}, where the context has "
                    f"{context[answer.start : answer.start + len(answer.text)]!r}",
                    f"answer_start={place}",
                    "correct answer_start",
                )
        if not answers_of(row, self.answers) and not self.unanswerable:
            todo = 'take --task "question-answering(unanswerable=true)"'
            yield Problem("no_answer", "has no answer", "an answer in every row", todo)

    def token_problems(self, row: Row, tokenizer: Any) -> Iterator[Problem]:
        """A question that leaves no room, a context without tokens, an answer that no window holds whole."""
        try:
            features = self._windows(row, tokenizer)
        except DataError as error:
            yield Problem("no_room", f"cannot be read: {error.found}", error.expected, error.todo)
            return
        spans = [(begin, end) for feature in features for begin, end in [feature["labels"][:2]] if begin]
        longest = max((end - begin + 1 for begin, end in spans), default=0)
        if answers_of(row, self.answers) and not spans:
            yield Problem(
                "answer_cut",
                f"has an answer that no window of {self.max_length} tokens holds whole",
                "an answer that one of the overlapping windows holds",
                "raise --max-length or the option stride",
            )
        elif longest > self.max_answer_length:
            yield Problem(
                "long_answer",
                f"has an answer of {longest} tokens",
                f"at most {self.max_answer_length}: longer ones are never predicted",
                "raise the option max_answer_length",
                severity="warning",
            )

    # ---- features

    def encode(self, rows: Sequence[Row], tokenizer: Any) -> list[Feature]:
        """Windows of question and context; labels: start and end of the answer, first and last token of the context."""
        features = []
        for number, row in enumerate(rows):
            try:
                found = self._windows(row, tokenizer)
            except DataError as error:
                raise DataError(f"row {number + 1}: {error.found}", expected=error.expected, todo=error.todo) from error
            features += [{**feature, "_row": number} for feature in found]
        return features

    def _windows(self, row: Row, tokenizer: Any) -> list[Feature]:
        question, context = str(row[self.question]).strip(), str(row[self.context])
        room = room_beside(question, tokenizer, self.max_length)
        if room < 1:
            raise DataError(
                f"the question {question[:60]!r} leaves no room for the context in {self.max_length} tokens",
                expected="a shorter question",
                todo="raise --max-length",
            )
        encoded = tokenizer(
            question,
            context,
            truncation="only_second",
            max_length=min(self.max_length, tokenizer.model_max_length),
            stride=min(self.stride, room // 2),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        found = answers_of(row, self.answers)
        shared = {"_context": context, "_answers": [answer.text for answer in found]}
        characters = characters_of(found, context)
        windows = []
        for part in range(len(encoded["input_ids"])):
            offsets = encoded["offset_mapping"][part]
            places = [i for i, sequence in enumerate(encoded.sequence_ids(part)) if sequence == 1]
            if not places:
                raise DataError("no token is left of the context", expected="a text that the tokenizer knows")
            span = within(characters, offsets, places[0], places[-1]) or (0, 0)
            tokens = {name: encoded[name][part] for name in READ if name in encoded}
            windows.append({**tokens, "labels": [*span, places[0], places[-1]], "_offsets": offsets, **shared})
        return windows

    def collate(self, features: Sequence[Feature], tokenizer: Any) -> dict[str, Tensor]:
        """Padded on the right: labels are places."""
        batch = pad_features([{**f, "labels": 0} for f in features], tokenizer.pad_token_id)
        return {**batch, "labels": torch.tensor([feature["labels"] for feature in features])}

    # ---- loss and scores

    def items(self, labels: Tensor) -> Tensor:
        """The windows."""
        return torch.tensor(labels.shape[0], device=labels.device)

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The formula above, in fp32."""
        return self.mean(self._losses(outputs, labels).sum(), labels, num_items_in_batch)

    def _losses(self, outputs: Any, labels: Tensor) -> Tensor:
        start, end = allowed(outputs, labels)
        losses = [cross_entropy(x, y, reduction="none") for x, y in ((start, labels[:, 0]), (end, labels[:, 1]))]
        return (losses[0] + losses[1]) / 2

    def outcomes(self, outputs: Any, labels: Tensor) -> Tensor:
        """(batch, 5): loss, score of "none", score of the best span, its first and last token."""
        start, end = allowed(outputs, labels)
        null = start[:, 0] + end[:, 0]
        score, first, last = best_spans(start, end, labels[:, 2], labels[:, 3], self.max_answer_length)
        return torch.stack([self._losses(outputs, labels), null, score, first.float(), last.float()], dim=1)

    def by_row(self, outcomes: Array, features: Sequence[Feature], tokenizer: Any) -> Array:
        """(rows, 5): summed loss and windows, margin of "none" over the best span; exact match, F1 of that span; has
        an answer. The score of "none" is the lowest of all windows: each without the answer says none."""
        rows: dict[int, list[tuple[Array, Feature]]] = {}
        for outcome, feature in zip(outcomes, features, strict=True):
            rows.setdefault(feature["_row"], []).append((outcome, feature))
        return np.array([self._outcome(rows[number]) for number in sorted(rows)])

    def _outcome(self, windows: list[tuple[Array, Feature]]) -> list[float]:
        best, feature = max(windows, key=lambda window: window[0][2])
        null = min(outcome[1] for outcome, _ in windows)
        text = span_text(feature, int(best[3]), int(best[4]))
        match, f1, has_answer = answer_outcome(text, feature["_answers"], self.language)
        return [sum(outcome[0] for outcome, _ in windows), len(windows), null - best[2], match, f1, has_answer]

    def said(self, outputs: Any, labels: Tensor, features: Sequence[Feature], tokenizer: Any) -> list[Said]:
        """Of each window the score of its best span, the log-probability and the tokens of it, the score of "none"."""
        start, end = allowed(outputs, labels)
        score, first, last = best_spans(start, end, labels[:, 2], labels[:, 3], self.max_answer_length)
        likelihood = score - start.logsumexp(-1) - end.logsumexp(-1)
        names = ("score", "likelihood", "none", "first", "last")
        columns = (score, likelihood, start[:, 0] + end[:, 0], first, last)
        return [
            dict(zip(names, row, strict=True)) for row in zip(*(column.tolist() for column in columns), strict=True)
        ]

    def said_of_rows(self, said: list[Said], features: Sequence[Feature], rows: Sequence[Row]) -> list[Said]:
        """{"answer", "start", "end", "score", "no_answer_margin"}: characters of the context, a probability, logits.

        Where "none" is said the answer is empty, and start and end are None.
        """
        return [self._answer(windows) for windows in by_row(said, features)]

    def _answer(self, windows: list[tuple[Said, Feature]]) -> Said:
        best, feature = max(windows, key=lambda window: window[0]["score"])
        margin = min(window["none"] for window, _ in windows) - best["score"]
        silent = self.unanswerable and margin > self.null_threshold
        text = "" if silent else span_text(feature, best["first"], best["last"])
        start = feature["_offsets"][best["first"]][0]
        start += len(feature["_context"][start:]) - len(feature["_context"][start:].lstrip())
        places = {"start": None, "end": None} if silent else {"start": start, "end": start + len(text)}
        return {"answer": text, **places, "score": math.exp(best["likelihood"]), "no_answer_margin": margin}

    def metrics(self, outcomes: Array) -> Metrics:
        """Exact match and F1 of all, of questions with an answer; accuracy on those without; the best threshold."""
        loss, windows, margin, match, f1, has_answer = outcomes.T
        silent = self.unanswerable & (margin > self.null_threshold)
        given = np.column_stack([np.where(silent, 1 - has_answer, score) for score in (match, f1)] + [has_answer])
        found: Metrics = {**answer_scores(given), "loss": float(loss.sum() / windows.sum())}
        if self.unanswerable:
            threshold, best = best_threshold(margin, f1, has_answer)
            found |= {"best_null_threshold": threshold, "best_threshold_f1": best}
        return found

    def constant_outcomes(self, train: Sequence[Row], rows: Sequence[Row]) -> Array | None:
        """Never an answer, where that may be right."""
        if not self.unanswerable:
            return None
        has_answer = [float(bool(answers_of(row, self.answers))) for row in rows]
        return np.array([[0.0, 1.0, NEVER, 0.0, 0.0, has] for has in has_answer])

    @property
    def typed_columns(self) -> list[str]:
        """The question: another spelling of the context would move the answers in it."""
        return [self.question]


def allowed(outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Start and end logits in fp32, -inf outside the context and the first token."""
    places = torch.arange(outputs.start_logits.shape[1], device=labels.device)
    inside = (places >= labels[:, 2:3]) & (places <= labels[:, 3:4]) | (places == 0)
    return _masked(outputs.start_logits, inside), _masked(outputs.end_logits, inside)


def _masked(logits: Tensor, inside: Tensor) -> Tensor:
    return logits.float().masked_fill(~inside, -torch.inf)


def span_text(feature: Feature, first: int, last: int) -> str:
    """The part of the context that tokens first to last stand for."""
    text: str = feature["_context"][feature["_offsets"][first][0] : feature["_offsets"][last][1]]
    return text.strip()
