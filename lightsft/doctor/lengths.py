"""How long the texts are: in tokens by the tokenizer that is used, without one in words and characters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from lightsft.doctor.collect import Collector, Seen, Tally
from lightsft.doctor.findings import Finding, percent, plural
from lightsft.doctor.samples import excerpt

BATCH_TEXTS, BATCH_BYTES = 1000, 2_000_000  # tokenized at once
WARN_SHARE = 0.01  # of rows cut, or of tokens
UNKNOWN_SHARE = 0.1  # of a row's tokens


class Histogram:
    """Counts of lengths, exact up to 999, then to three figures: a few thousand entries whatever the data."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()
        self.rows = self.total = 0

    def add(self, length: int) -> None:
        """Count one length."""
        self.rows += 1
        self.total += length
        step = 10 ** max(0, len(str(length)) - 3)
        self._counts[length // step * step] += 1

    def figures(self) -> dict[str, Any]:
        """p50, p95, max, total; `histogram` counts lengths up to each power of two."""
        lengths = np.array(sorted(self._counts))
        if not len(lengths):
            return {}
        reached = np.cumsum([self._counts[int(length)] for length in lengths])
        p50, p95 = (int(lengths[np.searchsorted(reached, share * reached[-1])]) for share in (0.5, 0.95))
        bins: Counter[int] = Counter()
        for length, count in self._counts.items():
            bins[1 << max(0, length - 1).bit_length()] += count
        return {
            "p50": p50,
            "p95": p95,
            "max": int(lengths[-1]),
            "total": self.total,
            "histogram": {f"<= {edge}": bins[edge] for edge in sorted(bins)},
        }


class TokenLengths(Collector):
    """What a task hands to the tokenizer is tokenized in batches; nothing but counts is kept of it.

    A length counts the special tokens that the tokenizer puts around a text or a pair, unless they are in the text
    already (`special`). Of a row with several inputs the longest counts. Tokens beyond `max_length`, by default the
    most that the tokenizer allows, are cut; with `cuts` false they are read in further windows.
    """

    def __init__(self, tokenizer: Any, max_length: int | None, *, cuts: bool = True, special: bool = True) -> None:
        self._tokenizer, self._special, self._cuts = tokenizer, special, cuts
        allowed = int(tokenizer.model_max_length)
        self._limit = min(max_length or allowed, allowed)
        self._unknown_id = getattr(tokenizer, "unk_token_id", None)
        self._pending: list[Seen] = []
        self._bytes = 0
        self._lengths = Histogram()
        self._cut, self._unknown = Tally(), Tally()
        self._tokens = self._tokens_cut = self._tokens_unknown = 0

    def see(self, row: Seen) -> None:
        """A text with half a surrogate pair is left out: no tokenizer takes it."""
        if row.usable and row.inputs and not _has_surrogate(row):
            self._pending.append(row)
            self._bytes += len(row.data)
            if len(self._pending) >= BATCH_TEXTS or self._bytes >= BATCH_BYTES:
                self._tokenize()

    def findings(self) -> Iterator[Finding]:
        """Rows that are cut, and how much is lost; rows that the tokenizer cannot spell."""
        self._tokenize()
        rows = self._lengths.rows
        if self._cut.count:
            grave = self._cut.count > WARN_SHARE * rows or self._tokens_cut > WARN_SHARE * self._tokens
            longest = self._lengths.figures()["max"]
            yield self._cut.finding(
                "over_long",
                "warning" if grave else "note",
                f"{plural(self._cut.count, 'row')} ({percent(self._cut.count, rows)}) longer than {self._limit:,} "
                f"tokens, the longest {longest:,}: {plural(self._tokens_cut, 'token')} would be cut "
                f"({percent(self._tokens_cut, self._tokens)} of all)",
                action=f"cuts at {self._limit:,} tokens",
                fix="raise --max-length as far as the model allows, or split the texts",
            )
        if self._unknown.count:
            yield self._unknown.finding(
                "unknown_tokens",
                "warning",
                f"{plural(self._unknown.count, 'row')} with over {percent(UNKNOWN_SHARE, 1)} unknown tokens "
                f"({percent(self._tokens_unknown, self._tokens)} of all tokens are unknown)",
                action="trains on the unknown token in their place",
                fix="take a model whose tokenizer knows these characters",
            )

    def figures(self) -> dict[str, Any]:
        """Lengths in tokens."""
        return {"tokens": {**self._lengths.figures(), "limit": self._limit if self._limit < 10**9 else None}}

    def _tokenize(self) -> None:
        if not self._pending:
            return
        inputs = [texts for row in self._pending for texts in row.inputs]
        ids = iter(token_ids(self._tokenizer, inputs, special=self._special))
        for row in self._pending:
            self._count(row, list(islice(ids, len(row.inputs))))
        self._pending, self._bytes = [], 0

    def _count(self, row: Seen, inputs: Sequence[list[int]]) -> None:
        lengths = [len(ids) for ids in inputs]
        self._lengths.add(max(lengths))
        self._tokens += sum(lengths)
        if self._cuts and max(lengths) > self._limit:
            self._tokens_cut += sum(max(0, length - self._limit) for length in lengths)
            self._cut.add(row.split, row.number, f"{max(lengths):,} tokens: {excerpt(row.text)}")
        unknown = 0 if self._unknown_id is None else sum(ids.count(self._unknown_id) for ids in inputs)
        self._tokens_unknown += unknown
        if unknown > UNKNOWN_SHARE * sum(lengths):
            self._unknown.add(row.split, row.number, excerpt(row.text))


class WordLengths(Collector):
    """Without a tokenizer: words (by spaces) and characters. A word is a token at least, so more words are cut too."""

    def __init__(self, max_length: int | None) -> None:
        self._limit = max_length
        self._words, self._characters = Histogram(), Histogram()
        self._cut = Tally()

    def see(self, row: Seen) -> None:
        """Count both."""
        if not row.usable:
            return
        self._characters.add(len(row.text))
        words = row.text.count(" ") + 1
        if self._limit is not None and words > self._limit:
            words = max((sum(len(text.split()) for text in texts) for texts in row.inputs), default=0)
            if words > self._limit:
                self._cut.add(row.split, row.number, f"{words:,} words: {excerpt(row.text)}")
        self._words.add(words)

    def findings(self) -> Iterator[Finding]:
        """Rows with more words than there may be tokens."""
        rows = self._words.rows
        if self._cut.count:
            yield self._cut.finding(
                "over_long",
                "warning" if self._cut.count > WARN_SHARE * rows else "note",
                f"at least {plural(self._cut.count, 'row')} ({percent(self._cut.count, rows)}) longer than "
                f"{self._limit:,} tokens: so many have more words, and no tokenizer was given to count more closely",
                action=f"cuts at {self._limit:,} tokens",
                fix="name the model to count in its tokens; raise --max-length, or split the texts",
            )

    def figures(self) -> dict[str, Any]:
        """Lengths in words and characters."""
        return {"words": self._words.figures(), "characters": self._characters.figures()}

    def not_checked(self) -> Iterator[str]:
        """Anything in tokens."""
        yield "tokens: no tokenizer was given, so lengths are in words and characters, and nothing was tokenized"


def token_ids(tokenizer: Any, inputs: Sequence[tuple[str, ...]], *, special: bool = True) -> list[list[int]]:
    """The ids of each text or pair, uncut; all have as many texts."""
    encoded = tokenizer(
        *map(list, zip(*inputs, strict=True)),
        truncation=False,
        add_special_tokens=special,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _has_surrogate(row: Seen) -> bool:
    return len(row.data) != len(row.text) and any("\ud800" <= character <= "\udfff" for character in row.text)
