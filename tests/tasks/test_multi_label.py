"""Multi-label classification: any number of labels, binary cross-entropy with positive weights, a threshold."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from sklearn import metrics as reference

import lightsft
from lightsft.errors import ConfigurationError, DataError
from lightsft.tasks.multi_label import MultiLabel, split_labels
from tests.checkpoints import labelled_rows, wordpiece_tokenizer
from tests.tasks.checks import codes, gradient_is_finite, made_again, outcomes_whatever_the_company, whole_and_parts

LABELS = ("a", "b", "c")
TASK = lightsft.task("multi-label", labels=LABELS)
ROWS = [
    {"text": row["text"], "labels": labels}
    for row, labels in zip(labelled_rows(6), (["a"], ["a", "b"], [], ["b"], ["c", "a"], ["c"]), strict=True)
]


@pytest.mark.parametrize(
    ("cell", "labels"),
    [
        (["a", "b"], ("a", "b")), (("b",), ("b",)), ("a, b", ("a", "b")), ("a", ("a",)), ("", ()), (None, ()),
        ([], ()), (["a", "a", ""], ("a",)), ([1, 2.0], ("1", "2.0")), (3, ("3",)),
    ],
)  # fmt: skip
def test_labels_are_lists_or_divided_texts(cell, labels):
    assert split_labels(cell, ",") == labels


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, {}),
        ({"labels": None}, {}),
        ({"text": ""}, {"empty_cell": "error"}),
        ({"labels": ["a", "x"]}, {"unknown_label": "error"}),
        ({"labels": "a;b"}, {"unknown_label": "error"}),
    ],
)
def test_what_is_wrong_with_a_row_has_a_name(change, found):
    assert codes(TASK, {**ROWS[0], **change}) == found


def test_columns_and_labels_are_found_in_lists_and_in_texts():
    for labels in (["a", "b"], "a,b"):
        rows = [{"review": f"good film {n}", "genres": labels if n else None} for n in range(4)]
        task = MultiLabel.for_rows(rows, "file", positive_weights="balanced")
        assert (task.text, task.label, task.labels) == ("review", "genres", ("a", "b"))
        assert task.positive_weights == (1 / 3, 1 / 3)
        assert made_again(task)


def test_options_that_make_no_sense_are_refused():
    for threshold in (0, 1, -0.1):
        with pytest.raises(ConfigurationError, match="threshold"):
            lightsft.task("multi-label", labels=LABELS, threshold=threshold)
    with pytest.raises(ConfigurationError, match="3 positive numbers"):
        lightsft.task("multi-label", labels=LABELS, positive_weights=[1, 2])
    with pytest.raises(DataError, match="at least two different labels"):
        lightsft.task("multi-label", labels=["a"])


@pytest.mark.parametrize("weights", [None, (1.0, 2.0, 0.5)])
def test_the_loss_is_the_formula(weights):
    task = lightsft.task("multi-label", labels=LABELS, positive_weights=weights)
    logits, labels = torch.randn(5, 3), (torch.rand(5, 3) > 0.5).float()
    outputs = lambda piece: SimpleNamespace(logits=logits[piece])  # noqa: E731
    p, y, w = logits.double().sigmoid(), labels.double(), torch.tensor(weights or (1.0,) * 3).double()
    by_hand = -(w * y * p.log() + (1 - y) * (1 - p).log()).mean()
    assert task.loss(outputs(slice(None)), labels).item() == pytest.approx(by_hand.item(), rel=1e-5)
    torch.testing.assert_close(*whole_and_parts(task, outputs, labels, [1, 3, 1]))
    gradient_is_finite(task, 1e3 * logits, labels, lambda x: SimpleNamespace(logits=x))


@pytest.mark.parametrize("threshold", [0.5, 0.3])
def test_scores_are_scikit_learn_s_on_what_the_model_says(threshold):
    tokenizer = wordpiece_tokenizer()
    task = lightsft.task("multi-label", labels=LABELS, threshold=threshold)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        num_labels=3, problem_type="multi_label_classification", initializer_range=0.5,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    outcomes = outcomes_whatever_the_company(task, model, tokenizer, ROWS)
    with torch.no_grad():
        said = [model(**tokenizer(row["text"], return_tensors="pt")).logits[0].sigmoid().numpy() for row in ROWS]
    truth = np.array([[label in row["labels"] for label in LABELS] for row in ROWS])
    predicted, found = np.array(said) >= threshold, task.metrics(outcomes)
    for average in ("micro", "macro", "samples"):
        assert found[f"{average}_f1"] == pytest.approx(
            reference.f1_score(truth, predicted, average=average, zero_division=0)
        )
    assert found["loss"] == pytest.approx(reference.log_loss(truth.ravel(), np.array(said).ravel()), rel=1e-4)
    batch = task.collate(task.encode(ROWS, tokenizer), tokenizer)
    own = task.loss(model(**{**batch, "labels": None}), batch["labels"])
    torch.testing.assert_close(own, model(**batch).loss)
    assert own.item() == pytest.approx(found["loss"], rel=1e-4)
    assert set(task.metric_names) <= set(found)


def test_the_constant_answer_is_each_label_s_share():
    assert TASK.baseline(ROWS, ROWS)["per_class"]["a"]["examples"] == 3
    shares = np.array([3, 2, 2]) / 6
    truth = np.array([[label in row["labels"] for label in LABELS] for row in ROWS])
    by_hand = -np.where(truth, np.log(shares), np.log(1 - shares)).mean()
    assert TASK.baseline(ROWS, ROWS)["loss"] == pytest.approx(by_hand)
