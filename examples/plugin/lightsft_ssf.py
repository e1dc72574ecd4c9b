"""SSF: y = gamma * h + beta behind linear layers (2210.08823, section 3.2).

h (..., out) is a layer's output, gamma and beta (out) are trained, from 1 and 0. A layer without a bias gets no beta,
so all of it merges: W' = diag(gamma) W, b' = gamma * b + beta.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightsft import Backbone, Injection, injecting
from lightsft.primitives import Side
from lightsft.targets import select_modules


@dataclass(frozen=True)
class SSF:
    """Scale and shift the outputs of linear layers; `targets` are lightsft's."""

    targets: str | Sequence[str] = "linear"
    learning_rate: ClassVar[float] = 1e-2

    def inject(self, backbone: Backbone, *, seed: int = 0) -> Injection:
        """Put gamma and beta behind every target; nothing is drawn, so the seed does not matter."""
        with injecting(self, backbone, seed) as injection:
            for name in select_modules(backbone, self.targets):
                injection.add_side(name, ScaleAndShift(backbone.module(name)))
        return injection


class ScaleAndShift(Side):
    """The fp32 vectors, cast to the type of the output."""

    mergeable = True

    def __init__(self, served: nn.Module) -> None:
        super().__init__()
        size = served.nf if isinstance(served, Conv1D) else served.out_features
        self.gamma = nn.Parameter(torch.ones(size))
        self.beta = None if served.bias is None else nn.Parameter(torch.zeros(size))

    def forward(self, served: nn.Module, inputs: Tensor, output: Tensor) -> Tensor:
        """Gamma * h + beta; the input is not needed."""
        scaled = output * self.gamma.to(output.dtype)
        return scaled if self.beta is None else scaled + self.beta.to(output.dtype)

    def merged(self, served: nn.Module) -> dict[str, Tensor]:
        """The layer that computes the same alone, in fp32."""
        scale = self.gamma if isinstance(served, Conv1D) else self.gamma[:, None]
        bias = {} if self.beta is None else {"bias": self.gamma * served.bias.float() + self.beta}
        return {"weight": scale * served.weight.float(), **bias}
