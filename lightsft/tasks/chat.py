"""Chat and instruction tuning: a causal language model, with loss on the assistant's tokens only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

from jinja2 import TemplateError

from lightsft.data.batching import IGNORED
from lightsft.data.problems import Problem
from lightsft.data.reading import Row
from lightsft.errors import ConfigurationError, DataError
from lightsft.tasks.base import Feature
from lightsft.tasks.writing import WritingTask

Message = dict[str, str]
# Pairs of columns that hold a question and its answer, in the order in which they are looked for.
PAIRS = (("prompt", "completion"), ("instruction", "output"), ("question", "answer"))
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True, kw_only=True)
class Chat(WritingTask):
    """Next-token cross-entropy on what the assistant says; the score is the loss per token.

    Rows hold `messages` (role, content), `conversations` (from, value), or a pair of columns: prompt and completion,
    instruction (with input) and output, question and answer. The tokenizer's chat template renders them. What the
    assistant says before anybody has spoken is context: no prompt leads to it. loss_on: "assistant", or "all" for
    every token of the conversation. max_length: in tokens; longer conversations are cut at the end, as is what exceeds
    the tokenizer's own limit. What `generate` writes when scoring is an answer to each conversation's last question.
    """

    max_length: int = 512
    chat_template: str | None = None
    loss_on: Literal["assistant", "all"] = "assistant"

    name: ClassVar[str] = "chat"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_on not in ("assistant", "all"):
            raise ConfigurationError(f"loss_on={self.loss_on!r}", expected="'assistant' or 'all'")
        if self.loss_on == "all" and self.generate:
            raise ConfigurationError(
                "loss_on='all' leaves no prompt to generate from", expected="loss_on='assistant' beside generate"
            )

    def text_of(self, row: Row) -> str:
        """All that is said."""
        return "\n".join(message["content"] for message in messages_of(row))

    def key(self, row: Row) -> str:
        """What the user says first: the same question never is in two splits."""
        return next((m["content"] for m in messages_of(row) if m["role"] == "user"), "")

    def problems(self, row: Row) -> Iterator[Problem]:
        """No conversation, an assistant that says nothing, turns in an order that no template expects."""
        try:
            messages = messages_of(row)
        except DataError as error:
            yield Problem("no_conversation", f"cannot be read: {error.found}", error.expected, error.todo)
            return
        if not any(m["role"] == "assistant" and m["content"].strip() for m in messages[1:]):
            yield Problem(
                "no_answer",
                "has no answer of the assistant",
                expected="at least one non-empty assistant message after the first message",
                todo="remove the row",
            )
        yield from order_problems([message["role"] for message in messages])

    def token_problems(self, row: Row, tokenizer: Any) -> Iterator[Problem]:
        """A template that fails on it, or no token of the assistant within the limit."""
        try:
            feature = self._encode(row, tokenizer)
        except DataError as error:
            yield Problem("template_fails", f"cannot be rendered: {error.found}", error.expected, error.todo)
            return
        if all(label == IGNORED for label in feature["labels"]):
            yield Problem(
                "target_cut_off",
                f"has no assistant token within {self.max_length} tokens",
                expected="an answer inside the length limit",
                todo="raise --max-length",
            )

    def encode(self, rows: Sequence[Row], tokenizer: Any) -> list[Feature]:
        """Token ids of the conversation; labels are IGNORED outside the assistant's turns."""
        features = [self._encode(row, tokenizer) for row in rows]
        silent = [number for number, f in enumerate(features, 1) if all(label == IGNORED for label in f["labels"])]
        if silent:
            raise DataError(
                f"row {silent[0]}: no assistant token within {self.max_length} tokens ({len(silent)} such rows)",
                expected="an answer inside the length limit",
                todo="raise --max-length, or leave such rows out with --drop-bad-rows",
            )
        return features

    def render(self, row: Row, tokenizer: Any) -> str:
        """The conversation as the template writes it."""
        return "".join(piece for piece, _ in self._pieces(row, tokenizer))

    def _encode(self, row: Row, tokenizer: Any) -> Feature:
        pieces = self._pieces(row, tokenizer)
        encoded = tokenizer(
            "".join(piece for piece, _ in pieces),
            add_special_tokens=False,
            return_offsets_mapping=True,
            truncation=True,
            max_length=min(self.max_length, tokenizer.model_max_length),
        )
        spoken = _spans([(text, said or self.loss_on == "all") for text, said in pieces])
        labels = [
            token
            if self.loss_on == "all" or any(start < end and a <= start and end <= b for a, b in spoken)
            else IGNORED
            for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        ]
        return {
            "input_ids": encoded["input_ids"],
            "attention_mask": encoded["attention_mask"],
            "labels": labels,
        }

    def _pieces(self, row: Row, tokenizer: Any) -> list[tuple[str, bool]]:
        """The rendered text in pieces, each with whether the assistant says it (its end-of-turn mark included)."""
        messages, pieces, done = messages_of(row), [], ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or index == 0:
                continue
            opening = self.conversation(messages[:index], tokenizer, prompt=True)
            whole = self.conversation(messages[: index + 1], tokenizer)
            if not (opening.startswith(done) and whole.startswith(opening)):
                raise DataError(
                    "the chat template rewrites earlier turns, so the assistant's tokens cannot be told apart",
                    expected="a template whose text only grows from turn to turn",
                    todo="pass another template with --chat-template",
                )
            pieces += [(opening[len(done) :], False), (whole[len(opening) :], True)]
            done = whole
        return pieces

    def conversation(self, messages: Sequence[Message], tokenizer: Any, *, prompt: bool = False) -> str:
        """The conversation as text; with `prompt`, open for the assistant to speak."""
        if tokenizer.chat_template is None and self.chat_template is None:
            raise DataError(
                "the tokenizer has no chat template",
                expected="a model made for chat",
                todo="pass a Jinja template with --chat-template",
            )
        try:
            rendered: str = tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=prompt, chat_template=self.chat_template
            )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(
                f"the chat template does not render a conversation of {roles}: {error}",
                expected="a Jinja template that takes these roles in this order",
                todo="correct the rows, or pass another template with --chat-template",
            ) from error
        return rendered


