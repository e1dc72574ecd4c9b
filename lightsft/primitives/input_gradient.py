"""A gradient for the input: reversible layers compute none for their weights unless their input wants one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightsft.primitives.base import Arrangement, drop_hook


class InputGradient(Arrangement):
    """The embeddings called `name` return tensors that require a gradient; nothing is trained by it."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.name, self.model = name, model
        model.get_submodule(name).register_forward_hook(_require_gradient)

    def merge(self) -> None:
        """Take the hook off."""
        self.remove()

    def remove(self) -> None:
        """Take the hook off."""
        module = self.model.get_submodule(self.name)
        drop_hook(module, _require_gradient)


def _require_gradient(module: nn.Module, args: Any, output: Any) -> None:
    if torch.is_grad_enabled() and isinstance(output, Tensor) and not output.requires_grad:
        output.requires_grad_(True)
