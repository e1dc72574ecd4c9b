"""Regression: squared errors, and correlations of what the model says."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from scipy import stats

import lightsft
from lightsft.errors import ConfigurationError
from lightsft.tasks.regression import Regression, number_of, whole_number
from tests.checkpoints import labelled_rows, wordpiece_tokenizer
from tests.tasks.checks import codes, gradient_is_finite, made_again, outcomes_whatever_the_company, whole_and_parts

TASK = lightsft.task("regression")


@pytest.mark.parametrize(
    ("cell", "number", "whole"),
    [
        (1, 1.0, 1), (1.0, 1.0, 1), ("1.5", 1.5, None), (" 2 ", 2.0, 2), ("1e2", 100.0, 100), (True, None, None),
        ("nan", None, None), (float("inf"), None, None), (None, None, None), ("three", None, None), ([1], None, None),
    ],
)  # fmt: skip
def test_what_is_a_number(cell, number, whole):
    assert number_of(cell) == number
    assert whole_number(cell) == whole
    found = {} if number is not None else {"no_number": "error"}
    assert codes(TASK, {"text": "good", "score": cell}) == found


def test_an_empty_text_is_refused():
    assert codes(TASK, {"text": " ", "score": 1}) == {"empty_cell": "error"}


def test_columns_are_found():
    rows = [{"sentence1": f"a {n}", "sentence2": f"b {n}", "similarity": n / 7} for n in range(9)]
    task = Regression.for_rows(rows, "file")
    assert (task.text, task.text_pair, task.label) == ("sentence1", "sentence2", "similarity")
    assert made_again(task)
    assert task.describe()["labels"] == ["value"]  # the head has one output wherever it is loaded again
    with pytest.raises(ConfigurationError, match="one name"):
        lightsft.task("regression", labels=["a", "b"])


def test_the_loss_is_the_mean_squared_error_of_transformers():
    logits, labels = torch.randn(6, 1), torch.randn(6)
    outputs = lambda piece: SimpleNamespace(logits=logits[piece])  # noqa: E731
    by_hand = ((logits[:, 0].double() - labels.double()) ** 2).mean()
    assert TASK.loss(outputs(slice(None)), labels).item() == pytest.approx(by_hand.item())
    torch.testing.assert_close(*whole_and_parts(TASK, outputs, labels, [1, 2, 3]))
    gradient_is_finite(TASK, logits, labels, lambda x: SimpleNamespace(logits=x))


def test_scores_are_scipy_s_on_what_the_model_says():
    tokenizer = wordpiece_tokenizer()
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        num_labels=1, problem_type="regression", initializer_range=0.5,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    rows = [{"text": row["text"], "score": number} for number, row in enumerate(labelled_rows(9))]
    outcomes = outcomes_whatever_the_company(TASK, model, tokenizer, rows)
    said = [model(**tokenizer(row["text"], return_tensors="pt")).logits.item() for row in rows]
    found, truth = TASK.metrics(outcomes), np.arange(9)
    assert found["pearson"] == pytest.approx(stats.pearsonr(said, truth)[0], abs=1e-5)
    assert found["spearman"] == pytest.approx(stats.spearmanr(said, truth)[0])
    assert found["loss"] == pytest.approx(found["rmse"] ** 2) == pytest.approx(((said - truth) ** 2).mean())
    batch = TASK.collate(TASK.encode(rows, tokenizer), tokenizer)
    torch.testing.assert_close(TASK.loss(model(**{**batch, "labels": None}), batch["labels"]), model(**batch).loss)
    assert TASK.baseline(rows, rows)["rmse"] == pytest.approx(truth.std())
    assert set(TASK.metric_names) <= set(found)
