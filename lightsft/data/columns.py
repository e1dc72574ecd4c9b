"""Which column is which, where the user named none: by its name, else by what it holds, and never silently."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightsft.data.column_contents import FITS, Kind, Values, by_content, filled
from lightsft.data.parts import Row
from lightsft.errors import DataError

FLAGS = ("text", "text_pair", "label")  # the roles with flags of their own
SAMPLED = 1000  # rows, evenly spaced: files are often sorted by label
PAIRS = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("question1", "question2"),
    ("query", "passage"),
    ("query", "document"),
)


@dataclass(frozen=True)
class ColumnKind:
    """What a task wants of a column.

    names: in order of preference; case, blanks and dashes do not matter. optional: taken by name alone, left out where
    there is none. second_of: the role with which this one makes a pair of texts; the two are then found together.
    """

    names: tuple[str, ...]
    kind: Kind
    optional: bool = False
    second_of: str | None = None


class Guess(dict[str, str]):
    """Roles to columns; `why` says for each whether its name or its content told."""

    def __init__(self, columns: Mapping[str, str], why: Mapping[str, str]) -> None:
        super().__init__(columns)
        self.why = dict(why)

    def line(self) -> str:
        """text: 'review' (by its content), label: 'sentiment' (by its name)."""
        return ", ".join(f"{role}: {column!r} (by its {self.why[role]})" for role, column in self.items())


def guess(
    rows: Sequence[Row], wanted: Mapping[str, ColumnKind], *, taken: Collection[str] = (), source: str = "the data"
) -> Guess:
    """A column for every role, and for an optional one where its name is there.

    Names come first: a column with one of the names is taken if at least half of its values are of the kind. What is
    still open is told by content among the columns that are left. No column gets two roles.
    Raises DataError for what is not there or could be several columns, with an example of each and what to name.
    """
    contents = {name: values for name, values in _contents(rows).items() if name not in taken}
    found = _pairs_by_name(contents, wanted)
    for role, column_kind in wanted.items():
        if role not in found:
            column = _by_name(contents, column_kind, taken=set(found.values()))
            found |= {role: column} if column else {}
    why = dict.fromkeys(found, "name")
    problems = []
    for role in sorted(wanted, key=lambda name: list(FITS).index(wanted[name].kind)):
        if role in found or wanted[role].optional:
            continue
        left = {name: values for name, values in contents.items() if name not in found.values()}
        candidates = by_content(wanted[role].kind, left, contents, found)
        if len(candidates) == 1:
            found[role], why[role] = candidates[0], "content"
        else:
            problems.append((role, candidates))
    if problems:
        raise _unclear(problems, contents, source)
    return Guess({role: found[role] for role in wanted if role in found}, why)


def pairs(columns: Sequence[str]) -> tuple[str, str] | None:
    """The two columns of a pair of texts with usual names, as they are spelled here."""
    spelled = {_plain(column): column for column in columns}
    for first, second in PAIRS:
        if first in spelled and second in spelled:
            return spelled[first], spelled[second]
    return None


def _contents(rows: Sequence[Row]) -> dict[str, Values]:
    """Every column with the values in it that are not missing, of at most SAMPLED rows."""
    sampled = rows[:: max(1, -(-len(rows) // SAMPLED))]
    names = dict.fromkeys(str(name) for row in sampled for name in row)
    return {name: [row.get(name) for row in sampled] for name in names}


def _pairs_by_name(contents: Mapping[str, Values], wanted: Mapping[str, ColumnKind]) -> dict[str, str]:
    """Both roles of a pair, unless the first is there under a name of its own that comes before."""
    found: dict[str, str] = {}
    for role, column_kind in wanted.items():
        first = column_kind.second_of
        both = pairs([name for name in contents if name not in found.values()])
        if first is None or first not in wanted or both is None:
            continue
        if _by_name(contents, wanted[first], set()) in (None, both[0]):
            found |= {first: both[0], role: both[1]}
    return found


def _by_name(contents: Mapping[str, Values], wanted: ColumnKind, taken: set[str]) -> str | None:
    spelled = {_plain(column): column for column in reversed(list(contents)) if column not in taken}
    named = [spelled[_plain(name)] for name in wanted.names if _plain(name) in spelled]
    return next((column for column in named if _mostly(FITS[wanted.kind], contents[column])), None)


def _mostly(fits: Callable[[Any], bool], values: Values) -> bool:
    """At least half of what is there: the rest is for the check of the rows to find."""
    there = filled(values)
    return 2 * sum(map(fits, there)) >= len(there)


def _plain(name: str) -> str:
    return name.strip().lower().replace("-", "_").replace(" ", "_")


def _unclear(problems: Sequence[tuple[str, Sequence[str]]], contents: Mapping[str, Values], source: str) -> DataError:
    said = [
        f"the {role.replace('_', ' ')} could be {' or '.join(map(repr, candidates))}"
        if candidates
        else f"no column looks like the {role.replace('_', ' ')}"
        for role, candidates in problems
    ]
    options = [f"--{role.replace('_', '-')} COLUMN" if role in FLAGS else f"{role}=COLUMN" for role, _ in problems]
    how = " ".join(options) + ("" if all(role in FLAGS for role, _ in problems) else " among the task's options")
    return DataError(
        f"{source}: " + "; ".join(said),
        expected=f"one of its columns: {', '.join(f'{name!r} ({_example(contents[name])})' for name in contents)}",
        todo=f"name {'it' if len(options) == 1 else 'them'} with {how}",
    )


def _example(values: Values) -> str:
    """The first value that is there, on one line."""
    there = filled(values)
    text = repr(there[0]) if there else "nothing"
    return text if len(text) <= 40 else f"{text[:37]}..."
