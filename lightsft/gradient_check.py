"""Whether quantized layers pass the right gradient to their inputs: formats made for inference alone do not."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightsft.quantization import accepted_zeros, as_in_training, describe_layer, quantized_layers

PROBED_ROWS, SIMILAR = 16, 0.9  # directions in which a layer's gradient is compared with its output, cosine


def without_gradient(model: nn.Module) -> dict[str, str]:
    """Of each kind of quantized layer whose input gets no gradient, or a wrong one: its first layer, and what happens.

    Right means that the gradient predicts how the output changes between two inputs, as of a linear map it must.
    """
    first: dict[tuple[type, str], str] = {}
    layers = quantized_layers(model)
    for name, layer in layers.items():
        first.setdefault((type(layer), describe_layer(layer)), name)
    found = {name: _gradient_problem(layers[name]) for name in first.values()}
    return {name: problem for name, problem in found.items() if problem is not None}


def _gradient_problem(layer: Any) -> str | None:
    draw = torch.Generator().manual_seed(0)
    with as_in_training(layer), torch.enable_grad():
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
            return f"fails in training ({type(error).__name__}: {str(error).strip().splitlines()[0][:200]})"
        if gradient is None or not bool(gradient.any()):
            return "passes no gradient to its input"
        with torch.no_grad():
            change = ((layer.forward(end) - output) * weights).float().sum(-1)
            predicted = (gradient * (end - start)).float().sum(-1)
    similarity = float(torch.nn.functional.cosine_similarity(change, predicted, dim=0))
    if similarity > SIMILAR:
        return None
    return f"passes a wrong gradient to its input (cosine {similarity:.2f} with the change of its output)"
