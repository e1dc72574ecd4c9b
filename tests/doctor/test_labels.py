"""Labels: what is said of which, and only once."""

import pytest

from lightsft.doctor import labels
from lightsft.tasks import task
from tests.doctor.reviews import clean_rows, codes, examine, examined, found, numbered


def rows_with(counts, seed=0):
    names = [label for label, count in counts.items() for _ in range(count)]
    return [{**row, "label": label} for row, label in zip(clean_rows(len(names), seed), names, strict=True)]


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({"a": 50, "b": 50}, set()),
        ({"a": 50, "b": 10}, set()),  # 5 times as many
        ({"a": 51, "b": 10}, {("imbalance", "note")}),
        ({"a": 161, "b": 8}, {("imbalance", "warning")}),  # over 20 times
        ({"a": 90, "b": 10}, {("imbalance", "note")}),
        ({"a": 91, "b": 10}, {("imbalance", "warning")}),  # over 90 %
        ({"a": 50, "b": 7}, {("rare_label", "warning")}),
        ({"a": 50, "b": 8}, {("imbalance", "note")}),
        ({"a": 50}, set()),
    ],
)
def test_the_limits_are_where_they_are_said_to_be(counts, expected):
    assert {(one.code, one.severity) for one in examined(rows_with(counts)).findings} == expected


def test_rows_of_a_task_without_labels_lack_none():
    assert codes(examined([{"text": row["text"]} for row in clean_rows(30)])) == set()


def test_spellings_are_put_together_before_they_are_counted():
    report = examined(rows_with({"Positive": 20, "negative": 20, "positive ": 4, "ｎegative": 3}))
    finding = found(report, "label_spellings")
    assert codes(report) == {"label_spellings"}
    assert finding.count == 7
    assert finding.sample == "'Positive' = 'positive '; 'negative' = 'ｎegative'"


def test_a_spelling_that_the_task_refuses_is_named_beside_its_error():
    rows = rows_with({"pos": 20, "neg": 20, "Pos": 2})
    report = examined(rows, labels=("pos", "neg"))
    assert codes(report) == {"unknown_label", "label_spellings"}
    assert found(report, "label_spellings").rows == {"train": (41, 42)}
    assert report.refused == {"train": 2}


def test_a_row_without_labels_is_noted_where_the_task_takes_it():
    rows = [{"text": row["text"], "labels": ["ab"[n % 2]]} for n, row in enumerate(clean_rows(40))]
    rows[6]["labels"] = []
    report = examine({"train": numbered(rows)}, task("multi-label", labels=("a", "b")))
    assert [(one.code, one.severity, one.rows) for one in report.findings] == [("no_label", "note", {"train": (7,)})]


def test_a_split_without_any_label_lacks_none_in_particular():
    rows = [{"text": row["text"], "labels": ["ab"[n % 2]]} for n, row in enumerate(clean_rows(49))]
    splits = {"train": numbered(rows[:40]), "test": numbered({**row, "labels": []} for row in rows[40:])}
    assert codes(examine(splits, task("multi-label", labels=("a", "b")))) == {"no_label"}


def test_counts_are_among_the_figures():
    assert examined(rows_with({"a": 20, "b": 30})).figures["rows_by_label"] == {"b": 30, "a": 20}


def test_free_text_taken_for_labels_is_bounded(monkeypatch):
    monkeypatch.setattr(labels, "MOST_LABELS", 50)
    report = examined([{**row, "label": row["text"]} for row in clean_rows(200)])
    assert "too_many_labels" in codes(report)
    assert found(report, "rare_label").count == 50
