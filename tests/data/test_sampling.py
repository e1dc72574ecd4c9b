"""Rows that stand for a large source: evenly spaced, with every value of every column that takes few."""

import pytest

from lightsft.data import sampling
from lightsft.data.parts import Numbered, numbered
from lightsft.data.problems import Problem
from lightsft.data.sampling import representative


@pytest.fixture(autouse=True)
def _few(monkeypatch):
    monkeypatch.setattr(sampling, "MOST_ROWS", 100)
    monkeypatch.setattr(sampling, "MOST_VALUES", 10)


def test_all_rows_of_a_small_source_are_taken():
    rows = [{"text": str(n)} for n in range(100)]
    assert representative(numbered(rows)) == rows


def test_of_a_large_source_a_bounded_and_evenly_spaced_part_is():
    taken = [row["n"] for row in representative(numbered({"n": float(n)} for n in range(10_000)))]
    assert taken[:10] == list(range(10))  # its first values, which are new
    assert set(range(0, 10_000, 128)) <= set(taken)
    assert len(taken) <= 110


@pytest.mark.parametrize(
    "cell",
    ["late", 7, None, ["late"], "a,late", "a , late", {"text": ["late"]}, {"text": []}, []],
    ids=repr,
)
def test_a_value_that_occurs_once_is_seen(cell):
    usual = [["a"], ["a"], "a", "a"]
    rows = [{"label": usual[n % 4], "text": f"text {n}"} for n in range(5000)]
    rows[4321]["label"] = cell
    assert rows[4321] in representative(numbered(rows))


def test_another_separator_parts_other_texts():
    rows = [{"labels": "ab"[n % 2] + "|b"} for n in range(5000)]
    rows[4321] = {"labels": "a|c"}
    assert rows[4321] in representative(numbered(rows), separator="|")


def test_of_long_rows_fewer_are_held(monkeypatch):
    monkeypatch.setattr(sampling, "MOST_BYTES", 10_000)
    rows = [{"text": "x" * 1000, "label": "ab"[n == 40]} for n in range(90)]
    taken = representative(Numbered(n, row, position=1000 * n) for n, row in enumerate(rows, 1))
    assert taken[0] == rows[0]
    assert 3 <= sum(row in rows for row in taken) <= 10
    assert {"label": "b"} in taken  # without its long text


def test_rows_that_cannot_be_read_are_passed_over():
    rows = [Numbered(1, None, Problem("broken", "is broken")), Numbered(2, {"text": "a"})]
    assert representative(rows) == [{"text": "a"}]
