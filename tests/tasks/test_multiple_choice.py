"""Multiple choice: every form of choices and labels, and a loss over the choices that are there."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

import lightsft
from lightsft.errors import DataError
from lightsft.tasks.multiple_choice import MultipleChoice
from tests.tasks.checks import codes, gradient_is_finite, made_again, outcomes_whatever_the_company, whole_and_parts
from tests.tasks.kinds_of_tokenizers import tokenizer_of

TASK = lightsft.task("multiple-choice", max_length=32)
ROWS = [
    {"question": "who met Bob ?", "choices": ["Ana", "New York", "pancakes"], "label": 0},
    {"question": "where ?", "choices": ["Ana", "in New York"], "label": 1},
    {"question": "what is unbelievable ?", "choices": ["Bob", "euros", "the größe of a Würstchen", "a"], "label": 2},
]


# ---- choices and labels


@pytest.mark.parametrize(
    ("row", "options", "index"),
    [
        ({"choices": ["a", "b"], "label": 1}, {}, 1),
        ({"choices": ["a", "b"], "label": 1.0}, {}, 1),
        ({"choices": ["a", "b"], "label": "1"}, {"counts_from": 1}, 0),
        ({"choices": ["a", "b"], "label": "b"}, {}, 1),
        ({"choices": ["x", "y"], "label": "b"}, {}, 1),
        ({"choices": ["x", "y"], "label": "C"}, {}, -1),
        ({"choices": ["x", "y"], "label": 2}, {}, -1),
        ({"choices": ["x", "y"], "label": None}, {}, -1),
        ({"choices": ["3", "4"], "label": "4"}, {}, 1),
        ({"choices": ["2", "1"], "label": "1"}, {"counts_from": None}, 1),
        ({"choices": {"text": ["a", "b"], "label": ["A", "B"]}, "label": "B"}, {}, 1),
        ({"choices": {"text": ["a", "b"], "label": ["1", "2"]}, "label": "2"}, {}, 1),
        ({"c": "x", "d": "y", "label": "1"}, {"choices": ["c", "d"]}, 1),
        ({"c": "x", "d": None, "label": "1"}, {"choices": ["c", "d"]}, -1),
    ],
)
def test_the_right_choice_is_found_in_every_form(row, options, index):
    assert lightsft.task("multiple-choice", **options).index({"question": "q", **row}) == index


@pytest.mark.parametrize(
    ("labels", "choices", "counts_from"),
    [
        ([0, 1, 1], ["x", "y"], 0),
        ([1, 2, 2], ["x", "y"], 1),
        (["1", "2", None], ["x", "y"], 1),
        ([1.0, 2.0, None], ["x", "y"], 1),
        (["A", "B", "B"], ["x", "y"], 0),
        (["2", "4", "2"], ["2", "4"], None),
    ],
)
def test_where_numbers_count_from_is_found(labels, choices, counts_from):
    rows = [{"question": f"which {n}?", "choices": choices, "answer": label} for n, label in enumerate(labels)]
    task = MultipleChoice.for_rows(rows, "file")
    assert (task.label, task.counts_from) == ("answer", counts_from)
    assert made_again(task)
    assert MultipleChoice.for_rows(rows, "file", counts_from=0).counts_from == 0


@pytest.mark.parametrize(
    "names", [("choice0", "choice1"), ("ending0", "ending1"), ("option_1", "option_2"), ("A", "B"), ("sol1", "sol2")]
)
def test_a_column_per_choice_is_found_by_its_name(names):
    rows = [{"goal": f"why {n}", **dict.fromkeys(names, f"since {n}"), "label": n % 2} for n in range(4)]
    task = MultipleChoice.for_rows(rows, "file")
    assert (task.question, task.choices) == ("goal", names)
    assert made_again(task)


def test_rows_without_choices_are_refused():
    with pytest.raises(DataError, match="no column of choices"):
        MultipleChoice.for_rows([{"question": "who?", "label": 0}] * 2, "file")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, {}),
        ({"question": ""}, {"empty_cell": "error"}),
        ({"choices": ["Ana"]}, {"too_few_choices": "error"}),
        ({"choices": None}, {"too_few_choices": "error"}),
        ({"choices": "Ana"}, {"too_few_choices": "error"}),
        ({"label": None}, {"empty_cell": "error"}),
        ({"label": 3}, {"unknown_label": "error"}),
        ({"label": "Zoe"}, {"unknown_label": "error"}),
    ],
)
def test_what_is_wrong_with_a_row_has_a_name(change, found):
    assert codes(TASK, {**ROWS[0], **change}) == found


# ---- loss and outcomes


@pytest.fixture
def model():
    """A tiny BERT with a number per choice."""
    config = transformers.BertConfig(
        vocab_size=len(tokenizer_of("unigram")), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    return transformers.BertForMultipleChoice(config).eval()


def test_the_loss_is_transformers_own_where_all_have_as_many_choices(model):
    rows = [{**row, "choices": row["choices"][:2], "label": 1} for row in ROWS]
    batch = TASK.collate(TASK.encode(rows, tokenizer_of("unigram")), tokenizer_of("unigram"))
    labels = batch.pop("labels")
    assert batch["input_ids"].shape[:2] == (3, 2)
    outputs = model(**batch, labels=labels[:, 0])
    torch.testing.assert_close(TASK.loss(outputs, labels), outputs.loss)


def test_the_loss_is_over_the_choices_that_are_there():
    logits, labels = torch.randn(3, 4), torch.tensor([[0, 3], [1, 2], [2, 4]])
    outputs = lambda piece: SimpleNamespace(logits=logits[piece])  # noqa: E731
    by_hand = [cross_entropy(logits[n, :there].double(), right) for n, (right, there) in enumerate(labels)]
    assert TASK.loss(outputs(slice(None)), labels).item() == pytest.approx(sum(by_hand).item() / 3)
    torch.testing.assert_close(*whole_and_parts(TASK, outputs, labels, [1, 2]))
    gradient = gradient_is_finite(TASK, logits, labels, lambda x: SimpleNamespace(logits=x))
    assert (gradient[1, 2:] == 0).all()


def test_accuracy_is_that_of_each_question_alone(model):
    tokenizer = tokenizer_of("unigram")
    outcomes = outcomes_whatever_the_company(TASK, model, tokenizer, ROWS)
    right = []
    for row in ROWS:
        pairs = tokenizer([row["question"]] * len(row["choices"]), row["choices"], padding=True, return_tensors="pt")
        scores = model(**{name: value[None] for name, value in pairs.items()}).logits[0]
        right.append(scores.argmax().item() == row["label"])
    assert TASK.metrics(outcomes)["accuracy"] == pytest.approx(np.mean(right))
    assert set(TASK.metric_names) <= set(TASK.metrics(outcomes))
    assert TASK.baseline(ROWS, ROWS)["accuracy"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 4) / 3)
