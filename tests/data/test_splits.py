"""Splits by hash: the same text always lands in the same split, whatever else there is."""

import random

import pytest

from lightsft.data.splits import at_most, position, split_rows
from lightsft.errors import DataError

ROWS = [{"text": f"text number {index}", "label": index % 2} for index in range(2000)]


def key(row):
    return row["text"]


def texts(rows):
    return {row["text"] for row in rows}


def test_every_row_is_in_one_split_and_in_its_order():
    splits = split_rows(ROWS, key, validation=0.1, test=0.2)
    parts = list(splits.named().values())
    assert sum(map(len, parts)) == len(ROWS)
    for part in parts:
        assert part == [row for row in ROWS if row["text"] in texts(part)]


def test_a_repeated_text_never_is_in_two_splits():
    splits = split_rows(ROWS * 2, key)
    train, validation, test = (texts(part) for part in splits.named().values())
    assert not train & validation
    assert not train & test
    assert not validation & test


@pytest.mark.parametrize(("validation", "test"), [(0.1, 0.1), (0.2, 0.05), (0.3, 0.3)])
def test_the_shares_are_about_right(validation, test):
    splits = split_rows(ROWS, key, validation=validation, test=test)
    assert len(splits.validation) / len(ROWS) == pytest.approx(validation, abs=0.03)
    assert len(splits.test) / len(ROWS) == pytest.approx(test, abs=0.03)


def test_a_text_s_split_depends_neither_on_the_order_nor_on_the_other_rows():
    whole = split_rows(ROWS, key)
    mixed = random.Random(0).sample(ROWS, len(ROWS))
    for other in (split_rows(mixed, key), split_rows(mixed[:1000], key)):
        for name, part in other.named().items():
            assert texts(part) <= texts(whole.named()[name])


def test_a_larger_share_keeps_what_was_in_the_smaller_one():
    small, large = split_rows(ROWS, key, test=0.1), split_rows(ROWS, key, test=0.2)
    assert texts(small.test) < texts(large.test)


def test_the_position_of_a_text_is_fixed_for_all_time():
    assert position("") == pytest.approx(0xE3B0C44298FC1C14 / 2**64)
    assert 0 <= position("größe") < 1


def test_a_share_of_nothing_leaves_that_split_empty():
    splits = split_rows(ROWS[:50], key, validation=0.0, test=0.0)
    assert (len(splits.train), splits.validation, splits.test) == (50, [], [])


def test_a_wanted_split_without_a_row_is_refused():
    with pytest.raises(DataError, match=r"1 rows leave the .* split empty"):
        split_rows(ROWS[:1], key)


@pytest.mark.parametrize("limit", [1, 10, 500])
def test_a_limit_keeps_the_order_and_is_part_of_every_larger_limit(limit):
    chosen, more = at_most(ROWS, limit, key), at_most(ROWS, limit * 2, key)
    assert len(chosen) == limit
    assert chosen == [row for row in ROWS if row["text"] in texts(chosen)]
    assert texts(chosen) < texts(more)


def test_a_limit_does_not_depend_on_the_order():
    assert texts(at_most(ROWS[::-1], 100, key)) == texts(at_most(ROWS, 100, key))


@pytest.mark.parametrize("limit", [None, 2000, 5000])
def test_a_limit_that_is_not_reached_keeps_everything(limit):
    assert at_most(ROWS, limit, key) == ROWS


def test_a_limited_split_is_not_made_of_the_lowest_positions():
    chosen = at_most(ROWS, 200, key)
    mean = sum(position(key(row)) for row in chosen) / 200
    assert mean == pytest.approx(0.5, abs=0.1)
