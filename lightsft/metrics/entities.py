"""Entities of tag sequences (BIO and its relatives), what is wrong with a sequence, and precision, recall, F1.

Two definitions. The lenient one is conlleval's, and seqeval's default: a tag that continues nothing begins an entity.
The strict one is seqeval's mode="strict": only what its scheme spells out is an entity.

    scheme   prefixes        an entity of three tokens, of one
    BIO      B I             B I I, B          (IOB2)
    IOB1     B I             I I I, I          B only where an entity of the same type ends right before
    BIOES    B I E S         B I E, S          (IOBES)
    BILOU    B I L U         B I L, U
    BMES     B M E S         B M E, S
    IO       I               I I I, I
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from lightsft.errors import DataError
from lightsft.metrics.arrays import Array, precision_recall_f1

Entity = tuple[str, int, int]  # type, first token, the token after the last
Tag = tuple[str, str]  # prefix among O B I E S and ?, type

OUTSIDE: Tag = ("O", "")
# What a scheme calls the prefixes O B I E S.
SCHEMES: dict[str, dict[str, str]] = {
    "BIO": {"B": "B", "I": "I"},
    "IOB1": {"B": "B", "I": "I"},
    "BIOES": {"B": "B", "I": "I", "E": "E", "S": "S"},
    "BILOU": {"B": "B", "I": "I", "L": "E", "U": "S"},
    "BMES": {"B": "B", "M": "I", "E": "E", "S": "S"},
    "IO": {"I": "I"},
}
UNTYPED = "_"  # the type of a bare B or I


def find_entities(tags: Sequence[str], scheme: str = "BIO", strict: bool = False) -> list[Entity]:
    """(type, start, end) of each entity in order, tokens [start, end).

    A tag is O, or a prefix of the scheme, a hyphen and a type. DataError for any other.
    """
    parsed = _parse(tags, scheme)
    unknown = [tag for tag, (prefix, _) in zip(tags, parsed, strict=True) if prefix == "?"]
    if unknown:
        allowed = ", ".join(f"{prefix}-" for prefix in SCHEMES[scheme])
        raise DataError(f"the tag {unknown[0]!r}", expected=f"O, or a type after {allowed} as {scheme} has it")
    if not strict or scheme == "IO":
        return _between(parsed, _parts)
    if scheme == "IOB1":
        return _between(_separating(parsed), _parts)
    entities = _between(parsed, lambda before, tag: not _continues(before, tag))
    return [entity for entity in entities if _complete(parsed, entity, _closes(scheme))]


def broken(tags: Sequence[str], scheme: str = "BIO") -> list[int]:
    """Positions of tags that the scheme does not allow where they stand, in order.

    A tag it does not know; an I or E after nothing of its type; with BIOES and its like a B or I whose entity does not
    go on to an E; with IOB1 a B that separates nothing.
    """
    parsed = _parse(tags, scheme)
    neighbours = zip([OUTSIDE, *parsed], parsed, [*parsed[1:], OUTSIDE], strict=False)
    return [
        position
        for position, (before, tag, after) in enumerate(neighbours)
        if tag[0] == "?" or not _allowed(before, tag, after, scheme)
    ]


def counts(
    truth: Sequence[str], predicted: Sequence[str], types: Sequence[str], scheme: str = "BIO", strict: bool = False
) -> Array:
    """(3 types,) of one sentence: entities right, predicted, true, each by type; right is type and both ends."""
    true, guessed = (set(find_entities(tags, scheme, strict)) for tags in (truth, predicted))
    index = {name: number for number, name in enumerate(types)}
    table = np.zeros((3, len(types)))
    for row, entities in zip(table, (true & guessed, guessed, true), strict=True):
        for name, _, _ in entities:
            if name not in index:
                raise DataError(f"an entity of type {name!r}", expected=f"one of {', '.join(map(repr, types))}")
            row[index[name]] += 1
    return table.ravel()


def entity_scores(outcomes: Array) -> dict[str, float]:
    """Precision, recall and F1 over entities (micro), their mean over types (macro), and weighted by true entities.

    outcomes: (examples, 3 types) of `counts`, or their sum. P = right / predicted, R = right / true, F1 = 2 P R /
    (P + R), 0 where nothing is divided by. Macro and weighted run over the types that occur in truth or prediction, as
    in seqeval.
    """
    hits, predicted, truly = _summed(outcomes)
    occurs = (predicted + truly) > 0
    by_type = [score[occurs] for score in precision_recall_f1(hits, predicted, truly)]
    micro = precision_recall_f1(hits.sum(), predicted.sum(), truly.sum())
    share = truly[occurs] / max(1.0, truly.sum())
    scores = {}
    for name, whole, values in zip(("precision", "recall", "f1"), micro, by_type, strict=True):
        scores[name] = float(whole)
        scores[f"macro_{name}"] = float(values.mean()) if len(values) else 0.0
        scores[f"weighted_{name}"] = float(values @ share)
    return scores


def entity_per_type(outcomes: Array, types: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Precision, recall, F1 and number of true entities of each type."""
    hits, predicted, truly = _summed(outcomes)
    rows = zip(*precision_recall_f1(hits, predicted, truly), truly, strict=True)
    return {
        name: {"precision": float(p), "recall": float(r), "f1": float(f), "entities": int(n)}
        for name, (p, r, f, n) in zip(types, rows, strict=True)
    }


