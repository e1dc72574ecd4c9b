"""Chat and instruction tuning: a causal language model, with loss on the assistant's tokens only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jinja2 import TemplateError

from lightsft.data.batching import IGNORED
from lightsft.data.problems import Problem
from lightsft.data.reading import Row
from lightsft.errors import ConfigurationError, DataError
from lightsft.tasks.base import Feature
from lightsft.tasks.chat_templates import template_problems
from lightsft.tasks.conversations import (
    Message,
    context_of,
    messages_of,
    order_problems,
    question_of,
    says_something,
    tools_of,
)
from lightsft.tasks.writing import WritingTask

__all__ = ["Chat", "messages_of", "order_problems"]


@dataclass(frozen=True, kw_only=True)
class Chat(WritingTask):
    """Next-token cross-entropy on what the assistant says; the score is the loss per token.

    Rows hold `messages` (role, content), `conversations` (from, value), or a pair of columns: prompt and completion
    (texts or lists of messages), instruction (with input) and output, question and answer. `tools` beside them is
    handed to the chat template that renders them. What the assistant says before anybody has spoken, and in a prompt
    of several messages, is context. loss_on: "assistant", or "all" for every token of the conversation. max_length: in
    tokens; longer conversations are cut at the end, as is what exceeds the tokenizer's own limit. What `generate`
    writes when scoring is an answer to each conversation's last question.
    """

    max_length: int = 512
    chat_template: str | None = None
    loss_on: Literal["assistant", "all"] = "assistant"

    name: ClassVar[str] = "chat"
    asked: ClassVar[str] = "prompt"
    writes: ClassVar[str] = "answer"
    key_name: ClassVar[str] = "first question"
    adds_special_tokens: ClassVar[bool] = False  # the template writes what it wants

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

    def compared(self, row: Row) -> str:
        """All that is said under the system message, which many conversations share."""
        return "\n".join(message["content"] for message in messages_of(row) if message["role"] != "system")

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
        if not any(m["role"] == "assistant" and says_something(m) for m in messages[context_of(row) :]):
            yield Problem(
                "no_answer",
                "has no answer of the assistant",
                expected="at least one non-empty assistant message that answers something",
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
        template = self.chat_template or tokenizer.chat_template
        if tools_of(row) and isinstance(template, str) and "tools" not in template:
            yield Problem(
                "tools_not_shown",
                "has tools, which the chat template does not mention",
                expected="a template that renders them",
                todo="pass one with --chat-template",
                severity="warning",
            )
        yield from template_problems(messages_of(row), self.render(row, tokenizer), tokenizer)
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

    def read_columns(self) -> list[str]:
        """What is asked may stand in several columns; without a conversation, in this one."""
        return ["prompt"]

    def check_to_predict(self, rows: Sequence[Row]) -> None:
        """Raise DataError naming the first row without a question."""
        for number, row in enumerate(rows, 1):
            try:
                question_of(row)
            except DataError as error:
                raise DataError(f"row {number}: {error.found}", expected=error.expected, todo=error.todo) from error

    def prompt_ids(self, row: Row, tokenizer: Any) -> list[int]:
        """The conversation up to where the assistant is to speak, as the template writes it."""
        text = self.conversation(question_of(row), tokenizer, prompt=True, tools=tools_of(row))
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _pieces(self, row: Row, tokenizer: Any) -> list[tuple[str, bool]]:
        """The rendered text in pieces, each with whether the assistant says it (its end-of-turn mark included)."""
        messages, tools, pieces, done = messages_of(row), tools_of(row), [], ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or index < context_of(row):
                continue
            opening = self.conversation(messages[:index], tokenizer, prompt=True, tools=tools)
            whole = self.conversation(messages[: index + 1], tokenizer, tools=tools)
            if not (opening.startswith(done) and whole.startswith(opening)):
                raise DataError(
                    "the chat template rewrites earlier turns, so the assistant's tokens cannot be told apart",
                    expected="a template whose text only grows from turn to turn",
                    todo="pass another template with --chat-template",
                )
            pieces += [(opening[len(done) :], False), (whole[len(opening) :], True)]
            done = whole
        return pieces

    def conversation(
        self, messages: Sequence[Message], tokenizer: Any, *, prompt: bool = False, tools: list[Any] | None = None
    ) -> str:
        """The conversation as text; with `prompt`, open for the assistant to speak."""
        if tokenizer.chat_template is None and self.chat_template is None:
            raise DataError(
                "the tokenizer has no chat template",
                expected="a model made for chat",
                todo="pass a Jinja template with --chat-template",
            )
        try:
            rendered: str = tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=prompt,
                chat_template=self.chat_template,
                tools=tools,
            )
        except (TemplateError, TypeError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(
                f"the chat template does not render a conversation of {roles}: {error}",
                expected="a Jinja template that takes these roles in this order",
                todo="correct the rows, or pass another template with --chat-template",
            ) from error
        return rendered


def _spans(pieces: Sequence[tuple[str, bool]]) -> list[tuple[int, int]]:
    """Character ranges of what the assistant says."""
    spans, start = [], 0
    for text, spoken in pieces:
        if spoken:
            spans.append((start, start + len(text)))
        start += len(text)
    return spans
