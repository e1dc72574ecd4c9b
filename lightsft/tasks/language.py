"""Tokens as targets: the loss, the outcomes and the scores of every language model, and the texts that it writes."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightsft.data.batching import IGNORED, MULTIPLE, pad_features
from lightsft.errors import ConfigurationError
from lightsft.tasks.base import Array, Feature, Metrics, Task

TEXT_METRICS = ("bleu", "chrf", "rouge1", "rouge2", "rougeL", "exact_match", "token_f1")
COUNTS = 3  # columns of the outcomes before what was written: likelihood, right, tokens


@dataclass(frozen=True, kw_only=True)
class LanguageTask(Task, ABC):
    """-log softmax(logits)[target] summed over the supervised tokens, over their number.

    label_smoothing: the share of the target that is spread evenly over the vocabulary while training (1512.00567).
    generate: when scoring, also write at most so many tokens and compare them with the target; 0 does not.
    num_beams: of the search that writes; 1 is greedy.
    """

    label_smoothing: float = 0.0
    generate: int = 0
    num_beams: int = 1

    metric: ClassVar[str] = "loss"
    metric_names: ClassVar[tuple[str, ...]] = ("loss", "perplexity", "token_accuracy")
    packs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1 or self.generate < 0 or self.num_beams < 1:
            raise ConfigurationError(
                f"label_smoothing={self.label_smoothing}, generate={self.generate}, num_beams={self.num_beams}",
                expected="label_smoothing in [0, 1), generate of at least 0 tokens, at least one beam",
            )

    @property
    def shifts(self) -> bool:
        """Whether the logits of a token predict the next one (a causal model), or the token itself."""
        return True

    def collate(self, features: Sequence[Feature], tokenizer: Any) -> dict[str, Tensor]:
        """Padded on the right: positions then start at 0 in every row."""
        return pad_features(features, tokenizer.pad_token_id)

    # ---- loss

    def items(self, labels: Tensor) -> Tensor:
        """The tokens that are predicted: the first of a text is not, by a causal model."""
        return self._targets(labels).ne(IGNORED).sum()

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Only the logits of supervised tokens are widened to fp32."""
        logits, targets = self._supervised(outputs.logits, labels)
        total = cross_entropy(logits.float(), targets, label_smoothing=self.label_smoothing, reduction="sum")
        return self.mean(total, labels, num_items_in_batch)

    def _targets(self, labels: Tensor) -> Tensor:
        return labels[:, 1:] if self.shifts else labels

    def _supervised(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(tokens, vocabulary) logits that predict a supervised token, and (tokens,) those tokens."""
        targets = self._targets(labels)
        chosen = targets != IGNORED
        return (logits[:, :-1] if self.shifts else logits)[chosen], targets[chosen]

    # ---- scores

    def outcomes(self, outputs: Any, labels: Tensor) -> Tensor:
        """(batch, 3): summed negative log-likelihood, right top-1 predictions, tokens."""
        targets = self._targets(labels)
        rows = torch.arange(targets.shape[0], device=labels.device)[:, None].expand_as(targets)[targets != IGNORED]
        logits, chosen = self._supervised(outputs.logits, labels)
        losses = cross_entropy(logits.float(), chosen, reduction="none")
        per_token = torch.stack([losses, (logits.argmax(-1) == chosen).float(), torch.ones_like(losses)], dim=1)
        return torch.zeros(labels.shape[0], COUNTS, device=labels.device).index_add_(0, rows, per_token)

    def generations(self, model: Any, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor | None:
        """(batch, generate) token ids that follow each prompt, -1 after their end."""
        if not self.generate:
            return None
        prompts = self.prompts(inputs, labels, padding=_padding(model))
        written = model.generate(
            **prompts,
            max_new_tokens=self.generate,
            num_beams=self.num_beams,
            do_sample=False,
            pad_token_id=_padding(model),
        )
        new = written[:, prompts["input_ids"].shape[1] :] if self.shifts else written[:, 1:]
        return torch.nn.functional.pad(new, (0, self.generate - new.shape[1]), value=_padding(model))

    def prompts(self, inputs: Mapping[str, Tensor], labels: Tensor, padding: int) -> dict[str, Tensor]:
        """What comes before the last run of supervised tokens in each row, padded on the left."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        kept = [row[:start][m[:start] > 0] for row, m, start in zip(ids, mask, last_starts(labels), strict=True)]
        longest = -(-max(len(row) for row in kept) // MULTIPLE) * MULTIPLE
        put = {"input_ids": ids.new_full((len(kept), longest), padding)}
        put["attention_mask"] = torch.zeros_like(put["input_ids"])
        for number, row in enumerate(kept):
            put["input_ids"][number, longest - len(row) :] = row
            put["attention_mask"][number, longest - len(row) :] = 1
        return put

    def by_row(self, outcomes: Array, features: Sequence[Feature], tokenizer: Any) -> Array:
        """(rows, 3), and beside it the statistics of what was written against what was to be written."""
        if outcomes.shape[1] == COUNTS:
            return outcomes
        from lightsft.metrics.generation import text_statistics

        written = tokenizer.batch_decode(outcomes[:, COUNTS:].astype(int), skip_special_tokens=True)
        wanted = tokenizer.batch_decode([last_run(f["labels"]) for f in features], skip_special_tokens=True)
        statistics = text_statistics([text.strip() for text in written], [[text.strip()] for text in wanted])
        return np.column_stack([outcomes[:, :COUNTS], statistics])

    def metrics(self, outcomes: Array) -> Metrics:
        """Loss and accuracy per token, the perplexity exp(loss), and the scores of what was written."""
        likelihood, right, tokens = outcomes[:, :COUNTS].sum(axis=0)
        loss = float(likelihood / tokens)
        found: Metrics = {"loss": loss, "perplexity": float(np.exp(loss)), "token_accuracy": float(right / tokens)}
        if outcomes.shape[1] > COUNTS:
            from lightsft.metrics.generation import text_scores

            found |= text_scores(outcomes[:, COUNTS:])
        return found


def last_starts(labels: Tensor) -> list[int]:
    """Of each row of labels, where its last run of supervised tokens begins."""
    supervised = labels != IGNORED
    begins = supervised & ~torch.nn.functional.pad(supervised, (1, 0))[:, :-1]
    positions = torch.arange(labels.shape[1], device=labels.device)
    return [int(start) for start in torch.where(begins, positions, -1).max(dim=1).values.clamp_min(0)]


def last_run(labels: Sequence[int]) -> list[int]:
    """The last run of supervised tokens."""
    end = max(index for index, label in enumerate(labels) if label != IGNORED) + 1
    start = end
    while start and labels[start - 1] != IGNORED:
        start -= 1
    return list(labels[start:end])


def _padding(model: Any) -> int:
    """The padding token of a model; 0 where it has none: padding is masked."""
    found = getattr(model.config, "pad_token_id", None)
    return int(found) if found is not None else 0
