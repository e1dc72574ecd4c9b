"""k examples per class: as many as asked for, another draw with another number, the same draw anywhere."""

import random
from collections import Counter

import pytest

from lightsft.data.few_shot import few_shot
from lightsft.errors import DataError

SINGLE = [{"text": f"text {index}", "label": "abc"[index % 3]} for index in range(300)]
GOLDEN = [["text 292", "text 111", "text 158"], ["text 178", "text 279", "text 110"]]  # by SHA-256, one after the other


def key(row):
    return row["text"]


def one(row):
    return [row["label"]]


def several(row):
    return row["types"]


def sentences(number, seed, most=4):
    """Rows with 0 to `most` types, some of them rare."""
    generator = random.Random(seed)
    weights = [16, 8, 4, 2, 1]
    return [
        {"text": f"sentence {index}", "types": generator.choices("ABCDE", weights, k=generator.randint(0, most))}
        for index in range(number)
    ]


def counts(rows, classes):
    return Counter(name for row in rows for name in classes(row))


@pytest.mark.parametrize("k", [1, 2, 16, 100])
def test_rows_with_one_class_give_exactly_k_of_each(k):
    assert counts(few_shot(SINGLE, k, one, 0, key), one) == {"a": k, "b": k, "c": k}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("k", [1, 5, 10])
def test_rows_with_several_classes_give_at_least_k_and_at_most_2k_of_each(k, seed):
    rows = sentences(2000, seed)
    found = counts(few_shot(rows, k, several, seed, key), several)
    assert set(found) == set("ABCDE")
    assert all(k <= count <= max(2 * k, 4) for count in found.values())
    if k > 1:
        assert max(found.values()) <= 2 * k


def test_where_2k_is_out_of_reach_there_are_still_k():
    rows = [{"text": str(index), "types": ["A"] * 5 + [rare]} for index, rare in enumerate("BBCC")]
    found = counts(few_shot(rows, 2, several, 0, key), several)
    assert found == {"A": 20, "B": 2, "C": 2}


def test_rows_without_a_class_are_not_taken():
    assert all(row["types"] for row in few_shot(sentences(500, 0), 5, several, 0, key))


def test_another_draw_takes_other_rows():
    draws = [{key(row) for row in few_shot(SINGLE, 10, one, draw, key)} for draw in range(10)]
    overlap = [len(a & b) for a in draws for b in draws if a is not b]
    assert max(overlap) < 15  # of 30; 3 on average
    assert 1 < sum(overlap) / len(overlap) < 6


@pytest.mark.parametrize(("rows", "classes"), [(SINGLE, one), (sentences(500, 1), several)])
def test_a_draw_does_not_depend_on_the_order_of_the_rows(rows, classes):
    mixed = random.Random(0).sample(rows, len(rows))
    assert few_shot(mixed, 5, classes, 3, key) == few_shot(rows, 5, classes, 3, key)


def test_a_text_is_drawn_once_and_its_label_does_not_depend_on_the_order():
    rows = [{"text": "same", "label": label} for label in "ba"] + SINGLE
    for mixed in (rows, rows[::-1]):
        drawn = few_shot(mixed * 2, 100, one, 0, key)
        assert len({key(row) for row in drawn}) == len(drawn) == 300
        assert all(row["label"] == "a" for row in drawn if row["text"] == "same")


def test_a_draw_is_the_same_on_any_machine():
    assert [row["text"] for row in few_shot(SINGLE, 1, one, 0, key)] == GOLDEN[0]
    assert [row["text"] for row in few_shot(SINGLE, 1, one, 1, key)] == GOLDEN[1]


def test_classes_with_too_few_rows_are_all_named():
    rows = [*SINGLE[:30], {"text": "x", "label": "rare"}, {"text": "x", "label": "rare"}, {"text": "y", "label": "odd"}]
    with pytest.raises(DataError, match=r"fewer than 2 different examples of 'odd' \(1\), 'rare' \(1\)"):
        few_shot(rows, 2, one, 0, key)


@pytest.mark.parametrize(("rows", "k"), [([], 1), (SINGLE, 0), ([{"text": "a", "types": []}], 1)])
def test_nothing_to_draw_from_is_refused(rows, k):
    with pytest.raises(DataError, match="examples of"):
        few_shot(rows, k, several if rows and "types" in rows[0] else one, 0, key)
