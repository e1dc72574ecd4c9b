"""Tokens as targets: the loss, the outcomes and the scores of every language model."""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightsft.data.batching import IGNORED, pad_features
from lightsft.errors import ConfigurationError
from lightsft.metrics.language import token_scores
from lightsft.tasks.base import Array, Feature, Metrics, Task

COUNTS = 3  # columns of the outcomes before anything else: likelihood, right, tokens


@dataclass(frozen=True, kw_only=True)
class LanguageTask(Task, ABC):
    """-log softmax(logits)[target] summed over the supervised tokens, over their number.

    label_smoothing: the share of the target that is spread evenly over the vocabulary while training (1512.00567).
    """

    label_smoothing: float = 0.0

    metric: ClassVar[str] = "loss"
    metric_names: ClassVar[tuple[str, ...]] = ("loss", "perplexity", "token_accuracy")
    packs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ConfigurationError(f"label_smoothing={self.label_smoothing}", expected="a share in [0, 1)")

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

    def metrics(self, outcomes: Array) -> Metrics:
        """Loss and accuracy per token, and the perplexity exp(loss)."""
        return dict(token_scores(outcomes[:, :COUNTS]))
