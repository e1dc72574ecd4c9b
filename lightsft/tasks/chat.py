"""Chat and instruction tuning: a causal language model, with loss on the assistant's tokens only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jinja2 import TemplateError
from torch import Tensor

from lightsft.data.batching import IGNORED, pad_features
from lightsft.data.reading import Row
from lightsft.errors import DataError
from lightsft.tasks.base import Metrics, Task

Message = dict[str, str]
# Pairs of columns that hold a question and its answer, in the order in which they are looked for.
PAIRS = (("prompt", "completion"), ("instruction", "output"), ("question", "answer"))
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Chat(Task):
    """Next-token cross-entropy on what the assistant says; the score is the loss per token.

    Rows hold `messages` (role, content), `conversations` (from, value), or a pair of columns: prompt and completion,
    instruction (with input) and output, question and answer. The tokenizer's chat template renders them. What the
    assistant says before anybody has spoken is context: no prompt leads to it. max_length: in tokens; longer
    conversations are cut at the end, as is what exceeds the tokenizer's own limit.
    """

    max_length: int = 512
    chat_template: str | None = None

    name: ClassVar[str] = "chat"
    metric: ClassVar[str] = "loss"
    metric_names: ClassVar[tuple[str, ...]] = ("loss", "perplexity", "token_accuracy")

    def describe(self) -> dict[str, Any]:
        """The fields, and the task's name."""
        return {"name": self.name, **asdict(self)}

    def key(self, row: Row) -> str:
        """What the user says first: the same question never is in two splits."""
        return next((m["content"] for m in messages_of(row) if m["role"] == "user"), "")

    def check(self, rows: Sequence[Row], source: str) -> None:
        """Every row must hold a conversation in which the assistant says something."""
        for number, row in enumerate(rows, 1):
            try:
                messages = messages_of(row)
            except DataError as error:
                raise DataError(f"{source}: row {number}: {error.found}", expected=error.expected) from error
            if not any(m["role"] == "assistant" and m["content"].strip() for m in messages[1:]):
                raise DataError(
                    f"{source}: row {number} has no answer of the assistant",
                    expected="at least one non-empty assistant message after the first message",
                    todo="remove the row",
                )

    def encode(self, rows: Sequence[Row], tokenizer: Any) -> list[dict[str, Any]]:
        """Token ids of the conversation; labels are IGNORED outside the assistant's turns."""
        features = [self._encode(row, tokenizer) for row in rows]
        silent = [number for number, f in enumerate(features, 1) if all(label == IGNORED for label in f["labels"])]
        if silent:
            raise DataError(
                f"row {silent[0]}: no assistant token within {self.max_length} tokens ({len(silent)} such rows)",
                expected="an answer inside the length limit",
                todo="raise --max-length, or remove the rows",
            )
        return features

    def _encode(self, row: Row, tokenizer: Any) -> dict[str, Any]:
        pieces = self._pieces(row, tokenizer)
        text = "".join(piece for piece, _ in pieces)
        encoded = tokenizer(
            text,
            add_special_tokens=False,
            return_offsets_mapping=True,
            truncation=True,
            max_length=min(self.max_length, tokenizer.model_max_length),
        )
        spoken = _spans(pieces)
        labels = [
            token if any(start < end and begin <= start and end <= stop for begin, stop in spoken) else IGNORED
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
            opening = self.render(messages[:index], tokenizer, prompt=True)
            whole = self.render(messages[: index + 1], tokenizer)
            if not (opening.startswith(done) and whole.startswith(opening)):
                raise DataError(
                    "the chat template rewrites earlier turns, so the assistant's tokens cannot be told apart",
                    expected="a template whose text only grows from turn to turn",
                    todo="pass another template with --chat-template",
                )
            pieces += [(opening[len(done) :], False), (whole[len(opening) :], True)]
            done = whole
        return pieces

    def render(self, messages: Sequence[Message], tokenizer: Any, *, prompt: bool = False) -> str:
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

    def collate(self, features: Sequence[dict[str, Any]], tokenizer: Any) -> dict[str, Tensor]:
        """Padded on the right: positions then start at 0 in every row."""
        return pad_features(features, tokenizer.pad_token_id)

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """-log softmax(logits[t])[token t+1] over the assistant's tokens; only their logits are widened to fp32."""
        spoken, targets = _supervised(outputs.logits, labels)
        total = torch.nn.functional.cross_entropy(spoken.float(), targets, reduction="sum")
        return total / (num_items_in_batch if num_items_in_batch is not None else max(1, targets.shape[0]))

    def outcomes(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(batch, 3): summed negative log-likelihood, right top-1 predictions, tokens."""
        rows = torch.arange(labels.shape[0], device=labels.device)[:, None].expand(-1, labels.shape[1] - 1)
        row = rows[labels[:, 1:] != IGNORED]
        spoken, targets = _supervised(logits, labels)
        losses = torch.nn.functional.cross_entropy(spoken.float(), targets, reduction="none")
        per_token = torch.stack([losses, (spoken.argmax(-1) == targets).float(), torch.ones_like(losses)], dim=1)
        return torch.zeros(labels.shape[0], 3, device=labels.device).index_add_(0, row, per_token)

    def metrics(self, outcomes: np.ndarray[Any, Any]) -> Metrics:
        """Loss and accuracy per token, and the perplexity exp(loss)."""
        likelihood, right, tokens = outcomes.sum(axis=0)
        loss = float(likelihood / tokens)
        return {"loss": loss, "perplexity": float(np.exp(loss)), "token_accuracy": float(right / tokens)}

    def preview(self, row: Row, tokenizer: Any) -> list[tuple[str, bool]]:
        """The rendered conversation, split where the loss mask changes."""
        feature = self._encode(row, tokenizer)
        pieces: list[tuple[str, bool]] = []
        run: list[int] = []
        for index, (token, label) in enumerate(zip(feature["input_ids"], feature["labels"], strict=True)):
            run.append(token)
            following = feature["labels"][index + 1 : index + 2]
            if not following or (following[0] == IGNORED) != (label == IGNORED):
                pieces.append((tokenizer.decode(run), label != IGNORED))
                run = []
        return pieces


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


def _supervised(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens, vocabulary) logits that predict a supervised token, and (tokens,) those tokens."""
    targets = labels[:, 1:]
    chosen = targets != IGNORED
    return logits[:, :-1][chosen], targets[chosen]
