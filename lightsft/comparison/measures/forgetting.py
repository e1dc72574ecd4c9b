"""What training on one thing costs a language model elsewhere: nats per token of neutral text, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lightsft.backbone import Backbone
from lightsft.comparison.measures.neutral_text import neutral_passages
from lightsft.data.batching import MULTIPLE
from lightsft.data.reading import Row
from lightsft.dry_run import evaluating, text_config
from lightsft.injection import Injection
from lightsft.tasks.language_modeling import LanguageModeling
from lightsft.training.evaluate import outcomes_of

TOKENS = 8000
WINDOW = 512
PROBED = 8  # tokens


def forgetting(
    injection: Injection, texts: Sequence[str] | None = None, *, tokens: int = TOKENS, batch_size: int = 4
) -> dict[str, Any] | None:
    """{"before", "after": nats per token, "tokens": how many were predicted} of about this many tokens of the texts.

    Before is with the injection disabled. Texts are read in windows of WINDOW tokens, fewer where the model has fewer
    positions. None for models that do not write one token after the other.
    """
    backbone, model = injection.backbone, injection.model
    if model.get_output_embeddings() is None or model.config.is_encoder_decoder:
        return None
    task = LanguageModeling(max_length=_window(injection))
    rows = _as_many(task, neutral_passages() if texts is None else texts, backbone.tokenizer, tokens)
    with injection.disabled():
        if not rows or not _is_causal(backbone, task, rows[0]):
            return None
        before = outcomes_of(backbone, task, rows, batch_size)
    after = outcomes_of(backbone, task, rows, batch_size)
    return {
        "before": task.score(before, "loss"),
        "after": task.score(after, "loss"),
        "tokens": int(before[:, 2].sum()),
    }


def _window(injection: Injection) -> int:
    """WINDOW, or as many tokens as the model reads beside the strategy's own; batches are padded to a MULTIPLE."""
    positions = int(getattr(text_config(injection.model), "max_position_embeddings", None) or 0)
    taken = int(getattr(injection.strategy, "positions_taken", 0))
    room = (positions - taken) // MULTIPLE * MULTIPLE
    return max(2, min(WINDOW, room)) if positions > 0 else WINDOW


def _as_many(task: LanguageModeling, texts: Sequence[str], tokenizer: Any, tokens: int) -> list[Row]:
    """Whole texts, in their order, until they have so many tokens."""
    rows: list[Row] = []
    total = 0
    for text in texts:
        row = {task.text: text}
        if total >= tokens:
            break
        if not list(task.problems(row)) and not list(task.token_problems(row, tokenizer)):
            total += sum(len(feature["input_ids"]) - 1 for feature in task.encode([row], tokenizer))
            rows.append(row)
    return rows


def _is_causal(backbone: Backbone, task: LanguageModeling, row: Row) -> bool:
    """Whether what a token is leaves the logits of the tokens before it alone."""
    ids = torch.tensor(task.encode([row], backbone.tokenizer)[0]["input_ids"][:PROBED], device=backbone.model.device)
    other = ids.clone()
    other[-1] = ids[0] if ids[0] != ids[-1] else (ids[-1] + 1) % 2
    with torch.no_grad(), evaluating(backbone.model):
        one, two = (backbone.model(input_ids=given[None]).logits[0, :-1].float() for given in (ids, other))
    return bool(torch.allclose(one, two, atol=1e-3 * float(one.abs().max()) + 1e-6))
