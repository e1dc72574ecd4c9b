"""Bottleneck adapter: y = h + A(z), A(z) = s (U f(D z + d) + u) (1902.00751, section 2.1).

h (..., size) is the output of a sublayer before it joins the residual stream, D (bottleneck, size), U (size,
bottleneck), bottleneck = size // reduction_factor. Sequential adapters read z = h; the parallel one (2110.04366,
table 1) reads what the feed-forward itself reads. Optional layer norms: A(z) = N2(s (U f(D N1(z) + d) + u)).

With reads="residual" an adapter reads the residual stream x that h is added to, as 2005.00247 has it:

    sequential, pre-norm     x + h + A(x + h)
    sequential, post-norm    N(x + h + A(N(x + h))), N the norm of the sublayer itself
    parallel                 x + h + A(x); of a post-norm model this is what the feed-forward reads anyway
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from lightsft import Backbone, Injection, injecting
from lightsft.errors import ConfigurationError, TargetError
from lightsft.junctions import find_junctions
from lightsft.primitives import Side
from lightsft.primitives.standalone import Standalone
from lightsft.seeding import generator
from lightsft.standalone.bottleneck import Bottleneck
from lightsft.sublayers import Sublayer, find_sublayers
from lightsft.targets import resolve_layers
from lightsft_adapters.checks import above, one_of, probability

PLACEMENTS = ("houlsby", "pfeiffer", "parallel")
READS = ("sublayer", "residual")
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
    reads: "sublayer" (its output, or in parallel its input), or "residual" (the stream that the output joins: after it
        and its norm, or in parallel before it), as AdapterHub's `original_ln_before` does.
    """

    reduction_factor: float = 16
    placement: str = "houlsby"
    non_linearity: str = "relu"
    scaling: float | str = 1.0
    dropout: float = 0.0
    layer_norm_before: bool = False
    layer_norm_after: bool = False
    layers: Sequence[int] | None = None
    reads: str = "sublayer"

    learning_rate: ClassVar[float] = 2e-3
    search_space: ClassVar[Mapping[str, tuple[Any, ...]]] = {"reduction_factor": (4, 8, 16, 32)}

    def __post_init__(self) -> None:
        above("reduction_factor", self.reduction_factor, 0)
        one_of("placement", self.placement, PLACEMENTS)
        one_of("non_linearity", self.non_linearity, NON_LINEARITIES)
        one_of("reads", self.reads, READS)
        probability("dropout", self.dropout)
        if isinstance(self.scaling, str):
            one_of("scaling", self.scaling, ("learned",))

    def inject(self, backbone: Backbone, *, seed: int = 0) -> Injection:
        """Put an adapter on each chosen sublayer of `backbone`."""
        with injecting(self, backbone, seed) as injection:
            sites = self._sites(backbone)
            self._check_reduction(max(site.sublayer.size for site in sites))
            for site in sites:
                injection.add_side(site.served, self._side(site, seed), reads=site.reads)
        return injection

    def _check_reduction(self, widest: int) -> None:
        if widest < self.reduction_factor:
            raise ConfigurationError(
                f"reduction_factor={self.reduction_factor} leaves no bottleneck in a width of {widest}",
                expected=f"a reduction_factor of at most {widest}",
            )

    def _sites(self, backbone: Backbone) -> list[Site]:
        """Where the adapters go."""
        chosen, parallel = self._chosen(backbone), self.placement == "parallel"
        if self.reads == "sublayer":
            kind = ParallelSide if parallel else BottleneckSide
            chosen = [one for one in chosen if one.alike or not parallel]
            if not chosen:
                raise TargetError(
                    f"every sublayer of {type(backbone.model).__name__} gives another shape than it is given",
                    expected="feed-forwards whose input is as wide and as long as their output",
                    todo="use placement='pfeiffer' or 'houlsby'",
                )
            return [Site(one, one.writes, one.reads if parallel else None, kind) for one in chosen]
        junctions = find_junctions(backbone)
        without = [one.writes for one in chosen if one.writes not in junctions]
        if without:
            raise TargetError(
                f"{len(without)} sublayers of {type(backbone.model).__name__} have no residual stream to read beside "
                f"their output: {', '.join(without[:3])}",
                expected="outputs that are added as they are to the input of a layer that ran before, and alone",
                todo="use reads='sublayer'",
            )
        found = []
        for one in chosen:
            joined = junctions[one.writes]
            if parallel:
                found.append(Site(one, one.writes, joined.reads, ParallelSide))
            elif joined.norm is None:
                found.append(Site(one, one.writes, joined.reads, StreamSide))
            else:
                found.append(Site(one, joined.norm, None, NormedSide))
        return found

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

    def _side(self, site: Site, seed: int) -> BottleneckSide:
        size = site.sublayer.size
        bottleneck = max(1, int(size // self.reduction_factor))
        down = nn.Linear(size, bottleneck, dtype=torch.float32)
        up = nn.Linear(bottleneck, size, dtype=torch.float32)
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5), generator=generator(seed, site.sublayer.writes))
        for tensor in (down.bias, up.weight, up.bias):  # so training starts from the backbone's own function
            nn.init.zeros_(tensor)
        return site.kind(size, down, up, self, site.sublayer.axis)


