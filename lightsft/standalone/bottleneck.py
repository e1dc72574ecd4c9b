"""Bottleneck adapter: y = h + A(z), A(z) = N2(s (U f(D N1(z) + d) + u)) (1902.00751, section 2.1), N1 and N2 optional.

With x what was read, z is the "output" h, the "input" x, or their "sum"; on a "norm" N, y = N(x + A(N(x))).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .sides import Affine, Norm, Side


class Bottleneck(Side):
    """D (bottleneck, size), U (size, bottleneck); `combines`: "output", "input", "sum" or "norm".

    `axis`: of the output, along which its features lie.
    """

    def __init__(
        self,
        size: int,
        bottleneck: int,
        activation: str,
        combines: str = "output",
        norm_before: bool = False,
        norm_after: bool = False,
        axis: int = -1,
    ) -> None:
        super().__init__()
        self.combines, self.axis = combines, axis
        self.norm_before = Norm(size) if norm_before else nn.Identity()
        self.down = Affine(size, bottleneck)
        self.activation = ACT2FN[activation]
        self.up = Affine(bottleneck, size)
        self.norm_after = Norm(size) if norm_after else nn.Identity()
        self.scaling = nn.Parameter(torch.ones((), dtype=torch.float32))

    def forward(self, served: nn.Module, inputs: Tensor, output: Tensor) -> Tensor:
        """`output` with what the adapter adds."""
        if self.combines == "norm":
            normed: Tensor = served.forward(inputs + self.change(output, inputs.dtype))  # past its hooks
            return normed.to(output.dtype)
        z = {"output": output, "input": inputs}.get(self.combines)
        return output + self.change(inputs + output if z is None else z, output.dtype)

    def change(self, z: Tensor, dtype: torch.dtype) -> Tensor:
        """A(z), in another type."""
        hidden = self.activation(self.down(self.norm_before(z.movedim(self.axis, -1))))
        change: Tensor = self.norm_after(self.up(hidden) * self.scaling)
        return change.to(dtype).movedim(-1, self.axis)
