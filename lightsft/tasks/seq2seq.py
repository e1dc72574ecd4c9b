"""Text to text: translation, summarization, questions answered in words. An encoder with a decoder, or a decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor

from lightsft.data.batching import IGNORED, pad, pad_features
from lightsft.data.columns import ColumnKind
from lightsft.data.problems import Problem
from lightsft.data.reading import Row
from lightsft.errors import ConfigurationError
from lightsft.tasks.base import Feature
from lightsft.tasks.texts import text_problems
from lightsft.tasks.writing import WritingTask

PLACE = "{source}"


@dataclass(frozen=True, kw_only=True)
class Seq2Seq(WritingTask):
    """Next-token cross-entropy on the target, its end included; the score is the loss per token.

    source, target: columns. template: what the model reads, with {source} in it ("translate English to German:
    {source}"); by default the source, for a decoder alone with an empty line after it. max_length, max_target_length:
    in tokens; of what is longer the end of the source is cut, not the template around it, and a target is cut to
    max_target_length alone. decoder_only: found from the model, which then reads both as one text of max_length.
    """

    source: str = "source"
    target: str = "target"
    template: str | None = None
    max_length: int = 512
    max_target_length: int = 128
    decoder_only: bool = False

    name: ClassVar[str] = "seq2seq"
    targets: ClassVar[frozenset[str]] = frozenset({"target"})
    columns: ClassVar[Mapping[str, ColumnKind]] = {
        "source": ColumnKind(("source", "src", "input", "document", "article", "question", "text", "en"), "text"),
        "target": ColumnKind(("target", "tgt", "output", "summary", "highlights", "answer", "translation"), "text"),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.template is not None and PLACE not in self.template:
            raise ConfigurationError(f"template={self.template!r}", expected=f"a text with {PLACE} in it")
        if self.decoder_only and self.max_target_length >= self.max_length:
            raise ConfigurationError(
                f"max_target_length={self.max_target_length} leaves no room in max_length={self.max_length}",
                expected="a shorter target: a decoder alone reads both as one text",
            )

    def for_model(self, reads_both_ways: bool) -> Self:
        """One text for a decoder alone, two for an encoder with a decoder."""
        return dataclasses.replace(self, decoder_only=not reads_both_ways)

    @property
    def shifts(self) -> bool:
        """A decoder's input is shifted already where there is an encoder."""
        return self.decoder_only

    @property
    def packs(self) -> bool:  # type: ignore[override]
        """Only as one text."""
        return self.decoder_only

    # ---- rows

    def text_of(self, row: Row) -> str:
        """The source."""
        return str(row[self.source])

    def target_of(self, row: Row) -> str:
        """The target."""
        return str(row[self.target])

    def all_text(self, row: Row) -> str:
        """Source and target."""
        return f"{self.text_of(row)}\n{self.target_of(row)}"

    def inputs(self, row: Row, tokenizer: Any = None) -> list[tuple[str, ...]]:
        """The source in its template; of a decoder alone the target shares its room."""
        source = self.render(row, tokenizer)
        return [(source, self.target_of(row))] if self.decoder_only else [(source,)]

    def problems(self, row: Row) -> Iterator[Problem]:
        """An empty source or target."""
        yield from text_problems(row, [self.source, self.target])

    def render(self, row: Row, tokenizer: Any) -> str:
        """The source in the template."""
        template = self.template or (f"{PLACE}\n\n" if self.decoder_only else PLACE)
        return template.replace(PLACE, str(row[self.source]))

    def token_problems(self, row: Row, tokenizer: Any) -> Iterator[Problem]:
        """A target that is cut is worth knowing."""
        length, limit = len(self._target_ids(row, tokenizer)), self._target_limit(tokenizer)
        if length > limit:
            yield Problem(
                "target_cut",
                f"has a target of {length} tokens",
                f"at most {limit}",
                "raise max_target_length",
                severity="warning",
            )

    # ---- features

    def encode(self, rows: Sequence[Row], tokenizer: Any) -> list[Feature]:
        """Source ids and target ids, or one text with labels on the target."""
        encode = self._as_one if self.decoder_only else self._as_two
        return [encode(row, tokenizer) for row in rows]

    def _as_two(self, row: Row, tokenizer: Any) -> Feature:
        read = self._source_ids(row, tokenizer, min(self.max_length, tokenizer.model_max_length))
        target = self._target_ids(row, tokenizer)[: self.max_target_length]
        return {"input_ids": read, "attention_mask": [1] * len(read), "labels": target}

    def _as_one(self, row: Row, tokenizer: Any) -> Feature:
        target = self._target_ids(row, tokenizer)[: self._target_limit(tokenizer)]
        read = self._source_ids(row, tokenizer, min(self.max_length, tokenizer.model_max_length) - len(target))
        ids = read + target
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORED] * len(read) + target}

    def _target_limit(self, tokenizer: Any) -> int:
        """Tokens of a target; with the source in one text there is a token left for that."""
        beside = tokenizer.model_max_length - 1 if self.decoder_only else self.max_target_length
        return int(min(self.max_target_length, beside))

    def _source_ids(self, row: Row, tokenizer: Any, room: int) -> list[int]:
        """At most `room` tokens of the source in its template, cut at the end of the source."""
        encoded = tokenizer(self.render(row, tokenizer), return_offsets_mapping=True, truncation=False, verbose=False)
        ids = list(encoded["input_ids"])
        first = len((self.template or PLACE).partition(PLACE)[0])
        last = first + len(str(row[self.source]))
        inside = [place for place, (a, b) in enumerate(encoded["offset_mapping"]) if first <= a < b <= last]
        ended = self.decoder_only and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id
        if ended:  # a prompt is not over: some tokenizers end every text
            ids = ids[:-1]
        excess = set(inside[-(len(ids) - room) :] if len(ids) > room else ())
        return [token for place, token in enumerate(ids) if place not in excess][:room]

    def _target_ids(self, row: Row, tokenizer: Any) -> list[int]:
        """The target as the decoder writes it, its end token last."""
        text = str(row[self.target])
        if self.decoder_only:
            ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        else:
            ids = list(tokenizer(text_target=text)["input_ids"])
        end = tokenizer.eos_token_id
        return ids if end is None or ids[-1:] == [end] else [*ids, end]

    def prompt_ids(self, row: Row, tokenizer: Any) -> list[int]:
        """The source in its template; for a decoder alone with room for a target."""
        limit = min(self.max_length, tokenizer.model_max_length)
        return self._source_ids(row, tokenizer, limit - (self._target_limit(tokenizer) if self.decoder_only else 0))

    def collate(self, features: Sequence[Feature], tokenizer: Any) -> dict[str, Tensor]:
        """Padded on the right; labels have a length of their own where there are two texts."""
        if self.decoder_only:
            return pad_features(features, tokenizer.pad_token_id)
        read = [{name: value for name, value in feature.items() if name != "labels"} for feature in features]
        batch = pad_features(read, tokenizer.pad_token_id)
        return {**batch, "labels": pad([feature["labels"] for feature in features], IGNORED)}

    def length(self, feature: Feature) -> int:
        """Tokens of both texts."""
        return len(feature["input_ids"]) + (0 if self.decoder_only else len(feature["labels"]))

    # ---- the model

    def model_inputs(self, inputs: Mapping[str, Tensor], labels: Tensor, model: Any) -> dict[str, Tensor]:
        """The decoder reads the target one step behind, from its start token on."""
        if self.decoder_only:
            return dict(inputs)
        return {**inputs, "decoder_input_ids": one_step_behind(labels, model)}

    def prompts(self, inputs: Mapping[str, Tensor], labels: Tensor, padding: int) -> dict[str, Tensor]:
        """What the encoder reads, or what comes before the target."""
        return super().prompts(inputs, labels, padding) if self.decoder_only else dict(inputs)

    def preview(self, row: Row, tokenizer: Any) -> list[tuple[str, bool]]:
        """The source, then the target."""
        if self.decoder_only:
            return super().preview(row, tokenizer)
        feature = self.encode([row], tokenizer)[0]
        return [(tokenizer.decode(feature["input_ids"]), False), (tokenizer.decode(feature["labels"]), True)]


def one_step_behind(labels: Tensor, model: Any) -> Tensor:
    """(batch, tokens) what the decoder reads to predict `labels`, as the model makes it where it says how."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        own: Tensor = model.prepare_decoder_input_ids_from_labels(labels=labels)
        return own
    start, padding = model.config.decoder_start_token_id, model.config.pad_token_id
    if start is None or padding is None:
        raise ConfigurationError(
            f"{type(model).__name__} has decoder_start_token_id={start} and pad_token_id={padding}",
            expected="a configuration that names the token that decoding starts from, and the padding",
            todo="set them in the model's config.json",
        )
    behind = labels.new_full(labels.shape, start)
    behind[:, 1:] = labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, padding)
    return behind
