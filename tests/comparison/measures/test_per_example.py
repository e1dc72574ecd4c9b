"""The explorer's examples: scores row by row, the mean over seeds, and the order of disagreement."""

import json

import numpy as np
import pytest

import lightsft
from lightsft.comparison.measures.per_example import examples, metric_of_rows
from tests.checkpoints import LABELS, labelled_rows

TASK = lightsft.task("classification", labels=LABELS)
ROWS = labelled_rows(6)  # neg, pos, neg, ...


def outcomes(*probabilities):
    """Rows whose label pos has this probability."""
    return np.array([[1 - p, p, n % 2] for n, p in enumerate(probabilities)])


SAID = {
    "lora": [outcomes(0.1, 0.9, 0.1, 0.9, 0.9, 0.1), outcomes(0.1, 0.9, 0.9, 0.9, 0.9, 0.1)],
    "full": [outcomes(0.1, 0.9, 0.1, 0.1, 0.9, 0.9), outcomes(0.1, 0.9, 0.1, 0.1, 0.9, 0.9)],
}


def test_scores_are_means_over_seeds_and_the_most_disagreed_come_first():
    found = examples(TASK, ROWS, SAID, "accuracy")
    assert found["columns"] == ["lora", "full"]
    assert (found["metric"], found["greater_is_better"]) == ("accuracy", True)
    assert [one["row"] for one in found["rows"]] == [3, 5, 2, 0, 1, 4]
    by_row = {one["row"]: one for one in found["rows"]}
    assert by_row[2]["scores"] == {"lora": 0.5, "full": 1.0}
    assert by_row[2]["disagreement"] == np.std([0.5, 1.0])
    assert by_row[2]["answers"] == {"lora": "neg", "full": "neg"}  # of the first seed
    assert by_row[5]["answers"] == {"lora": "neg", "full": "pos"}
    assert by_row[5]["target"] == "pos"
    assert by_row[5]["text"] == ROWS[5]["text"]
    json.dumps(found, allow_nan=False)


def test_there_are_at_most_so_many_and_long_texts_are_cut():
    rows = [{**row, "text": "long " * 200} for row in ROWS]
    found = examples(TASK, rows, SAID, "accuracy", most=2)
    assert [one["row"] for one in found["rows"]] == [3, 5]
    assert all(len(one["text"]) == 400 and one["text"].endswith("…") for one in found["rows"])


def test_all_rows_at_once_are_what_each_row_alone_is():
    chance = np.random.default_rng(0)
    many = np.column_stack([chance.dirichlet([1, 1], 50), chance.integers(0, 2, 50)])
    for metric in ("accuracy", "loss", "macro_f1", "brier"):
        alone = [TASK.score(many[n : n + 1], metric) for n in range(50)]
        assert TASK.scores_of_each(many, metric) == pytest.approx(alone)


@pytest.mark.parametrize(
    ("name", "options", "rows", "metric", "instead"),
    [
        ("classification", {"labels": LABELS}, SAID["lora"][0], "accuracy", "accuracy"),
        ("classification", {"labels": LABELS}, SAID["lora"][0], "macro_f1", "macro_f1"),
        ("classification", {"labels": LABELS}, SAID["lora"][0], "auroc", "loss"),
        ("classification", {"labels": LABELS}, SAID["lora"][0], "mcc", "loss"),  # 0 for every single row
        ("classification", {"labels": LABELS}, outcomes(0.1, 0.9, 0.2), "accuracy", "accuracy"),  # all are right
        ("regression", {}, np.array([[0.1, 0.3], [0.5, 0.4]]), "pearson", "loss"),
        ("regression", {}, np.array([[0.1, 0.3], [0.5, 0.4]]), "mae", "mae"),
        ("multi-label", {"labels": LABELS}, np.array([[0.9, 0.1, 1, 1], [0.9, 0.8, 1, 1]]), "micro_f1", "micro_f1"),
        ("chat", {}, np.array([[3.0, 1, 4], [9.0, 0, 4]]), "loss", "loss"),
    ],
)
def test_a_metric_that_says_nothing_of_a_row_makes_way(name, options, rows, metric, instead):
    assert metric_of_rows(lightsft.task(name, **options), [rows], metric) == instead


def test_answers_are_there_where_outcomes_hold_them():
    several = lightsft.task("multi-label", labels=LABELS)
    assert several.answers_in(np.array([[0.9, 0.5, 1, 1], [0.1, 0.2, 0, 0]])) == ["neg, pos", ""]
    assert lightsft.task("regression").answers_in(np.array([[0.123456, 1.0]])) == ["0.1235"]
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    said = {"lora": [np.array([[3.0, 1, 4], [9.0, 0, 4]])]}
    found = examples(lightsft.task("chat"), rows, said, "loss")
    assert found["greater_is_better"] is False
    assert all(one["answers"] == {} for one in found["rows"])
    assert found["rows"][0]["scores"] == {"lora": pytest.approx(0.75)}
