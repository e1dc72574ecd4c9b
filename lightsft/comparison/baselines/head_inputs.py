"""What enters the task head of a frozen backbone, one vector per example.

The head is found by structure: what lies outside the base model, or was not in the checkpoint. Its first layer that
has parameters is watched. Where that layer is called with a vector per position (batch, positions, width), the mean is
taken over the positions that the logits depend on: the last token of a causal classifier, every frame of a sound that
is averaged later, never padding. Which those are is read off the gradient of the logits by the layer's input.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightsft.anatomy import CONVOLUTIONS
from lightsft.backbone import Backbone
from lightsft.data.reading import Row
from lightsft.dry_run import evaluating
from lightsft.tasks.base import Array, Task


def head_inputs(backbone: Backbone, task: Task, rows: Sequence[Row], batch_size: int) -> Array | None:
    """(rows, width) in fp64, in the order of the rows; None without a head that says something of a whole row."""
    layers = head_layers(backbone)
    features = task.encode(rows, backbone.tokenizer)
    order = sorted(range(len(features)), key=lambda index: task.length(features[index]))
    found = []
    for first in range(0, len(order), batch_size):
        batch = task.collate([features[i] for i in order[first : first + batch_size]], backbone.tokenizer)
        vectors = _of_batch(backbone, task, layers, batch)
        if vectors is None:
            return None
        found.append(vectors.double().cpu())
    vectors = torch.cat(found)
    vectors[torch.tensor(order)] = vectors.clone()
    return vectors.numpy()


def head_layers(backbone: Backbone) -> list[nn.Module]:
    """The modules without parts of their own that hold the head's parameters."""
    owners = dict.fromkeys(name.rpartition(".")[0] for name in sorted(backbone.head))
    return [layer for layer in map(backbone.module, owners) if not list(layer.children())]


def _of_batch(backbone: Backbone, task: Task, layers: Sequence[nn.Module], batch: dict[str, Tensor]) -> Tensor | None:
    inputs = {name: value.to(backbone.model.device) for name, value in batch.items()}
    labels = inputs.pop("labels")
    with torch.no_grad(), evaluating(backbone.model), _watched(layers) as seen:
        outputs = task.forward(backbone.model, inputs, labels)
        if not seen:
            return None
        return seen[0].detach() if seen[0].dim() == 2 else _used_positions(seen[0], outputs.logits)


@contextmanager
def _watched(layers: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """The input of the first of these layers that is called; from there on the pass is recorded for a gradient."""
    seen: list[Tensor] = []

    def watch(layer: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if seen or not given or not isinstance(given[0], Tensor) or not given[0].is_floating_point():
            return None
        entering = given[0].movedim(1, -1) if isinstance(layer, CONVOLUTIONS) else given[0]
        entering = entering.detach().requires_grad_()
        seen.append(entering)
        torch.set_grad_enabled(True)
        return (entering.movedim(-1, 1) if isinstance(layer, CONVOLUTIONS) else entering, *given[1:])

    handles = [layer.register_forward_pre_hook(watch) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _used_positions(entering: Tensor, logits: Tensor) -> Tensor | None:
    """(batch, width): the mean over the positions (batch, ..., width) whose gradient is not 0."""
    if logits.dim() != 2 or entering.shape[0] != logits.shape[0]:
        return None
    weights = torch.linspace(1, 2, logits.numel(), device=logits.device).reshape(logits.shape)  # no sum is constant
    (gradient,) = torch.autograd.grad((logits.float() * weights).sum(), entering)
    used, flat = gradient.flatten(1, -2).ne(0).any(-1), entering.detach().flatten(1, -2)
    if not used.any(dim=1).all():
        return None
    kept = flat.float().masked_fill(~used[..., None], 0.0)  # what is not used may be no number
    return kept.sum(1) / used.sum(1, keepdim=True)
