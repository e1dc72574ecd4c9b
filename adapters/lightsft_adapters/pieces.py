"""From a text to the ids of the tokens that it consists of, for strategies that start from the embeddings of a text."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer

from lightsft.errors import ConfigurationError

SCALE_SAMPLE = 1000  # tokens whose embeddings tell the scale of all


def pieces_of(tokenizer: Any, text: str, size: int) -> list[int]:
    """Ids of the pieces of `text`, without special tokens, all of them below `size`: those that a model has a row for.

    Tokens that were added to the tokenizer beyond `size` are split as if it did not know them. Raises
    ConfigurationError without a tokenizer, for a text without pieces, and where a tokenizer cannot forget a token.
    """
    if tokenizer is None:
        raise ConfigurationError(
            "initialisation='text' on a backbone without a tokenizer",
            expected="a tokenizer that splits the text",
            todo="load it with Backbone.load, or give one: Backbone(model, tokenizer=...)",
        )
    ids: list[int] = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if any(i >= size for i in ids) and hasattr(tokenizer, "backend_tokenizer"):
        ids = _without_tokens_from(tokenizer.backend_tokenizer, size).encode(text, add_special_tokens=False).ids
    if not ids:
        raise ConfigurationError(f"the tokenizer finds no token in {text!r}", expected="at least one token")
    if any(i >= size for i in ids):
        raise ConfigurationError(
            f"the tokenizer makes the token {max(ids)} of {text!r}, and the model has {size}",
            expected="a tokenizer that splits the text into tokens of the model",
            todo="give the backbone a tokenizer without that token, or use another initialisation",
        )
    return ids


def _without_tokens_from(backend: Tokenizer, size: int) -> Tokenizer:
    """A copy of a fast tokenizer that does not know the added tokens from the id `size` on."""
    written = json.loads(backend.to_str())
    written["added_tokens"] = [token for token in written["added_tokens"] if token["id"] < size]
    return Tokenizer.from_str(json.dumps(written))