def messages_of(row: Row) -> list[Message]:
    """The conversation of a row as messages with `role` and `content`."""
    if isinstance(row.get("messages"), Sequence) and not isinstance(row["messages"], str):
        return [_message(m, "role", "content") for m in row["messages"]]
    if isinstance(row.get("conversations"), Sequence) and not isinstance(row["conversations"], str):
        return [_message(m, "from", "value") for m in row["conversations"]]
    for asks, answers in PAIRS:
        if asks in row and answers in row:
            extra = _text(row.get("input"))
            question = _text(row[asks]) + (f"\n\n{extra}" if extra else "")
            opening = [{"role": "system", "content": str(row["system"])}] if row.get("system") else []
            return [
                *opening,
                {"role": "user", "content": question},
                {"role": "assistant", "content": _text(row[answers])},
            ]
    raise DataError(
        f"no conversation in the columns {', '.join(map(repr, row))}",
        expected="messages, conversations, or one of " + ", ".join(f"{a} and {b}" for a, b in PAIRS),
    )


def order_problems(roles: Sequence[str]) -> Iterator[Problem]:
    """Turns in an order that templates do not expect: a system message inside, or nobody else between two turns."""
    spoken = [role for role in roles if role != "system"]
    expected = "a system message first if at all, then user and assistant in turn"
    if "system" in roles[1:]:
        yield Problem("system_not_first", "has a system message that is not the first", expected, severity="warning")
    if any(one == other != "tool" for one, other in pairwise(spoken)):
        yield Problem("turns_out_of_order", "has two turns of the same role in a row", expected, severity="warning")
    if spoken[:1] == ["assistant"]:
        yield Problem("assistant_first", "opens with the assistant", expected, severity="warning")
    if spoken[-1:] == ["user"]:
        yield Problem("ends_with_user", "ends with a question nobody answers", expected, severity="warning")


def _message(message: Any, role: str, content: str) -> Message:
    known = ROLES.get(str(message.get(role))) if isinstance(message, dict) else None
    if known is None or not isinstance(message.get(content, 0), str | None):
        raise DataError(
            f"a message is {str(message)[:80]!r}",
            expected=f"{role!r} (one of {', '.join(ROLES)}) and a text as {content!r}",
        )
    return {"role": known, "content": _text(message[content])}


def _text(value: Any) -> str:
    """A cell as text; data sets store what is missing as None."""
    return "" if value is None else str(value)


def _spans(pieces: Sequence[tuple[str, bool]]) -> list[tuple[int, int]]:
    """Character ranges of what the assistant says."""
    spans, start = [], 0
    for text, spoken in pieces:
        if spoken:
            spans.append((start, start + len(text)))
        start += len(text)
    return spans
