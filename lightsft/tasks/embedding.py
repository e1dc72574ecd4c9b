"""Contrastive embedding: an encoder learns to place what belongs together side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, normalize, relu

from lightsft.data.batching import pad_features
from lightsft.data.columns import ColumnKind
from lightsft.data.problems import Problem
from lightsft.data.reading import Row
from lightsft.errors import ConfigurationError, DataError
from lightsft.metrics.regression import pearson, spearman
from lightsft.metrics.retrieval import retrieval_scores
from lightsft.tasks.base import Array, Feature, Metrics, Task
from lightsft.tasks.predicting import Said
from lightsft.tasks.regression import number_of
from lightsft.tasks.similarity import groups, loss_of_labels, ranks_of_labels, ranks_of_pairs
from lightsft.tasks.texts import empty, filled, text_problems

LOSSES = ("infonce", "triplet", "cosine", "labels")


@dataclass(frozen=True, kw_only=True)
class Embedding(Task):
    """Rows are pairs, triplets, pairs with a number, or labelled texts; u, v, w are unit vectors of their texts.

    infonce   -log exp(u.v / t) / sum over all v, w of the batch of exp(u.v' / t): the others are wrong (1807.03748),
              but those of rows with an equal text, which belong together
    triplet   max(0, margin - u.v + u.w), w a text that does not belong to u (1503.03832, with cosines)
    cosine    (u.v - number)^2
    labels    as infonce, with every other text of the same label as right (2004.11362)

    anchor, positive, negative, similarity, text, label: columns, those that the loss needs. loss_function: by default
    what the columns allow. temperature: t. pooling: mean over the tokens, cls for the first, last for the last one.
    max_length: in tokens.
    """

    anchor: str | None = None
    positive: str | None = None
    negative: str | None = None
    similarity: str | None = None
    text: str | None = None
    label: str | None = None
    loss_function: Literal["infonce", "triplet", "cosine", "labels"] = "infonce"
    temperature: float = 0.05
    margin: float = 0.2
    pooling: Literal["mean", "cls", "last"] = "mean"
    max_length: int = 128

    name: ClassVar[str] = "embedding"
    key_name: ClassVar[str] = "first text"
    without_unit: ClassVar[frozenset[str]] = frozenset({"spearman", "pearson"})
    columns: ClassVar[Mapping[str, ColumnKind]] = {
        "anchor": ColumnKind(("anchor", "query", "question", "sentence1", "text1", "premise"), "text", optional=True),
        "positive": ColumnKind(
            ("positive", "pos", "answer", "document", "passage", "sentence2", "text2"), "text", optional=True
        ),
        "negative": ColumnKind(("negative", "neg", "hard_negative"), "text", optional=True),
        "similarity": ColumnKind(("similarity", "score"), "number", optional=True),
        "text": ColumnKind(("text", "sentence"), "text", optional=True),
        "label": ColumnKind(("label", "class", "category", "intent"), "label", optional=True),
    }

    @property
    def metric(self) -> str:  # type: ignore[override]
        """Mean reciprocal rank, or the rank correlation of cosines and numbers."""
        return "spearman" if self.loss_function == "cosine" else "mrr"

    @property
    def metric_names(self) -> tuple[str, ...]:  # type: ignore[override]
        """Of ranks, or of similarities."""
        if self.loss_function == "cosine":
            return ("spearman", "pearson")
        return ("mrr", "recall@1", "recall@5", "recall@10", "ndcg@10")

    def __post_init__(self) -> None:
        if self.loss_function not in LOSSES or self.pooling not in ("mean", "cls", "last") or self.temperature <= 0:
            raise ConfigurationError(
                f"loss_function={self.loss_function!r}, pooling={self.pooling!r}, temperature={self.temperature}",
                expected=f"a loss among {', '.join(LOSSES)}; pooling mean, cls or last; a temperature above 0",
            )
        missing = [name for name in self._needed() if getattr(self, name) is None]
        if missing:
            raise DataError(
                f"the loss {self.loss_function} needs a column for {' and '.join(missing)}",
                expected="anchor and positive; with negative for triplet; with similarity for cosine; text and label",
                todo='name them: --task "embedding(anchor=question, positive=answer)"',
            )

    def _needed(self) -> tuple[str, ...]:
        third = {"triplet": ("negative",), "cosine": ("similarity",)}.get(self.loss_function, ())
        return ("text", "label") if self.loss_function == "labels" else ("anchor", "positive", *third)

    @classmethod
    def for_rows(cls, rows: Sequence[Row], source: str, /, **options: Any) -> Self:
        """Columns by name, and the loss that they allow."""
        options = {**cls.found_columns(rows, source, options), **options}
        if options.get("loss_function") is None:
            pair = options.get("anchor") is not None and options.get("positive") is not None
            alone = "cosine" if options.get("similarity") is not None else "infonce"
            options["loss_function"] = alone if pair else "labels"
        return cls(**options)

    # ---- rows

    @property
    def typed_columns(self) -> list[str]:
        """What is asked with; what is found by it stays as it is."""
        asked = self.text if self.loss_function == "labels" else self.anchor
        return [asked] if asked is not None else []

    @property
    def text_columns(self) -> list[str]:
        """The columns that are embedded."""
        names = ("text",) if self.loss_function == "labels" else ("anchor", "positive", "negative")
        return [getattr(self, name) for name in names if getattr(self, name) is not None]

    def used_columns(self) -> list[str]:
        """What the loss needs."""
        return [getattr(self, name) for name in self._needed()]

    def text_of(self, row: Row) -> str:
        """All texts."""
        return "\n".join(str(row[column]) for column in self.text_columns)

    @property
    def compares_nearly(self) -> bool:
        """Labelled texts alone: several pairs may share one of their texts."""
        return self.loss_function == "labels"

    def inputs(self, row: Row, tokenizer: Any = None) -> list[tuple[str, ...]]:
        """Each text by itself."""
        return [(str(row[column]),) for column in self.text_columns]

    def key(self, row: Row) -> str:
        """The anchor: its positives stay together."""
        return str(row[self.text_columns[0]])

    def classes(self, row: Row) -> tuple[str, ...]:
        """The label, of labelled texts."""
        column = str(self.label)
        return (str(row[column]),) if self.loss_function == "labels" and filled(row, column) else ()

    def target_of(self, row: Row) -> str:
        """The label or the number."""
        return str(row[str(self.similarity)]) if self.loss_function == "cosine" else ", ".join(self.classes(row))

    def problems(self, row: Row) -> Iterator[Problem]:
        """Empty texts, missing labels, what is no number."""
        yield from text_problems(row, self.text_columns)
        if self.loss_function == "labels" and not filled(row, str(self.label)):
            yield empty(str(self.label), "a label in every row")
        number = number_of(row.get(str(self.similarity))) if self.loss_function == "cosine" else 0.0
        if number is None or not -1 <= number <= 1:
            yield Problem(
                "no_similarity",
                f"has {row.get(str(self.similarity))!r} in {self.similarity!r}",
                "a cosine between -1 and 1",
                "correct the row, or bring the numbers to this range",
            )

    @classmethod
    def of_labels(cls, labels: Sequence[str], **options: Any) -> Self:
        """Texts to embed, in a column of this name."""
        return cls(text="text", label="label", loss_function="labels", **options)

    def read_columns(self) -> list[str]:
        """One text; more are embedded beside it where they are there."""
        return self.text_columns[:1]

    def to_predict(self, rows: Sequence[Row], tokenizer: Any) -> list[Feature]:
        """Token ids of the columns of texts that every row has."""
        columns = [column for column in self.text_columns if all(filled(row, column) for row in rows)]
        limit = min(self.max_length, tokenizer.model_max_length)
        texts = [[str(row[column]) for column in columns] for row in rows]
        read = [tokenizer(part, truncation=True, max_length=limit) for part in texts]
        return [{**feature, "labels": 0, "_columns": columns} for feature in read]

    def said(self, outputs: Any, labels: Tensor, features: Sequence[Feature], tokenizer: Any) -> list[Said]:
        """{"embedding"}, a unit vector; of several texts {"embeddings": {column: vector}, "similarity": cosine}."""
        found: list[Said] = []
        for vectors, feature in zip(outputs.cpu(), features, strict=True):
            if len(vectors) == 1:
                found.append({"embedding": vectors[0].tolist()})
            else:
                named = dict(zip(feature["_columns"], vectors.tolist(), strict=True))
                found.append({"embeddings": named, "similarity": float(vectors[0] @ vectors[1])})
        return found

    # ---- features and batches

    def encode(self, rows: Sequence[Row], tokenizer: Any) -> list[Feature]:
        """Token ids of each text; the label as a number of its own, or the similarity."""
        limit = min(self.max_length, tokenizer.model_max_length)
        known: dict[str, int] = {}
        belongs = groups([[str(row[column]) for column in self.text_columns[:2]] for row in rows])
        features = []
        for number, row in enumerate(rows):
            texts = [str(row[column]) for column in self.text_columns]
            encoded = tokenizer(texts, truncation=True, max_length=limit)
            label: float = belongs[number]
            if self.loss_function == "cosine":
                label = number_of(row[str(self.similarity)]) or 0.0
            elif self.loss_function == "labels":
                label = known.setdefault(str(row[str(self.label)]), len(known))
            features.append({**encoded, "labels": label, "_texts": texts})
        return features

    def length(self, feature: Feature) -> int:
        """Tokens of all texts."""
        return sum(map(len, feature["input_ids"]))

    def collate(self, features: Sequence[Feature], tokenizer: Any) -> dict[str, Tensor]:
        """(batch, texts, tokens), padded on the right."""
        names = [name for name in features[0] if name != "labels" and not name.startswith("_")]
        texts = len(features[0]["input_ids"])
        flat = [{name: f[name][text] for name in names} for f in features for text in range(texts)]
        padded = pad_features(flat, tokenizer.pad_token_id)
        labels = torch.tensor([feature["labels"] for feature in features])
        return {name: value.reshape(len(features), texts, -1) for name, value in padded.items()} | {"labels": labels}

    def preview(self, row: Row, tokenizer: Any) -> list[tuple[str, bool]]:
        """The texts; all carry loss through their vectors."""
        feature = self.encode([row], tokenizer)[0]
        return [(tokenizer.decode(ids), True) for ids in feature["input_ids"]]

    # ---- the model

    def model_inputs(self, inputs: Mapping[str, Tensor], labels: Tensor, model: Any) -> dict[str, Tensor]:
        """The texts one below the other: (batch * texts, tokens)."""
        return {name: value.flatten(0, 1) for name, value in inputs.items()}

    def read_outputs(self, outputs: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """(batch, texts, width) unit vectors in fp32."""
        pooled = self._pooled(outputs.last_hidden_state.float(), inputs["attention_mask"].flatten(0, 1))
        return normalize(pooled, dim=-1).reshape(*inputs["input_ids"].shape[:2], -1)

    def _pooled(self, states: Tensor, mask: Tensor) -> Tensor:
        if self.pooling == "mean":
            return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        place = mask.sum(1) - 1 if self.pooling == "last" else torch.zeros_like(mask[:, 0])
        return states[torch.arange(len(states), device=states.device), place]

    # ---- loss and scores

    def items(self, labels: Tensor) -> Tensor:
        """The rows."""
        return torch.tensor(labels.shape[0], device=labels.device)

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The chosen formula; the batch's other rows are what is told apart, so its size matters."""
        if self.loss_function == "labels":
            total = loss_of_labels(outputs[:, 0], labels, self.temperature)
        elif self.loss_function == "cosine":
            total = ((cosine_similarity(outputs[:, 0], outputs[:, 1], dim=-1) - labels) ** 2).sum()
        elif self.loss_function == "triplet":
            right, wrong = ((outputs[:, 0] * outputs[:, text]).sum(-1) for text in (1, 2))
            total = relu(self.margin - right + wrong).sum()
        else:
            scores = outputs[:, 0] @ outputs[:, 1:].transpose(0, 1).flatten(0, 1).T / self.temperature
            same = (labels[:, None] == labels[None, :]).fill_diagonal_(False).repeat(1, outputs.shape[1] - 1)
            same[:, len(outputs) :] = False
            places = torch.arange(len(outputs), device=labels.device)
            total = cross_entropy(scores.masked_fill(same, -torch.inf), places, reduction="sum")
        return self.mean(total, labels, num_items_in_batch)

    def outcomes(self, outputs: Any, labels: Tensor) -> Tensor:
        """(batch, texts * width): the vectors."""
        flat: Tensor = outputs.flatten(1)
        return flat

    def by_row(self, outcomes: Array, features: Sequence[Feature], tokenizer: Any) -> Array:
        """(rows, k) ranks, from 1, of what is right among the texts of all rows; or (rows, 2) cosine and number."""
        texts = len(features[0]["input_ids"])
        vectors = outcomes.reshape(len(features), texts, -1)
        labels = np.array([feature["labels"] for feature in features])
        if self.loss_function == "cosine":
            return np.column_stack([(vectors[:, 0] * vectors[:, 1]).sum(-1), labels])
        if self.loss_function == "labels":
            return ranks_of_labels(vectors[:, 0], labels)
        return ranks_of_pairs(vectors, [feature["_texts"] for feature in features])

    def metrics(self, outcomes: Array) -> Metrics:
        """Recall and mean reciprocal rank of the first right one, or correlations of the cosine."""
        if self.loss_function == "cosine":
            return {"spearman": spearman(*outcomes.T), "pearson": pearson(*outcomes.T)}
        return dict(retrieval_scores(outcomes[~np.isnan(outcomes[:, 0])]))
