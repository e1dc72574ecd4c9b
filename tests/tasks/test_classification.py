"""Classification: rows that are checked, features that are cut and padded, a loss that is torch's."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import lightsft
from lightsft.errors import ConfigurationError, DataError
from lightsft.tasks.labelled import labels_of
from tests.checkpoints import LABELS, labelled_rows, wordpiece_tokenizer

TASK = lightsft.task("classification", labels=LABELS)


@pytest.fixture
def tokenizer():
    """The tokenizer of the tiny BERT."""
    return wordpiece_tokenizer()


# ---- rows


@pytest.mark.parametrize("value", ["", "  ", None])
@pytest.mark.parametrize("column", ["text", "label"])
def test_a_row_without_a_text_or_a_label_is_refused_by_its_number(column, value):
    rows = [*labelled_rows(3), {"text": "good", "label": "pos", column: value}]
    with pytest.raises(DataError, match=f"file: row 4 has an empty '{column}'"):
        TASK.check(rows, "file")


def test_a_row_that_lacks_a_column_is_refused_by_its_number():
    with pytest.raises(DataError, match="file: row 2 has an empty 'label'"):
        TASK.check([{"text": "good", "label": "pos"}, {"text": "bad"}], "file")


def test_an_unknown_label_is_refused_by_its_row():
    rows = [*labelled_rows(5), {"text": "so so", "label": "meh"}]
    with pytest.raises(DataError, match="file: row 6 has the label 'meh'") as caught:
        TASK.check(rows, "file")
    assert caught.value.expected == "one of 'neg', 'pos'"


def test_a_pair_wants_both_columns():
    pair = lightsft.task("classification", labels=LABELS, text="premise", text_pair="hypothesis")
    with pytest.raises(DataError, match="no column 'hypothesis'"):
        pair.check([{"premise": "good", "label": "pos"}], "file")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["b", "a", "b"], ("a", "b")),
        ([10, 9, 2, 10], ("2", "9", "10")),
        (["10", "9", "2"], ("2", "9", "10")),
        ([True, False], ("False", "True")),
        ([1.0, 0.0, None], ("0.0", "1.0")),
        (["1", "x", "0"], ("0", "1", "x")),
    ],
)
def test_labels_are_sorted_and_numbers_by_value(values, expected):
    rows = [{"label": value} for value in values] * 2
    assert labels_of(rows, "label", "file") == expected


def test_a_column_of_different_texts_is_no_label():
    with pytest.raises(DataError, match="holds 40 different values in 40 rows"):
        labels_of([{"label": str(number)} for number in range(40)], "label", "file")


@pytest.mark.parametrize("labels", [["a"], ["a", "a"], []])
def test_fewer_than_two_labels_are_refused(labels):
    with pytest.raises(DataError, match="at least two different labels"):
        lightsft.task("classification", labels=labels)


def test_numeric_labels_are_the_same_as_their_text(tokenizer):
    task = lightsft.task("classification", labels=[0, 1])
    rows = [{"text": "good", "label": 1}, {"text": "bad", "label": "0"}]
    task.check(rows, "file")
    assert [feature["labels"] for feature in task.encode(rows, tokenizer)] == [1, 0]


def test_a_task_is_made_again_from_its_description():
    pair = lightsft.task("classification", labels=LABELS, text="a", text_pair="b", label="c", max_length=7)
    assert lightsft.task(**pair.describe()) == pair


def test_an_unknown_task_is_refused():
    with pytest.raises(ConfigurationError, match="one of classification, multi-label"):
        lightsft.task("poetry")


def test_the_key_of_a_pair_is_both_texts():
    pair = lightsft.task("classification", labels=LABELS, text_pair="other")
    row = {"text": "a", "other": "b", "label": "pos"}
    assert pair.key(row) != pair.key(row | {"other": "c"})
    assert pair.key(row) == pair.key(row | {"label": "neg"})


# ---- features


def test_texts_are_encoded_as_the_tokenizer_does_alone(tokenizer):
    rows = labelled_rows(10)
    for row, feature in zip(rows, TASK.encode(rows, tokenizer), strict=True):
        assert feature["input_ids"] == tokenizer(row["text"])["input_ids"]
        assert LABELS[feature["labels"]] == row["label"]


@pytest.mark.parametrize(("max_length", "expected"), [(6, 6), (1000, 64)])
def test_a_long_text_is_cut_to_the_length_and_to_the_tokenizer_s_limit(tokenizer, max_length, expected):
    task = lightsft.task("classification", labels=LABELS, max_length=max_length)
    (feature,) = task.encode([{"text": "good " * 100, "label": "pos"}], tokenizer)
    assert len(feature["input_ids"]) == len(feature["attention_mask"]) == expected


def test_a_pair_is_one_input_with_two_types(tokenizer):
    task = lightsft.task("classification", labels=LABELS, text_pair="other")
    (feature,) = task.encode([{"text": "good film", "other": "bad day", "label": "pos"}], tokenizer)
    assert feature["input_ids"] == tokenizer("good film", "bad day")["input_ids"]
    assert set(feature["token_type_ids"]) == {0, 1}


def test_rows_to_predict_need_no_label(tokenizer):
    (feature,) = TASK.encode([{"text": "good"}], tokenizer)
    assert feature["labels"] == -1


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_padded_on_the_tokenizer_s_side(tokenizer, side, monkeypatch):
    monkeypatch.setattr(tokenizer, "padding_side", side)
    rows = [{"text": "good", "label": "pos"}, {"text": "the film was really bad", "label": "neg"}]
    batch = TASK.collate(TASK.encode(rows, tokenizer), tokenizer)
    expected = tokenizer([row["text"] for row in rows], padding=True, pad_to_multiple_of=8, return_tensors="pt")
    assert batch.keys() == {*expected, "labels"}
    for name, tensor in expected.items():
        assert torch.equal(batch[name], tensor), name
    assert batch["labels"].tolist() == [1, 0]


# ---- loss and outcomes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_torch_s_cross_entropy_in_float32(dtype):
    logits, labels = torch.randn(9, 2).to(dtype), torch.arange(9) % 2
    loss = TASK.loss(SimpleNamespace(logits=logits), labels)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, cross_entropy(logits.float(), labels, reduction="sum") / 9)
    torch.testing.assert_close(loss, cross_entropy(logits.float(), labels))


def test_micro_batches_add_up_to_the_big_batch():
    logits, labels = torch.randn(12, 2), torch.arange(12) % 2
    parts = [
        TASK.loss(SimpleNamespace(logits=logits[i : i + 4]), labels[i : i + 4], num_items_in_batch=12)
        for i in (0, 4, 8)
    ]
    torch.testing.assert_close(sum(parts), cross_entropy(logits, labels))


def test_outcomes_hold_probabilities_and_the_truth():
    logits, labels = torch.randn(5, 2), torch.tensor([0, 1, 1, 0, 1])
    outcomes = TASK.outcomes(SimpleNamespace(logits=logits), labels)
    torch.testing.assert_close(outcomes[:, :2], logits.softmax(-1))
    assert outcomes[:, 2].tolist() == labels.tolist()
    metrics = TASK.metrics(outcomes.numpy())
    assert metrics["accuracy"] == pytest.approx((logits.argmax(-1) == labels).float().mean().item())
    assert metrics["loss"] == pytest.approx(cross_entropy(logits, labels).item(), rel=1e-5)


def test_the_majority_baseline_answers_the_most_frequent_training_label():
    train = [{"text": "x", "label": label} for label in ["neg"] * 3 + ["pos"]]
    test = [{"text": "x", "label": label} for label in ["pos", "pos", "neg"]]
    scores = TASK.baseline(train, test)
    assert scores["accuracy"] == pytest.approx(1 / 3)
    assert scores["confusion_matrix"] == [[1, 0], [2, 0]]
    assert scores["loss"] == pytest.approx(-(2 * np.log(0.25) + np.log(0.75)) / 3)


def test_every_metric_that_may_decide_is_there():
    found = TASK.metrics(np.array([[0.9, 0.1, 0], [0.2, 0.8, 1]]))
    assert set(TASK.metric_names) <= set(found)
    assert TASK.metric in TASK.metric_names
    assert TASK.greater_is_better("accuracy")
    assert not TASK.greater_is_better("loss")