@dataclass(frozen=True)
class Site:
    """The place of one adapter: the module it serves, the one whose input it reads, and how it combines them."""

    sublayer: Sublayer
    served: str
    reads: str | None
    kind: type[BottleneckSide]


class BottleneckSide(Side):
    """h + A(h). `down` and `up` are D with d and U with u: anything with a weight and a bias."""

    combines: ClassVar[str] = "output"

    def __init__(self, size: int, down: nn.Module, up: nn.Module, options: Adapter, axis: int = -1) -> None:
        super().__init__()
        self.axis = axis  # of the output, along which its features lie: 1 after a convolution
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
        """`output` is h."""
        return output + self.change(output, output.dtype)

    def change(self, z: Tensor, dtype: torch.dtype) -> Tensor:
        """A(z), in another type."""
        z = z.movedim(self.axis, -1)
        hidden = self.activation(_linear(self.down, _norm(self.norm_before, z)))
        change = self.dropout(_linear(self.up, hidden) * self.scaling)
        return _norm(self.norm_after, change).to(dtype).movedim(-1, self.axis)

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
        options |= {"combines": self.combines, "axis": self.axis, "activation": self.non_linearity}
        options |= {"size": self.size, "bottleneck": len(matrices["down"].bias)}
        return Standalone(Bottleneck, options, tensors)


class ParallelSide(BottleneckSide):
    """h + A(z), `inputs` being z: what the feed-forward reads, or the stream before that."""

    combines = "input"

    def forward(self, served: nn.Module, inputs: Tensor, output: Tensor) -> Tensor:
        """`output` is h."""
        return output + self.change(inputs, output.dtype)


class StreamSide(BottleneckSide):
    """h + A(x + h), `inputs` being x."""

    combines = "sum"

    def forward(self, served: nn.Module, inputs: Tensor, output: Tensor) -> Tensor:
        """`output` is h."""
        return output + self.change(inputs + output, output.dtype)


class NormedSide(BottleneckSide):
    """N(v + A(N(v))), on the norm N itself: `inputs` is v = x + h, `output` is N(v)."""

    combines = "norm"

    def forward(self, served: nn.Module, inputs: Tensor, output: Tensor) -> Tensor:
        """N runs a second time, past its hooks, in the type that it ran in before."""
        normed: Tensor = served.forward(inputs + self.change(output, inputs.dtype))
        return normed.to(output.dtype)


def _linear(layer: Any, x: Tensor) -> Tensor:
    """The layer in the type of `x`: small matrices are cast, never the activation."""
    return nn.functional.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    """A layer norm in fp32, returned in the type of `x`."""
    result: Tensor = norm(x.float()).to(x.dtype) if isinstance(norm, nn.LayerNorm) else x
    return result
