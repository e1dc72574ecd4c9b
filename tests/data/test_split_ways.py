"""Splits by class and by group: shares, what stays together, and what moves when rows are added."""

import math
import random
from collections import Counter

import pytest

from lightsft.data.splits import position, split_rows
from lightsft.errors import DataError

CLASSES = ["common"] * 30 + ["usual"] * 15 + ["rare"] * 4 + ["odd"]
SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}


def some_rows(number, seed=0):
    """Rows with a class, an author (about 5 rows each), and every tenth text a second time."""
    generator = random.Random(seed)
    return [
        {
            "text": f"text {seed} {index - index % 10 // 9}",
            "label": generator.choice(CLASSES),
            "author": f"author {generator.randrange(number // 5)}",
        }
        for index in range(number)
    ]


ROWS = some_rows(5000)
WAYS = [
    {},
    {"how": "stratified"},
    {"group": "author"},
    {"how": "stratified", "group": "author"},
]
GOLDEN = [  # validation and test, by SHA-256 and a sort
    "7,11,21 6,12,13,14,17,19,20,26,28",
    "6,7,11,28 12,13,17,19,20,26",
    "8,9,20,21,26,27 16,17,18,19",
    "8,9,20,21 16,17,18,19,26,27",
]


def key(row):
    return row["text"]


def label(row):
    return row["label"]


def split(rows, **options):
    shares = {"validation": SHARES["validation"], "test": SHARES["test"]}
    return split_rows(rows, key, classes=label, **(shares | options)).named()


def places(rows, **options):
    """The split of each text or group."""
    column = options.get("group", "text")
    return {row[column]: name for name, part in split(rows, **options).items() for row in part}


@pytest.mark.parametrize("options", WAYS)
def test_splits_are_disjoint_and_complete_and_keep_the_order(options):
    parts = split(ROWS, **options)
    numbers = {id(row): number for number, row in enumerate(ROWS)}
    found = [[numbers[id(row)] for row in part] for part in parts.values()]
    assert sorted(number for part in found for number in part) == list(range(len(ROWS)))
    assert all(part == sorted(part) for part in found)


@pytest.mark.parametrize("options", WAYS)
def test_no_text_and_no_group_is_in_two_splits(options):
    column = options.get("group", "text")
    parts = [{row[column] for row in part} for part in split(ROWS, **options).values()]
    assert sum(map(len, parts)) == len(set.union(*parts))


@pytest.mark.parametrize("options", WAYS[::2])
def test_adding_rows_moves_none_by_hash(options):
    before = places(ROWS[:3000], **options)
    after = places(ROWS, **options)
    assert all(after[unit] == name for unit, name in before.items())


@pytest.mark.parametrize("options", WAYS)
def test_neither_the_order_nor_the_machine_matters(options):
    mixed = random.Random(1).sample(ROWS, len(ROWS))
    assert places(mixed, **options) == places(ROWS, **options)


def test_shares_by_hash_lie_within_binomial_bounds():
    """Five standard deviations of independent draws, of a text that is there twice as two rows."""
    parts = split(ROWS)
    for name, share in SHARES.items():
        bound = 5 * math.sqrt(len(ROWS) * share * (1 - share) * 1.2)
        assert abs(len(parts[name]) - share * len(ROWS)) < bound


def test_every_class_has_its_share_of_single_texts_to_half_a_row():
    rows = [{**row, "text": str(index)} for index, row in enumerate(ROWS)]
    parts, totals = split(rows, how="stratified"), Counter(map(label, rows))
    for name, part in parts.items():
        for one, count in Counter(map(label, part)).items():
            assert abs(count - SHARES[name] * totals[one]) <= (1.0 if name in ("validation", "train") else 0.5)


def test_every_class_has_its_share_of_groups_by_their_majority():
    parts = split(ROWS, how="stratified", group="author")
    votes = {}
    for row in ROWS:
        votes.setdefault(row["author"], Counter())[row["label"]] += 1
    majority = {author: min(counts, key=lambda name: (-counts[name], name)) for author, counts in votes.items()}
    sizes = {author: counts.total() for author, counts in votes.items()}
    for one in {"common", "usual", "rare"}:
        total = sum(size for author, size in sizes.items() if majority[author] == one)
        largest = max(size for author, size in sizes.items() if majority[author] == one)
        for name, part in parts.items():
            found = sum(majority[row["author"]] == one for row in part)
            assert abs(found - SHARES[name] * total) <= largest


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (1, {"train": 1}),
        (2, {"train": 1, "test": 1}),
        (3, {"train": 1, "validation": 1, "test": 1}),
        (4, {"train": 2, "validation": 1, "test": 1}),
        (30, {"train": 21, "validation": 3, "test": 6}),
    ],
)
def test_a_small_class_has_one_row_in_each_split_before_a_second(size, expected):
    rows = ROWS[:200] + [{"text": f"small {index}", "label": "small"} for index in range(size)]
    parts = split(rows, how="stratified")
    assert {name: n for name, part in parts.items() if (n := Counter(map(label, part))["small"])} == expected


@pytest.mark.parametrize("seed", range(3))
def test_a_row_more_moves_at_most_one_of_its_class_over_each_cut(seed):
    rows = [{**row, "text": str(index)} for index, row in enumerate(some_rows(400, seed))]
    order = {"test": 0, "validation": 1, "train": 2}
    moves = 0
    for number in range(100, 400):
        before = places(rows[:number], how="stratified")
        after = places(rows[: number + 1], how="stratified")
        moved = [text for text, name in before.items() if after[text] != name]
        assert all(rows[int(text)]["label"] == rows[number]["label"] for text in moved)
        crossed = Counter(
            cut for text in moved for cut in (0, 1) if (order[before[text]] <= cut) != (order[after[text]] <= cut)
        )
        assert all(count == 1 for count in crossed.values())
        moves += len(moved)
    assert moves  # the guarantee is not that of hashing


def test_rows_without_a_class_are_a_class_of_their_own():
    rows = [{"text": str(index), "label": None if index % 2 else "a"} for index in range(200)]
    parts = split(rows, how="stratified")
    assert [Counter(map(label, part)) for part in parts.values()] == [
        {None: 70, "a": 70},
        {None: 10, "a": 10},
        {None: 20, "a": 20},
    ]


def test_a_row_without_a_group_is_decided_by_its_text():
    rows = [{"text": str(index), "author": None} for index in range(300)]
    assert split(rows, group="author") == split(rows)


def test_a_group_column_that_is_not_there_is_refused():
    with pytest.raises(DataError, match="no row has a column 'writer'") as caught:
        split(ROWS, group="writer")
    assert "'author'" in caught.value.expected


def test_groups_too_few_for_three_splits_are_refused():
    with pytest.raises(DataError, match="in groups by 'author' leave the"):
        split([{**row, "author": "one"} for row in ROWS], group="author")


@pytest.mark.parametrize(("text", "digest"), [("a", 0xCA978112CA1BBDCA), ("größe", None), ("\ud800", None)])
def test_positions_are_the_same_on_any_machine(text, digest):
    if digest is not None:
        assert position(text) == digest / 2**64
    assert 0 <= position(text) < 1


@pytest.mark.parametrize(("options", "expected"), list(zip(WAYS, GOLDEN, strict=True)))
def test_the_split_of_these_rows_is_fixed_for_all_time(options, expected):
    parts = split([{"text": f"text {n}", "label": "ab"[n % 2], "author": f"{n // 2}"} for n in range(30)], **options)
    assert " ".join(",".join(row["text"][5:] for row in parts[name]) for name in ("validation", "test")) == expected
