"""What a chat template makes of a conversation: whether all of it is there, in its order, behind one BOS token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightsft.data.problems import Problem

OTHER = "pass another template with --chat-template, or take a model whose template fits these conversations"


def template_problems(messages: Sequence[Mapping[str, str]], rendered: str, tokenizer: Any) -> Iterator[Problem]:
    """Contents that the template leaves out or moves, and a BOS token that would come twice.

    messages: of which those up to the assistant's last are rendered; nothing is learned from what follows.
    """
    last = max((n for n, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
    position, moved = 0, False
    for number, message in enumerate(messages[: last + 1], 1):
        content = message["content"].strip()  # templates trim
        place = rendered.find(content, position)
        if place < 0 and content not in rendered:
            yield Problem(
                "message_left_out",
                f"loses its message {number} ({message['role']}: {content[:40]!r}) in the chat template",
                "every message in the rendered text",
                OTHER,
                severity="warning",
            )
        moved |= place < 0 and content in rendered
        position = place + len(content) if place >= 0 else position
    if moved:
        yield Problem(
            "messages_reordered",
            "has messages that the chat template puts in another order",
            "the rendered text in the order of the messages",
            OTHER,
            severity="warning",
        )
    yield from _bos_problems(rendered, tokenizer)


def _bos_problems(rendered: str, tokenizer: Any) -> Iterator[Problem]:
    bos = tokenizer.bos_token
    if not bos or not rendered.startswith(bos):
        return
    if rendered.startswith(bos * 2):
        yield Problem(
            "two_bos_tokens",
            f"begins with {bos} twice in the chat template",
            f"one {bos}",
            "correct the template",
            severity="warning",
        )
    elif tokenizer(bos)["input_ids"][:2] == [tokenizer.bos_token_id] * 2:
        yield Problem(
            "bos_added_again",
            f"begins with {bos} in the chat template, and the tokenizer puts another before it",
            "one of the two; training adds none to the template's",
            "tokenize what the template renders with add_special_tokens=False where the model is used",
            severity="note",
        )
