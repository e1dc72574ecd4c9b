"""Scores of predicted tokens: outcomes are (examples, 3), summed negative log-likelihood, tokens right, tokens."""

from __future__ import annotations

import math

from lightsft.metrics.arrays import Array


def token_scores(outcomes: Array) -> dict[str, float | None]:
    """loss = sum NLL / tokens in nats, perplexity = exp(loss), token accuracy = right / tokens.

    Every token weighs the same, whatever its example. With masked tokens the perplexity is the exp of their mean NLL:
    the pseudo-perplexity of 1910.14659 when each token was masked by itself, an estimate of it when many were masked
    at once. None without a token; a perplexity beyond floating point is None too.
    """
    likelihood, right, tokens = outcomes.astype(float).sum(axis=0)
    if not tokens:
        return dict.fromkeys(("loss", "perplexity", "token_accuracy"))
    loss = float(likelihood / tokens)
    return {"loss": loss, "perplexity": perplexity(loss), "token_accuracy": float(right / tokens)}


def perplexity(loss: float) -> float | None:
    """exp(loss), None where that is no finite number."""
    try:
        found = math.exp(loss)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None
