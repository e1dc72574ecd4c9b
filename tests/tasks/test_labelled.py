"""One label per example: weights, focal loss and smoothing by their formulas, and scores of what a model says."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from sklearn import metrics as reference
from torch.nn.functional import cross_entropy

import lightsft
from lightsft.errors import ConfigurationError, DataError
from lightsft.tasks.classification import Classification
from tests.checkpoints import FILLER, wordpiece_tokenizer
from tests.tasks.checks import codes, gradient_is_finite, made_again, outcomes_whatever_the_company, whole_and_parts

LABELS = ("a", "b", "c")
WEIGHTS = (0.5, 2.0, 1.5)
CASES = {
    "plain": {},
    "weights": {"class_weights": WEIGHTS},
    "smoothing": {"label_smoothing": 0.2},
    "weights and smoothing": {"class_weights": WEIGHTS, "label_smoothing": 0.2},
    "focal": {"focal_gamma": 2.0},
    "focal below one": {"focal_gamma": 0.5},
    "focal and weights": {"focal_gamma": 2.0, "class_weights": WEIGHTS},
}
ROWS = [{"text": " ".join(FILLER[n : n + 3 + n % 4]), "label": LABELS[n % 3]} for n in range(9)]


def made(options):
    return lightsft.task("classification", labels=LABELS, **options)


def expected(logits, labels, options):
    """The formula in fp64."""
    likelihood, weights = logits.double().log_softmax(-1), options.get("class_weights") or (1.0, 1.0, 1.0)
    gamma, total, items = options.get("focal_gamma", 0), 0.0, 0.0
    for row, label in zip(likelihood, labels.tolist(), strict=True):
        share = options.get("label_smoothing", 0)
        smooth = -sum(weights[k] * row[k] for k in range(3)) * share / 3
        total += weights[label] * -((1 - row[label].exp()) ** gamma) * row[label] * (1 - share) + smooth
        items += weights[label]
    return (total / items).item()


@pytest.mark.parametrize("options", CASES.values(), ids=list(CASES))
def test_the_loss_is_the_formula_in_any_micro_batches(options):
    task, logits, labels = made(options), torch.randn(7, 3), torch.tensor([0, 0, 1, 2, 2, 2, 1])
    outputs = lambda piece: SimpleNamespace(logits=logits[piece])  # noqa: E731
    assert task.loss(outputs(slice(None)), labels).item() == pytest.approx(expected(logits, labels, options), rel=1e-5)
    torch.testing.assert_close(*whole_and_parts(task, outputs, labels, [2, 1, 4]))  # the first has a single class
    if "focal_gamma" not in options:
        weight = torch.tensor(options["class_weights"]) if "class_weights" in options else None
        torch_s = cross_entropy(logits, labels, weight, label_smoothing=options.get("label_smoothing", 0.0))
        torch.testing.assert_close(task.loss(outputs(slice(None)), labels), torch_s)


@pytest.mark.parametrize("options", CASES.values(), ids=list(CASES))
@pytest.mark.parametrize("scale", [1.0, 200.0])
def test_the_gradient_is_finite_where_the_model_is_certain(options, scale):
    logits = scale * torch.eye(3)
    gradient_is_finite(made(options), logits, torch.tensor([0, 1, 0]), lambda x: SimpleNamespace(logits=x))


def test_without_gamma_the_focal_loss_is_cross_entropy():
    logits, labels = SimpleNamespace(logits=torch.randn(7, 3)), torch.arange(7) % 3
    torch.testing.assert_close(made({"focal_gamma": 1e-9}).loss(logits, labels), made({}).loss(logits, labels))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"class_weights": [1, 2]}, "3 positive numbers"),
        ({"class_weights": [1, 2, 0]}, "3 positive numbers"),
        ({"class_weights": "balanced"}, "without rows to count"),
        ({"focal_gamma": -1}, "focal_gamma"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"label_smoothing": 0.1, "focal_gamma": 1}, "not both"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, said):
    with pytest.raises(ConfigurationError, match=said):
        made(options)


# ---- rows


@pytest.mark.parametrize(
    "values", [["a", "b", "b", "b"], [0, 1, 1, 1], [0.0, 1.0, 1.0, 1.0], [False, True, True, True]]
)
def test_balanced_weights_count_every_class_the_same(values):
    rows = [{"text": f"film {n}", "label": value} for n, value in enumerate([*values, None])]
    task = Classification.for_rows(rows, "file", class_weights="balanced")
    assert task.labels == tuple(map(str, dict.fromkeys(values)))
    assert task.class_weights == (2.0, pytest.approx(2 / 3))
    assert made_again(task)
    assert [feature["labels"] for feature in task.encode(rows, wordpiece_tokenizer())] == [0, 1, 1, 1, -1]


def test_a_class_without_rows_has_no_balanced_weight():
    rows = [{"text": "film", "label": "a"}, {"text": "day", "label": "b"}]
    with pytest.raises(DataError, match="no row has the label 'c'"):
        Classification.for_rows(rows, "file", labels=["a", "b", "c"], class_weights="balanced")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, {}),
        ({"text": None}, {"empty_cell": "error"}),
        ({"label": " "}, {"empty_cell": "error"}),
        ({"label": "x"}, {"unknown_label": "error"}),
        ({"label": ["a", "b"]}, {"several_labels": "error"}),
    ],
)
def test_what_is_wrong_with_a_row_has_a_name(change, found):
    assert codes(made({}), {**ROWS[0], **change}) == found


# ---- scores


@pytest.mark.parametrize("options", CASES.values(), ids=list(CASES))
def test_scores_are_scikit_learn_s_on_what_the_model_says(options):
    tokenizer = wordpiece_tokenizer()
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        num_labels=3, initializer_range=0.5,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    outcomes = outcomes_whatever_the_company(made(options), model, tokenizer, ROWS)
    with torch.no_grad():
        said = [
            model(**tokenizer(row["text"], return_tensors="pt")).logits[0].double().softmax(-1).numpy() for row in ROWS
        ]
    truth, predicted = np.arange(9) % 3, np.argmax(said, axis=1)
    found = made(options).metrics(outcomes)
    assert found["accuracy"] == pytest.approx(reference.accuracy_score(truth, predicted))
    assert found["macro_f1"] == pytest.approx(reference.f1_score(truth, predicted, average="macro", zero_division=0))
    assert found["loss"] == pytest.approx(reference.log_loss(truth, np.array(said)), rel=1e-4)
