"""Conversations as data sets keep them: rows of many forms to messages, and what is wrong with their order."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from lightsft.data.problems import Problem
from lightsft.data.reading import Row
from lightsft.errors import DataError

Message = dict[str, Any]
# Pairs of columns that hold a question and its answer, in the order in which they are looked for.
PAIRS = (("prompt", "completion"), ("instruction", "output"), ("question", "answer"))
ROLES = {"human": "user", "gpt": "assistant"} | {
    role: role for role in ("user", "assistant", "system", "developer", "tool", "function")
}
OPENING, CALLED = ("system", "developer"), ("tool", "function")
BESIDE = ("tool_calls", "tool_call_id", "name", "reasoning_content")  # what templates read of a message besides


def messages_of(row: Row) -> list[Message]:
    """The conversation of a row as messages with `role` and `content`."""
    _refuse_comparisons(row)
    if _listed(row.get("messages")):
        return [_message(m, "role", "content") for m in row["messages"]]
    if _listed(row.get("conversations")):
        return [_message(m, "from", "value") for m in row["conversations"]]
    for asks, answers in PAIRS:
        if asks in row and answers in row:
            extra = _text(row.get("input"))
            opening = [{"role": "system", "content": str(row["system"])}] if row.get("system") else []
            asked = _said(row[asks], "user")
            if extra and not _listed(row[asks]):
                asked = [{"role": "user", "content": f"{_text(row[asks])}\n\n{extra}"}]
            return [*opening, *asked, *_said(row[answers], "assistant")]
    plain = "text" in row
    raise DataError(
        f"no conversation in the columns {', '.join(map(repr, row))}",
        expected="messages, conversations, or one of " + ", ".join(f"{a} and {b}" for a, b in PAIRS),
        todo="take --task language-modeling for plain texts" if plain else "",
    )


def question_of(row: Row) -> list[Message]:
    """The conversation of a row up to the last message that is not the assistant's; the answer's column may lack."""
    open_pairs = {answers: "" for asks, answers in PAIRS if asks in row and answers not in row}
    messages = messages_of({**row, **open_pairs})
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise DataError("nothing is asked in the conversation", expected="a message of the user")
    return messages


def context_of(row: Row) -> int:
    """How many messages nothing is learned of: the first, and all of a prompt that is a list of them."""
    if _listed(row.get("messages")) or _listed(row.get("conversations")) or not _listed(row.get("prompt")):
        return 1
    return len(row["prompt"]) + bool(row.get("system"))


def tools_of(row: Row) -> list[Any] | None:
    """What the assistant may call, as the chat template takes it: a list, or JSON of one."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise DataError(f"the tools are no JSON: {error}", expected="a list of tools, or JSON of one") from error
    if tools and not _listed(tools):
        raise DataError(f"the tools are {str(tools)[:80]!r}", expected="a list of tools, or JSON of one")
    return list(tools) if tools else None


def says_something(message: Message) -> bool:
    """Whether there is a text in it, or a call."""
    return bool(message["content"].strip() or message.get("tool_calls"))


def order_problems(roles: Sequence[str]) -> Iterator[Problem]:
    """Turns in an order that templates do not expect: a system message inside, or nobody else between two turns."""
    spoken = [role for role in roles if role not in OPENING]
    expected = "a system message first if at all, then user and assistant in turn"
    if any(role in OPENING for role in roles[1:]):
        yield Problem("system_not_first", "has a system message that is not the first", expected, severity="warning")
    if any(one == other and one not in CALLED for one, other in pairwise(spoken)):
        yield Problem("turns_out_of_order", "has two turns of the same role in a row", expected, severity="warning")
    if spoken[:1] == ["assistant"]:
        yield Problem("assistant_first", "opens with the assistant", expected, severity="warning")
    if spoken[-1:] == ["user"]:
        yield Problem("ends_with_user", "ends with a question nobody answers", expected, severity="warning")


def _refuse_comparisons(row: Row) -> None:
    """Raise DataError for answers that are compared or judged: those are learned from in another way."""
    paired = "chosen" in row and "rejected" in row
    judged = isinstance(row.get("label"), bool) and "completion" in row
    if paired or judged or "completions" in row:
        raise DataError(
            "the row " + ("compares two answers (chosen, rejected)" if paired else "judges its answers"),
            expected="a conversation to be learned as it is",
            todo="keep the good answers as prompt and completion to imitate them; preferences are not learned here",
        )


def _said(cell: Any, role: str) -> list[Message]:
    """A cell with a text, or with messages."""
    return [_message(m, "role", "content") for m in cell] if _listed(cell) else [{"role": role, "content": _text(cell)}]


def _message(message: Any, role: str, content: str) -> Message:
    known = ROLES.get(str(message.get(role))) if isinstance(message, Mapping) else None
    text = _content(message.get(content, 0 if not message.get("tool_calls") else None)) if known else None
    if known is None or text is None:
        raise DataError(
            f"a message is {str(message)[:80]!r}",
            expected=f"{role!r} (one of {', '.join(ROLES)}) and as {content!r} a text, or a list of parts of type text",
        )
    return {"role": known, "content": text} | {name: message[name] for name in BESIDE if message.get(name)}


def _content(value: Any) -> str | None:
    """A message's text, of several parts if they are texts; None for anything else."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list | tuple):
        return None
    texts = [part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in value]
    return "".join(map(str, texts)) if all(isinstance(text, str) for text in texts) else None


def _listed(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _text(value: Any) -> str:
    """A cell as text; data sets store what is missing as None."""
    return "" if value is None else str(value)
