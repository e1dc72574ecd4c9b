"""New tokens: rows of embedding and head that are trained while all others stay, E'[id_k] = R_k.

R (tokens, size) for a table that embedding and head share, one for each where they are not tied, and (tokens,) for a
bias of the head; everything else about them: `lightsft.primitives.trained_rows`. Only R is trained and saved. In a
combination (`combined` of lora and new_tokens) the rest of the model learns beside it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightsft import Backbone, Injection, injecting
from lightsft.dry_run import evaluating
from lightsft.errors import ConfigurationError, TargetError
from lightsft.primitives import Arrangement
from lightsft.primitives.trained_rows import PlacedRows
from lightsft.seeding import generator
from lightsft.vocabulary import Table, Vocabulary, find_vocabulary
from lightsft_adapters.checks import at_least, one_of
from lightsft_adapters.pieces import SCALE_SAMPLE, pieces_of

INITIALISATIONS = ("mean", "text", "random")


@dataclass(frozen=True)
class NewTokens:
    """Trained rows for tokens that the model did not have, or for some that it has.

    tokens: texts of new tokens. The backbone's tokenizer, if it has one, is replaced by a copy that knows them.
    count: so many new rows without a text, instead.
    rows: ids of tokens to train, instead; those beyond the last one are new.
    initialisation: of new rows: "mean" (of all rows), "text" (the mean of the rows of the pieces that the token's text
        is split into without it) or "random" (normal, as wide as all rows). Rows of tokens that were known start as
        they are.
    special: the tokenizer treats `tokens` as marks, which it leaves out of decoded text when asked to.
    """

    tokens: Sequence[str] = ()
    count: int = 0
    rows: Sequence[int] = ()
    initialisation: str = "mean"
    special: bool = False

    learning_rate: ClassVar[float] = 1e-3
    places_last: ClassVar[int] = 1  # what others do to embedding and head does not reach the new rows

    def __post_init__(self) -> None:
        at_least("count", self.count, 0)
        one_of("initialisation", self.initialisation, INITIALISATIONS)
        if isinstance(self.tokens, str):
            raise ConfigurationError(f"tokens={self.tokens!r}", expected="a list of texts: tokens=['<a>', '<b>']")
        if not all(isinstance(token, str) and token for token in self.tokens):
            raise ConfigurationError(f"tokens={self.tokens!r}", expected="texts that are not empty")
        for name, values in (("tokens", self.tokens), ("rows", self.rows)):
            if len(set(values)) < len(values):
                raise ConfigurationError(f"{name}={values!r}", expected="each of them once")
        if self.initialisation == "text" and not self.tokens:
            raise ConfigurationError("initialisation='text' without tokens", expected="texts to split into pieces")

    def inject(self, backbone: Backbone, *, seed: int = 0) -> Injection:
        """Put the rows on `backbone`, and the tokens into a copy of its tokenizer."""
        if sum(map(bool, (self.tokens, self.count, self.rows))) != 1:
            raise ConfigurationError(
                f"tokens={self.tokens!r}, count={self.count} and rows={self.rows!r}",
                expected="one of the three",
                todo="new_tokens(tokens=['<a>', '<b>']) or new_tokens(count=2)",
            )
        with injecting(self, backbone, seed) as injection:
            vocabulary = find_vocabulary(backbone.model)
            before = backbone.tokenizer
            if self.tokens and before is not None:
                injection.place(ExtendedTokenizer(backbone, self.tokens, special=self.special))
            ids = self._ids(backbone.tokenizer, vocabulary.size)
            starts = _Starts(self, backbone, before, vocabulary, ids, seed)
            injection.place(
                PlacedRows(
                    backbone.model,
                    vocabulary,
                    backbone.anatomy,
                    ids,
                    {table.name: starts.of(table) for table in vocabulary.tables},
                    keep_ids=bool(self.tokens) and before is not None,
                )
            )
            _check_runs(backbone, max(ids))
        return injection

    def _ids(self, tokenizer: Any, size: int) -> list[int]:
        if self.rows:
            return list(self.rows)
        if self.tokens and tokenizer is not None:
            return [int(i) for i in tokenizer.convert_tokens_to_ids(list(self.tokens))]
        return list(range(size, size + (self.count or len(self.tokens))))


class ExtendedTokenizer(Arrangement):
    """A copy of the backbone's tokenizer that knows more tokens, in its place; the strategy's options name them."""

    def __init__(self, backbone: Backbone, tokens: Sequence[str], *, special: bool) -> None:
        self.name, self.backbone, self.before = "tokenizer", backbone, backbone.tokenizer
        backbone.tokenizer = copy.deepcopy(self.before)
        backbone.tokenizer.add_tokens(list(tokens), special_tokens=special)

    def remove(self) -> None:
        """Put the tokenizer back that was there before."""
        self.backbone.tokenizer = self.before


class _Starts:
    """What the rows of each table start at."""

    def __init__(
        self, strategy: NewTokens, backbone: Backbone, tokenizer: Any, vocabulary: Vocabulary, ids: list[int], seed: int
    ) -> None:
        """`tokenizer` is the one that was given: it may know the tokens already, with rows of the model or without."""
        self.model, self.ids, self.seed, self.initialisation = backbone.model, ids, seed, strategy.initialisation
        self.pieces: Mapping[int, list[int]] = {}
        known = strategy.rows
        if strategy.tokens and tokenizer is not None:
            words = tokenizer.get_vocab()
            known = [words[token] for token in strategy.tokens if token in words]
        self.known = {i for i in known if i < vocabulary.size}
        if self.initialisation == "text" and backbone.restoring:
            self.initialisation = "mean"  # the rows come from a file, the pieces are not needed
        elif self.initialisation == "text":
            texts = dict(zip(ids, strategy.tokens, strict=True))
            self.pieces = {i: pieces_of(tokenizer, t, vocabulary.size) for i, t in texts.items() if i not in self.known}

    def of(self, table: Table) -> Tensor:
        """(tokens, ...), fp32."""
        entries = table.by_token(self.model).detach()
        return torch.stack([self._start(table, entries, i) for i in self.ids])

    def _start(self, table: Table, entries: Tensor, i: int) -> Tensor:
        if i in self.known or (table.buffer and i < len(entries)):
            return entries[i].float()
        if table.buffer:  # as transformers resizes them
            return torch.zeros_like(entries[0], dtype=torch.float32)
        if self.initialisation == "text":
            return entries[self.pieces[i]].float().mean(0)
        if self.initialisation == "random" and entries.ndim > 1:
            some = entries[:: max(1, len(entries) // SCALE_SAMPLE)].float()
            noise = torch.empty(entries.shape[1:]).normal_(generator=generator(self.seed, f"{table.name}.{i}"))
            return noise.to(entries.device) * some.std()
        return entries.mean(0, dtype=torch.float32)


def _check_runs(backbone: Backbone, token: int) -> None:
    """Raise TargetError if the model does not take this token."""
    model, example = backbone.model, dict(backbone.example or {})
    if not example or model.device.type == "meta":
        return
    for name in example.keys() & {"input_ids", "decoder_input_ids"}:
        example[name] = example[name].clone()
        example[name][:, max(0, example[name].shape[1] - 2)] = token  # the last one may have to be the end
    try:
        with torch.no_grad(), evaluating(model):
            model(**example)
    except Exception as error:  # whatever a model's code raises on a token that it does not know
        raise TargetError(
            f"{type(model).__name__} does not take the token {token}: {type(error).__name__}: {error}",
            expected="a model that looks tokens up in those tables alone that transformers resizes",
            todo="train rows of tokens that it has already: new_tokens(rows=[...])",
        ) from error
