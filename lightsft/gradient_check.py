"""Whether quantized layers pass the right gradient to their inputs: formats made for inference alone do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lightsft.errors import first_line
from lightsft.quantization import accepted_zeros, describe_layer, in_mode, quantized_layers

PROBED_ROWS, SIMILAR = 16, 0.9  # directions in which a layer's gradient is compared with its output, cosine


def without_gradient(model: nn.Module) -> dict[str, str]:
    """Of each kind of quantized layer whose input gets no gradient, or a wrong one: its first layer, and what happens.

    Right means that the gradient predicts how the output changes between two inputs, as of a linear map it must.
    """
    return _problems(model, _gradient_problem)


def not_for_training(model: nn.Module) -> dict[str, str]:
    """Of each kind of quantized layer that cannot be put into training mode: its first layer, and what it says."""
    return _problems(model, _mode_problem)


def _problems(model: nn.Module, problem_of: Callable[[nn.Module], str | None]) -> dict[str, str]:
    first: dict[tuple[type, str], tuple[str, nn.Module]] = {}
    for name, layer in quantized_layers(model).items():
        first.setdefault((type(layer), describe_layer(layer)), (name, layer))
    found = {name: problem_of(layer) for name, layer in first.values()}
    return {name: problem for name, problem in found.items() if problem is not None}


def _mode_problem(layer: nn.Module) -> str | None:
    before = layer.training
    try:
        layer.train()
    except NotImplementedError as error:
        return f"is for inference alone ({first_line(error)})"
    finally:
        layer.training = before
    return None


def _gradient_problem(layer: Any) -> str | None:
    draw = torch.Generator().manual_seed(0)
    with in_mode(layer, training=True), torch.enable_grad():
        try:
            zeros = accepted_zeros(layer)
            start, end = (
                torch.randn(PROBED_ROWS, zeros.shape[-1], generator=draw).to(zeros).requires_grad_() for _ in range(2)
            )
            output = layer.forward(start)
            weights = torch.randn(output.shape, generator=draw).to(output)
            if not output.requires_grad:
                return "passes no gradient to its input"
            gradient = torch.autograd.grad(output, start, weights, allow_unused=True)[0]
        except Exception as error:  # kernels without a derivative say so in many ways
            return f"fails in training ({type(error).__name__}: {first_line(error)})"
        if gradient is None or not bool(gradient.any()):
            return "passes no gradient to its input"
        with torch.no_grad():
            change = ((layer.forward(end) - output) * weights).float().sum(-1)
            predicted = (gradient * (end - start)).float().sum(-1)
    similarity = float(torch.nn.functional.cosine_similarity(change, predicted, dim=0))
    if similarity > SIMILAR:
        return None
    return f"passes a wrong gradient to its input (cosine {similarity:.2f} with the change of its output)"
