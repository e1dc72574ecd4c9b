"""Bottleneck adapter: y = h + A(z), A(z) = s (U f(D z + d) + u) (1902.00751, section 2.1).

h (..., size) is the output of a sublayer before it joins the residual stream, D (bottleneck, size), U (size,
bottleneck), bottleneck = size // reduction_factor. Sequential adapters read z = h; the parallel one (2110.04366,
table 1) reads z = x, what the feed-forward itself reads. Optional layer norms: A(z) = N2(s (U f(D N1(z) + d) + u)).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from lightsft import Backbone, Injection, injecting
from lightsft.errors import ConfigurationError, TargetError
from lightsft.primitives import Side
from lightsft.primitives.standalone import Standalone
from lightsft.seeding import generator
from lightsft.standalone.bottleneck import Bottleneck
from lightsft.sublayers import Sublayer, find_sublayers
from lightsft.targets import resolve_layers
from lightsft_adapters.checks import above, one_of, probability

PLACEMENTS = ("houlsby", "pfeiffer", "parallel")
NON_LINEARITIES = ("relu", "gelu", "silu", "swish", "tanh", "sigmoid", "leaky_relu")


@dataclass(frozen=True)
class Adapter:
    """Small bottleneck layers in every block.

    reduction_factor: the residual stream's width over the bottleneck's, which is 1 in sublayers narrower than that.
    placement: "houlsby" (after each attention and each feed-forward), "pfeiffer" (after each feed-forward, 2005.00247),
        "parallel" (beside each feed-forward).
    non_linearity: f, one of relu, gelu, silu (swish), tanh, sigmoid, leaky_relu.
    scaling: s, a number or "learned" (one trained scalar per adapter, starting at 1).
    dropout: on the adapter's output, in training.
    layer_norm_before, layer_norm_after: N1 and N2.
    layers: only blocks with these indices; negative ones count from the end.
    """

    reduction_factor: float = 16
    placement: str = "houlsby"
    non_linearity: str = "relu"
    scaling: float | str = 1.0
    dropout: float = 0.0
    layer_norm_before: bool = False
    layer_norm_after: bool = False
    layers: Sequence[int] | None = None

    learning_rate: ClassVar[float] = 2e-3

    def __post_init__(self) -> None:
        above("reduction_factor", self.reduction_factor, 0)
        one_of("placement", self.placement, PLACEMENTS)
        one_of("non_linearity", self.non_linearity, NON_LINEARITIES)
        probability("dropout", self.dropout)
        if isinstance(self.scaling, str):
            one_of("scaling", self.scaling, ("learned",))

    def inject(self, backbone: Backbone, *, seed: int = 0) -> Injection:
        """Put an adapter on each chosen sublayer of `backbone`."""
        with injecting(self, backbone, seed) as injection:
            sublayers = self._chosen(backbone)
            self._check_reduction(max(sublayer.size for sublayer in sublayers))
            for sublayer in sublayers:
                injection.add_side(sublayer.writes, self._side(sublayer, seed), reads=self._reads(sublayer))
        return injection

    def _check_reduction(self, widest: int) -> None:
        if widest < self.reduction_factor:
            raise ConfigurationError(
                f"reduction_factor={self.reduction_factor} leaves no bottleneck in a width of {widest}",
                expected=f"a reduction_factor of at most {widest}",
            )

    def _reads(self, sublayer: Sublayer) -> str | None:
        return sublayer.reads if self.placement == "parallel" else None

    def _chosen(self, backbone: Backbone) -> list[Sublayer]:
        sublayers = find_sublayers(backbone)
        if self.placement != "houlsby":
            sublayers = [sublayer for sublayer in sublayers if not sublayer.attention]
        if self.layers is not None:
            wanted = resolve_layers(backbone.anatomy.depth, self.layers)
            sublayers = [sublayer for sublayer in sublayers if sublayer.layer in wanted]
        if not sublayers:
            raise TargetError(
                f"no sublayer for {self.placement!r} adapters in {type(backbone.model).__name__}",
                expected="blocks with a linear layer that writes the residual stream",
                todo="try placement='houlsby', or another strategy",
            )
        return sublayers

    def _side(self, sublayer: Sublayer, seed: int) -> BottleneckSide:
        bottleneck = max(1, int(sublayer.size // self.reduction_factor))
        down = nn.Linear(sublayer.size, bottleneck, dtype=torch.float32)
        up = nn.Linear(bottleneck, sublayer.size, dtype=torch.float32)
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5), generator=generator(seed, sublayer.writes))
        for tensor in (down.bias, up.weight, up.bias):  # so training starts from the backbone's own function
            nn.init.zeros_(tensor)
        return BottleneckSide(sublayer.size, down, up, self, sublayer.axis)


class BottleneckSide(Side):
    """h + A(z). `down` and `up` are D with d and U with u: anything with a weight and a bias."""

    def __init__(self, size: int, down: nn.Module, up: nn.Module, options: Adapter, axis: int = -1) -> None:
        super().__init__()
        self.axis = axis  # of the output, along which its features lie: 1 after a convolution
        self.parallel = options.placement == "parallel"
        self.norm_before = nn.LayerNorm(size) if options.layer_norm_before else nn.Identity()
        self.down = down
        self.size, self.non_linearity = size, options.non_linearity
        self.activation = ACT2FN[options.non_linearity]
        self.up = up
        self.norm_after = nn.LayerNorm(size) if options.layer_norm_after else nn.Identity()
        self.dropout = nn.Dropout(options.dropout)
        self.scaling: Any = options.scaling
        if options.scaling == "learned":
            self.scaling = nn.Parameter(torch.ones(()))

    def forward(self, served: nn.Module, inputs: Tensor, output: Tensor) -> Tensor:
        """`output` is h; `inputs` is what the feed-forward reads when parallel, and unused otherwise."""
        z = (inputs if self.parallel else output).movedim(self.axis, -1)
        hidden = self.activation(_linear(self.down, _norm(self.norm_before, z)))
        change = self.dropout(_linear(self.up, hidden) * self.scaling)
        return output + _norm(self.norm_after, change).to(output.dtype).movedim(-1, self.axis)

    def standalone(self) -> Standalone:
        """The same with D and U as plain matrices."""
        norms = {"norm_before": self.norm_before, "norm_after": self.norm_after}
        matrices: dict[str, Any] = {"down": self.down, "up": self.up}
        used = matrices | {name: norm for name, norm in norms.items() if isinstance(norm, nn.LayerNorm)}
        tensors = {
            f"{name}.{t}": getattr(layer, t).detach() for name, layer in used.items() for t in ("weight", "bias")
        }
        tensors["scaling"] = torch.as_tensor(self.scaling, dtype=torch.float32).detach()
        options: dict[str, Any] = {name: name in used for name in norms}
        options |= {"parallel": self.parallel, "axis": self.axis, "activation": self.non_linearity}
        options |= {"size": self.size, "bottleneck": len(matrices["down"].bias)}
        return Standalone(Bottleneck, options, tensors)


def _linear(layer: Any, x: Tensor) -> Tensor:
    """The layer in the type of `x`: small matrices are cast, never the activation."""
    return nn.functional.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    """A layer norm in fp32, returned in the type of `x`."""
    result: Tensor = norm(x.float()).to(x.dtype) if isinstance(norm, nn.LayerNorm) else x
    return result
