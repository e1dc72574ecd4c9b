"""Extractive question answering: where in a context the answer stands, or that it is not there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightsft.data.batching import pad_features
from lightsft.data.columns import ColumnKind
from lightsft.data.problems import Problem
from lightsft.data.reading import Row
from lightsft.metrics.answers import answer_outcome, answer_scores, best_threshold
from lightsft.tasks.base import Array, Feature, Metrics, Task
from lightsft.tasks.spans import best_spans, within
from lightsft.tasks.texts import filled, text_problems


class Answer(NamedTuple):
    """A text, and where it begins in the context; -1 where nobody said."""

    text: str
    start: int


@dataclass(frozen=True, kw_only=True)
class QuestionAnswering(Task):
    """(-log p(start) - log p(end)) / 2; p = softmax over the context's tokens and the first token, which says "none".

    question, context, answers: columns; answers in SQuAD's form ({"text": [...], "answer_start": [...]}), a list of
    answers, or one text. Several answers are trained on by the first and scored by the best. max_length, stride: in
    tokens; longer contexts are read in windows that overlap by `stride`, and the best span of all windows is taken.
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
    metric: ClassVar[str] = "f1"
    metric_names: ClassVar[tuple[str, ...]] = (
        "f1", "exact_match", "has_answer_f1", "has_answer_exact_match", "no_answer_accuracy", "loss",
    )  # fmt: skip
    columns: ClassVar[Mapping[str, ColumnKind]] = {
        "question": ColumnKind(("question", "query"), "text"),
        "context": ColumnKind(("context", "passage", "paragraph", "document"), "text"),
        "answers": ColumnKind(("answers", "answer"), "any"),
    }

    @classmethod
    def for_rows(cls, rows: Sequence[Row], source: str, **options: Any) -> Self:
        """Columns by name; "none" may be predicted where a question has no answer."""
        options = {**cls.found_columns(rows, source, options), **options}
        options.setdefault("unanswerable", any(not answers_of(row, options["answers"]) for row in rows))
        return cls(**options)

    # ---- rows

    def text_of(self, row: Row) -> str:
        """Question and context."""
        return f"{row[self.question]}\n{row[self.context]}"

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

    # ---- features

    def encode(self, rows: Sequence[Row], tokenizer: Any) -> list[Feature]:
        """Windows of question and context; labels: start and end of the answer, first and last token of the context."""
        features = []
        for number, row in enumerate(rows):
            found = answers_of(row, self.answers)
            encoded = tokenizer(
                str(row[self.question]).strip(),
                str(row[self.context]),
                truncation="only_second",
                max_length=min(self.max_length, tokenizer.model_max_length),
                stride=self.stride,
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
            )
            for part in range(len(encoded["input_ids"])):
                offsets = encoded["offset_mapping"][part]
                places = [i for i, sequence in enumerate(encoded.sequence_ids(part)) if sequence == 1]
                first, last = places[0], places[-1]
                span = within(self._characters(found, row), offsets, first, last)
                names = ("input_ids", "attention_mask", "token_type_ids")
                features.append(
                    {
                        **{name: encoded[name][part] for name in names if name in encoded},
                        "labels": [*(span or (0, 0)), first, last],
                        "_row": number,
                        "_offsets": offsets,
                        "_context": str(row[self.context]),
                        "_answers": [answer.text for answer in found],
                    }
                )
        return features

    def _characters(self, found: Sequence[Answer], row: Row) -> tuple[int, int] | None:
        """Characters [start, end) of the first answer."""
        if not found:
            return None
        start = found[0].start if found[0].start >= 0 else str(row[self.context]).find(found[0].text)
        return start, start + len(found[0].text)

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

    def baseline(self, train: Sequence[Row], rows: Sequence[Row]) -> Metrics | None:
        """Never an answer, where that may be right."""
        if not self.unanswerable:
            return None
        has_answer = [float(bool(answers_of(row, self.answers))) for row in rows]
        return self.metrics(np.array([[0.0, 1.0, np.inf, 0.0, 0.0, has] for has in has_answer]))


def answers_of(row: Row, column: str) -> list[Answer]:
    """The answers of a row in any of the forms in use; none for a question without one."""
    cell = row.get(column)
    if isinstance(cell, Mapping):
        texts, starts = cell.get("text", ()), cell.get("answer_start", ())
        texts, starts = ([texts], [starts]) if isinstance(texts, str) else (list(texts), list(starts))
        starts += [-1] * (len(texts) - len(starts))
        return [Answer(str(text), int(start)) for text, start in zip(texts, starts, strict=True) if str(text)]
    if isinstance(cell, list | tuple):
        return [answer for part in cell for answer in answers_of({column: part}, column)]
    if not filled(row, column):
        return []
    return [Answer(str(cell), int(row.get("answer_start", -1)))]


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
