"""What the values of a column look like: a text, a label, a number, a list, a conversation, a file."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

Kind = Literal["messages", "file", "tokens", "tags", "list", "answers", "labels", "text", "number", "label"]
Values = Sequence[Any]

MOST_CLASSES = 100  # different values of a label that no name gives away
CLOSE = 0.8  # two texts of which one is on average this share of the other's length could be either
TURNS = ({"role", "content"}, {"from", "value"})  # the keys of a turn of a conversation


def filled(values: Values) -> list[Any]:
    """What is not missing: None, NaN and blank strings are."""
    return [value for value in values if not _missing(value)]


def _missing(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_text(value: Any) -> bool:
    """A string, or a number that a table made of one."""
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def is_label(value: Any) -> bool:
    """A class, or a list of them."""
    return isinstance(value, str | int | float | list | tuple)


def is_number(value: Any) -> bool:
    """A finite number, also written as one."""
    try:
        return not isinstance(value, bool) and math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


def is_list(value: Any) -> bool:
    """A list of anything."""
    return isinstance(value, list | tuple)


def is_tokens(value: Any) -> bool:
    """A list of strings."""
    return is_list(value) and all(isinstance(one, str) for one in value)


def is_tags(value: Any) -> bool:
    """A list of strings or class numbers."""
    return is_list(value) and all(isinstance(one, str | int) for one in value)


def is_answers(value: Any) -> bool:
    """Answers as SQuAD stores them ({"text", "answer_start"}), a list of answers, or one text."""
    return (isinstance(value, Mapping) and "text" in value) or is_list(value) or is_text(value)


def is_messages(value: Any) -> bool:
    """A list of turns, each with a role and a text."""
    return (
        is_list(value)
        and bool(value)
        and all(isinstance(one, Mapping) and any(keys <= one.keys() for keys in TURNS) for one in value)
    )


def is_file(value: Any) -> bool:
    """The path of a file, what a data set stores of one ({"bytes", "path"}), or an image or a sound in memory."""
    if isinstance(value, Mapping):
        return "bytes" in value or "path" in value or {"array", "sampling_rate"} <= value.keys()
    if isinstance(value, str | os.PathLike):
        path = os.fspath(value)
        return len(path) < 4096 and "\0" not in path and os.path.isfile(path)
    return type(value).__module__.partition(".")[0] == "PIL"


# In the order in which open roles are told by content: what is unmistakable first, a label last.
FITS: dict[Kind, Callable[[Any], bool]] = {
    "messages": is_messages,
    "file": is_file,
    "tokens": is_tokens,
    "tags": is_tags,
    "list": is_list,
    "answers": is_answers,
    "labels": is_label,
    "text": is_text,
    "number": is_number,
    "label": is_label,
}


def by_content(
    kind: Kind, left: Mapping[str, Values], columns: Mapping[str, Values], found: Mapping[str, str]
) -> list[str]:
    """The columns among `left` that could be of this kind: one is an answer, several are a question.

    columns: all of them. found: the roles that have one already, by which tags are told (as long as the tokens).
    """
    there = {name: filled(values) for name, values in left.items()}
    fitting = {name: values for name, values in there.items() if values and all(map(FITS[kind], values))}
    if kind == "text":
        return _longest({name: values for name, values in fitting.items() if isinstance(values[0], str)})
    if kind in ("answers", "labels"):  # a text is one by its name alone
        return [name for name, values in fitting.items() if not any(map(is_text, values))]
    if kind == "label":
        return [name for name, values in fitting.items() if _is_label_column(values)]
    if kind == "number":
        return [name for name, values in fitting.items() if not _counts_rows(values)]
    if kind == "tokens":
        return _tokens(fitting, left)
    if kind == "tags":
        words = [columns[name] for role, name in found.items() if role != "tags" and _holds_tokens(columns[name])]
        return [name for name in fitting if any(_same_lengths(left[name], one) for one in words)]
    return list(fitting)


def _longest(texts: Mapping[str, list[Any]]) -> list[str]:
    """The column of the longest strings on average, with those that come close; prose before codes and addresses."""
    prose = {name: values for name, values in texts.items() if sum(map(_is_prose, values)) * 2 >= len(values)}
    lengths = {name: sum(map(len, map(str, values))) / len(values) for name, values in (prose or texts).items()}
    longest = max(lengths.values(), default=0.0)
    return [name for name, length in lengths.items() if length >= CLOSE * longest]


def _is_prose(value: Any) -> bool:
    """Several words, or a script that need not separate them."""
    return bool(re.search(r"\S\s+\S", str(value))) or not str(value).isascii()


def _is_label_column(values: Sequence[Any]) -> bool:
    """Few different values, each of them a string, a boolean or a whole number."""
    if not all(isinstance(value, str | int) or (isinstance(value, float) and value.is_integer()) for value in values):
        return False
    return 2 <= len(set(values)) <= max(2, min(MOST_CLASSES, len(values) // 2))


def _counts_rows(values: Sequence[Any]) -> bool:
    """1, 2, 3, ...: a number of the row, or of a sample of the rows."""
    numbers = [float(value) for value in values]
    steps = {after - before for before, after in pairwise(numbers)}
    return len(numbers) > 2 and len(steps) == 1 and steps != {0.0} and all(number.is_integer() for number in numbers)


def _tokens(fitting: Mapping[str, list[Any]], left: Mapping[str, Values]) -> list[str]:
    """The lists of strings with the most different ones, of those that another list is as long as in every row."""
    paired = [
        name for name in fitting if any(_same_lengths(left[name], left[other]) for other in left if other != name)
    ]
    different = {name: len({word for values in fitting[name] for word in values}) for name in paired or fitting}
    most = max(different.values(), default=0)
    return [name for name, count in different.items() if count == most]


def _holds_tokens(values: Values) -> bool:
    there = filled(values)
    return bool(there) and all(map(is_tokens, there))


def _same_lengths(some: Values, others: Values) -> bool:
    """Whether both are lists, as long as each other in every row."""
    return all(
        is_list(one) and is_list(other) and len(one) == len(other) for one, other in zip(some, others, strict=True)
    )
