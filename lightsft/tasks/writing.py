"""Models that write: what follows a prompt, generated while scoring, against what was to follow."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lightsft.data.batching import IGNORED, MULTIPLE
from lightsft.errors import ConfigurationError
from lightsft.tasks.base import Array, Feature, Metrics
from lightsft.tasks.continuing import Continues
from lightsft.tasks.language import COUNTS, LanguageTask

NOTHING = -1  # in the place of a token, where none was written
TEXT_METRICS = ("bleu", "chrf", "rouge1", "rouge2", "rougeL", "exact_match", "token_f1")


@dataclass(frozen=True, kw_only=True)
class WritingTask(Continues, LanguageTask, ABC):
    """A language task whose supervised tokens answer a prompt.

    generate: when scoring, also write at most so many tokens and compare the text with the target; 0 does not.
    num_beams: of the search that writes; 1 is greedy.
    """

    generate: int = 0
    num_beams: int = 1

    metric_names: ClassVar[tuple[str, ...]] = (*LanguageTask.metric_names, *TEXT_METRICS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.generate < 0 or self.num_beams < 1:
            raise ConfigurationError(
                f"generate={self.generate}, num_beams={self.num_beams}",
                expected="generate of at least 0 tokens and at least one beam",
            )

    @property
    def beams(self) -> int:
        """As in scoring."""
        return self.num_beams

    @property
    def new_tokens(self) -> int:
        """As in scoring, where that writes."""
        return self.generate or super().new_tokens

    def require_metric(self, metric: str) -> None:
        """Scores of texts need texts."""
        super().require_metric(metric)
        if metric in TEXT_METRICS and not self.generate:
            raise ConfigurationError(
                f"the metric {metric} compares texts, and none are written",
                expected="the option generate: how many tokens to write at most",
                todo=f'for example --task "{self.name}(generate=64)"',
            )

    def generations(self, model: Any, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor | None:
        """(batch, generate) token ids that follow each prompt, NOTHING after their end."""
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
        return torch.nn.functional.pad(_to_the_end(new, model), (0, self.generate - new.shape[1]), value=NOTHING)

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

        tokens = [[token for token in row if token != NOTHING] for row in outcomes[:, COUNTS:].astype(int).tolist()]
        written = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        wanted = tokenizer.batch_decode([last_run(f["labels"]) for f in features], skip_special_tokens=True)
        statistics = text_statistics([text.strip() for text in written], [[text.strip()] for text in wanted])
        return np.column_stack([outcomes[:, :COUNTS], statistics])

    def metrics(self, outcomes: Array) -> Metrics:
        """Loss, perplexity and accuracy per token, and the scores of what was written."""
        found = super().metrics(outcomes)
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


def _to_the_end(written: Tensor, model: Any) -> Tensor:
    """(batch, tokens) with NOTHING behind the first end token: the padding there is a word in some vocabularies."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        return written
    over = torch.isin(written, torch.tensor(ends, device=written.device)).cumsum(dim=1)
    ended_before = torch.nn.functional.pad(over, (1, 0))[:, :-1] > 0
    return written.masked_fill(ended_before, NOTHING)


def _padding(model: Any) -> int:
    """The padding token of a model; 0 where it has none: padding is masked."""
    found = getattr(model.config, "pad_token_id", None)
    return int(found) if found is not None else 0
