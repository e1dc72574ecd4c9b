"""How far the probabilities of a classifier can be taken at their word, and what one number makes of them.

    ECE = sum_m |B_m| / n |accuracy(B_m) - confidence(B_m)| over 15 bins of equal width (1706.04599, section 2)
    p'  = p^(1/T) / sum p^(1/T) = softmax(logits / T), T > 0 with the least loss on the validation rows (section 4.2)

T above 1: the model is too sure of itself. The label that is predicted stays the same whatever T is.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lightsft.metrics.classification import LEAST_PROBABILITY, calibration_error, log_loss, reliability
from lightsft.tasks.base import Array, Task

COLDEST, HOTTEST = 0.01, 100.0


def calibration(task: Task, validation: Array, test: Array) -> dict[str, Any] | None:
    """ECE and reliability of the test outcomes, the temperature that validation outcomes suggest, ECE with it.

    None for tasks whose outcomes hold no probabilities of classes, and for probabilities that are no numbers.
    """
    fitted_on, judged = task.class_probabilities(validation), task.class_probabilities(test)
    if fitted_on is None or judged is None or np.isnan(validation).any() or np.isnan(test).any():
        return None
    value = temperature(*fitted_on)
    probabilities, truth = judged
    return {
        "ece": calibration_error(probabilities, truth),
        "temperature": value,
        "ece_after_temperature": calibration_error(tempered(probabilities, value), truth),
        "bins": [
            {"low": low, "high": high, "confidence": confidence, "accuracy": accuracy, "count": int(count)}
            for low, high, count, confidence, accuracy in reliability(probabilities, truth).tolist()
            if count
        ],
    }


def temperature(probabilities: Array, truth: Array) -> float:
    """T between COLDEST and HOTTEST with the least log loss; it is convex in 1 / T, so there is one minimum."""
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(
        lambda logarithm: log_loss(tempered(probabilities, math.exp(logarithm)), truth),
        bounds=(math.log(COLDEST), math.log(HOTTEST)),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(math.exp(found.x))


def tempered(probabilities: Array, value: float) -> Array:
    """p^(1/T) / sum p^(1/T), rows summing to 1."""
    logits = np.log(np.clip(probabilities.astype(float), LEAST_PROBABILITY, None)) / value
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))
