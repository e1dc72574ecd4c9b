"""Scores within groups: those of each group's rows, small groups joined, many groups cut."""

import numpy as np

import lightsft
from lightsft.comparison.measures.groups import EMPTY, FEW, MOST, REST, by_group, grouped
from tests.checkpoints import LABELS

TASK = lightsft.task("classification", labels=LABELS)


def outcomes_of(right):
    """One row for each of these: the label pos said, right or wrong."""
    return np.array([[0.2, 0.8, float(one)] for one in right])


def test_a_group_s_score_is_that_of_its_rows():
    chance = np.random.default_rng(0)
    outcomes, values = outcomes_of(chance.random(100) < 0.7), ["de"] * 60 + ["en"] * 40
    found = by_group(TASK, outcomes, values, "accuracy")
    assert list(found) == ["de", "en"]
    assert found["de"] == {"count": 60, "accuracy": TASK.score(outcomes[:60], "accuracy")}
    assert found["en"] == {"count": 40, "accuracy": TASK.score(outcomes[60:], "accuracy")}


def test_small_groups_are_one_and_what_is_empty_has_a_name():
    values = ["a"] * 10 + ["b"] * 9 + ["c"] * 3 + [None] * 6 + [" "] * 6
    assert grouped(values) == ["a"] * 10 + [FEW] * 12 + [EMPTY] * 12
    found = by_group(TASK, outcomes_of([1] * 34), [1] * 20 + [1.5] * 14, "accuracy")
    assert {name: one["count"] for name, one in found.items()} == {"1": 20, "1.5": 14}


def test_there_are_at_most_so_many_groups():
    values = [f"g{n:02}" for n in range(40) for _ in range(10 + (n < 5))]
    counts = {name: grouped(values).count(name) for name in set(grouped(values))}
    assert len(counts) == MOST
    assert counts[REST] == len(values) - 5 * 11 - 14 * 10
    exactly = [f"g{n:02}" for n in range(MOST) for _ in range(10)]
    assert len(set(grouped(exactly))) == MOST
    assert REST not in grouped(exactly)
    one_more = [*exactly, "x"]
    assert len(set(grouped(one_more))) == MOST
    assert grouped(one_more).count(REST) == 11


def test_a_score_that_a_group_does_not_define_is_none():
    found = by_group(TASK, outcomes_of([1] * 10 + [0, 1] * 5), ["a"] * 10 + ["b"] * 10, "auroc")
    assert found["a"] == {"count": 10, "auroc": None}
    assert found["b"]["auroc"] == 0.5