def scheme_of(sequences: Iterable[Iterable[str]]) -> str:
    """The scheme that tag sequences, or sets of tags, are written in; "plain" where tags are no entities (POS).

    Decided by the prefixes in use. IOB1 has those of BIO, so it takes sequences to tell them apart: some that BIO
    calls broken and none that IOB1 does.
    """
    rows = [list(tags) for tags in sequences]
    tags = {tag for row in rows for tag in row} - {"O"}
    prefixes = {tag.partition("-")[0] for tag in tags}
    for scheme in ("IO", "BIO", "BIOES", "BILOU", "BMES"):
        if prefixes and prefixes <= set(SCHEMES[scheme]):
            break
    else:
        return "plain"
    if scheme == "BIO" and any(broken(row) for row in rows) and not any(broken(row, "IOB1") for row in rows):
        return "IOB1"
    return scheme


def types_of(tags: Iterable[str], scheme: str = "BIO") -> list[str]:
    """The entity types among some tags, sorted."""
    return sorted({kind for prefix, kind in _parse(list(tags), scheme) if prefix not in "O?"})


def _parse(tags: Sequence[str], scheme: str) -> list[Tag]:
    if scheme not in SCHEMES:
        raise DataError(f"the tag scheme {scheme!r}", expected=f"one of {', '.join(SCHEMES)}")
    return [_split(tag, SCHEMES[scheme]) for tag in tags]


def _split(tag: str, prefixes: dict[str, str]) -> Tag:
    prefix, _, kind = tag.partition("-")
    return ("O", "") if tag == "O" else (prefixes.get(prefix, "?"), kind or UNTYPED)


def _between(tags: Sequence[Tag], parts: Callable[[Tag, Tag], bool]) -> list[Entity]:
    """Runs of tags other than O, cut wherever `parts` says that two neighbours do not belong together."""
    found, start = [], 0
    for position, (before, tag) in enumerate(pairwise([OUTSIDE, *tags, OUTSIDE])):
        if parts(before, tag):
            if before[0] != "O":
                found.append((before[1], start, position))
            start = position
    return found


def _parts(before: Tag, tag: Tag) -> bool:
    """conlleval: after O E S, before O B S, and where the type changes."""
    return before[0] in "OES" or tag[0] in "OBS" or before[1] != tag[1]


def _continues(before: Tag, tag: Tag) -> bool:
    return before[0] in "BI" and tag[0] in "IE" and before[1] == tag[1]


def _complete(tags: Sequence[Tag], entity: Entity, closes: bool) -> bool:
    """Whether a run of tags that continue each other is what the scheme writes: B I*, or B I* E and S."""
    _, start, end = entity
    if not closes or tags[start][0] == "S":
        return tags[start][0] in "BS"
    return tags[start][0] == "B" and tags[end - 1][0] == "E"


def _separating(tags: Sequence[Tag]) -> list[Tag]:
    """IOB1 tags with O for each B that separates nothing."""
    pairs = pairwise([OUTSIDE, *tags])
    return [tag if _allowed(before, tag, OUTSIDE, "IOB1") else OUTSIDE for before, tag in pairs]


def _allowed(before: Tag, tag: Tag, after: Tag, scheme: str) -> bool:
    prefix = tag[0]
    if scheme == "IO" or prefix == "O":
        return True
    if scheme == "IOB1":
        return prefix == "I" or (before[0] in "BI" and before[1] == tag[1])
    if prefix in "IE" and not _continues(before, tag):
        return False
    return not (_closes(scheme) and prefix in "BI") or _continues(tag, after)


def _closes(scheme: str) -> bool:
    return "E" in SCHEMES[scheme].values()


def _summed(outcomes: Array) -> Array:
    """(3, types): right, predicted, true."""
    total: Array = np.atleast_2d(outcomes).sum(axis=0).astype(float).reshape(3, -1)
    return total
