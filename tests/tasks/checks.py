"""What holds of every task: logits of a model to a loss, and what a model says to scores."""

from itertools import pairwise

import numpy as np
import torch

import lightsft
from lightsft import Backbone
from lightsft.tasks.base import errors_of
from lightsft.training.evaluate import outcomes_of


def made_again(task):
    """Whether its description makes the same task, through JSON as adapter folders keep it."""
    import json

    return lightsft.task(**json.loads(json.dumps(task.describe()))) == task


def codes(task, row, tokenizer=None):
    """{code: severity} of everything that is wrong with a row."""
    found = list(task.problems(row))
    if tokenizer is not None and not errors_of(iter(found)):
        found += task.token_problems(row, tokenizer)
    return {problem.code: problem.severity for problem in found}


def whole_and_parts(task, outputs, labels, sizes):
    """(loss of a batch, sum of the losses of its micro-batches), divided by the items of all."""
    starts = np.cumsum([0, *sizes])
    pieces = [slice(a, b) for a, b in pairwise(starts)]
    items = sum(task.items(labels[piece]) for piece in pieces)
    parts = [task.loss(outputs(piece), labels[piece], items) for piece in pieces]
    return task.loss(outputs(slice(None)), labels), sum(parts)


def outcomes_whatever_the_company(task, model, tokenizer, rows):
    """Outcomes of the rows in one batch; AssertionError if the order or the size of batches changes them."""
    backbone = Backbone(model.eval(), tokenizer=tokenizer)
    together = outcomes_of(backbone, task, rows, batch_size=len(rows) * 4)
    for size in (1, 3):
        assert np.allclose(outcomes_of(backbone, task, rows, size), together, atol=1e-5)
    turned = outcomes_of(backbone, task, rows[::-1], 2)[::-1]
    assert np.allclose(turned, together, atol=1e-5)
    return together


def gradient_is_finite(task, logits, labels, outputs):
    """The gradient of the loss by the logits, all of whose values are numbers."""
    logits = logits.clone().requires_grad_()
    task.loss(outputs(logits), labels).backward()
    assert torch.isfinite(logits.grad).all()
    return logits.grad
