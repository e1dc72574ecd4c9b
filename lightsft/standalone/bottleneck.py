"""Bottleneck adapter: y = h + N2(s (U f(D N1(z) + d) + u)) (1902.00751, section 2.1), with or without N1 and N2."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .sides import Affine, Norm, Side


class Bottleneck(Side):
    """D (bottleneck, size), U (size, bottleneck); z is the output h or, where it is `parallel`, what was read.

    `axis`: of the output, along which its features lie.
    """

    def __init__(
        self,
        size: int,
        bottleneck: int,
        activation: str,
        parallel: bool = False,
        norm_before: bool = False,
        norm_after: bool = False,
        axis: int = -1,
    ) -> None:
        super().__init__()
        self.parallel, self.axis = parallel, axis
        self.norm_before = Norm(size) if norm_before else nn.Identity()
        self.down = Affine(size, bottleneck)
        self.activation = ACT2FN[activation]
        self.up = Affine(bottleneck, size)
        self.norm_after = Norm(size) if norm_after else nn.Identity()
        self.scaling = nn.Parameter(torch.ones((), dtype=torch.float32))

    def forward(self, served: nn.Module, inputs: Tensor, output: Tensor) -> Tensor:
        """`output` with what the adapter adds."""
        z = (inputs if self.parallel else output).movedim(self.axis, -1)
        made = self.up(self.activation(self.down(self.norm_before(z)))) * self.scaling
        change: Tensor = self.norm_after(made)
        return output + change.to(output.dtype).movedim(-1, self.axis)
