"""Compacter: bottleneck adapters whose matrices are sums of Kronecker products (2106.04647).

    y = h + A(z), A(z) = s (U f(D z + d) + u), each of D and U being W = sum_i A_i (x) S_i T_i, i = 1 ... n

Shapes: W (out, in), A_i (n, n), S_i (out / n, phm_rank), T_i (phm_rank, in / n); (x) is the Kronecker product. The n
matrices A_i are shared by all adapters of the model, S_i and T_i belong to each matrix. Where an adapter goes, and
what z is: `lightsft_adapters.adapter`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightsft import Backbone, Injection, injecting
from lightsft.errors import ConfigurationError
from lightsft.primitives import Part
from lightsft.seeding import generator
from lightsft_adapters.adapter import Adapter, BottleneckSide, Site
from lightsft_adapters.checks import at_least
from lightsft_adapters.shared import PlacedShared, refer

USUAL_DIMENSION = 4
RULE_DEVIATION = 0.25  # of A; where U does not start at zero, as in the paper, it has to be tiny


@dataclass(frozen=True)
class Compacter(Adapter):
    """Adapters of very few parameters; the options of adapters and these.

    phm_dimension: n. None is 4, or the largest number below it that divides every width; one that is given must.
    phm_rank: the inner width of S_i T_i.
    shared_rule: one set of A_i for all adapters; otherwise each matrix has its own.
    The bottleneck is the multiple of n (at least n) that is nearest to the width over reduction_factor.
    """

    reduction_factor: float = 32
    non_linearity: str = "gelu"
    phm_dimension: int | None = None
    phm_rank: int = 1
    shared_rule: bool = True

    learning_rate: ClassVar[float] = 1e-2  # measured on the demo; the authors' configuration for T5-base has 3e-3
    search_space: ClassVar[Mapping[str, tuple[Any, ...]]] = {"reduction_factor": (4, 8, 16, 32)}

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("phm_rank", self.phm_rank, 1)
        if self.phm_dimension is not None:
            at_least("phm_dimension", self.phm_dimension, 1)

    def inject(self, backbone: Backbone, *, seed: int = 0) -> Injection:
        """Put an adapter on each chosen sublayer of `backbone`, and the shared A_i on the model."""
        with injecting(self, backbone, seed) as injection:
            sites = self._sites(backbone)
            n = self._dimension({site.sublayer.size for site in sites})
            rule = None
            if self.shared_rule:
                rule = Rule(n, generator(seed, "compacter"))
                injection.place(PlacedShared(backbone.model, "compacter", rule))
            for site in sites:
                side = self._side_of(site, n, rule, generator(seed, site.sublayer.writes))
                injection.add_side(site.served, side, reads=site.reads)
        return injection

    def _side_of(self, site: Site, n: int, rule: Rule | None, random: torch.Generator) -> BottleneckSide:
        size = site.sublayer.size
        bottleneck = max(1, round(size / self.reduction_factor / n)) * n
        down = KroneckerLinear(size, bottleneck, n, self.phm_rank, rule, random)
        up = KroneckerLinear(bottleneck, size, n, self.phm_rank, rule, random)
        nn.init.zeros_(up.right)  # so training starts from the backbone's own function
        return site.kind(size, down, up, self, site.sublayer.axis)

    def _dimension(self, widths: set[int]) -> int:
        """A number n that divides every width."""
        fitting = [n for n in range(1, min(widths) + 1) if all(width % n == 0 for width in widths)]
        if self.phm_dimension is None:
            return max(n for n in fitting if n <= USUAL_DIMENSION)
        if self.phm_dimension not in fitting:
            raise ConfigurationError(
                f"phm_dimension={self.phm_dimension} does not divide a residual stream of width "
                + " and one of ".join(map(str, sorted(widths))),
                expected=f"phm_dimension one of {', '.join(map(str, fitting))}",
                todo="leave it out to take the one nearest to the usual 4",
            )
        return self.phm_dimension


class Rule(Part):
    """The matrices A_i, (n, n, n)."""

    def __init__(self, n: int, random: torch.Generator) -> None:
        super().__init__()
        self.rule = nn.Parameter(torch.empty(n, n, n).normal_(std=RULE_DEVIATION, generator=random))


class KroneckerLinear(nn.Module):
    """y = W x + b, W = sum_i A_i (x) S_i T_i (outputs, inputs). S and T are Glorot-uniform, b is zero."""

    shared: Rule

    def __init__(
        self, inputs: int, outputs: int, n: int, rank: int, rule: Rule | None, random: torch.Generator
    ) -> None:
        super().__init__()
        if rule is None:
            self.shared = Rule(n, random)
        else:
            refer(self, "shared", rule)
        self.left = nn.Parameter(_glorot(n, outputs // n, rank, random))
        self.right = nn.Parameter(_glorot(n, rank, inputs // n, random))
        self.bias = nn.Parameter(torch.zeros(outputs))

    @property
    def weight(self) -> Tensor:
        """W, made of its factors."""
        product = torch.einsum("iab,ipq->apbq", self.shared.rule.to(self.left.device), self.left @ self.right)
        return product.flatten(2).flatten(0, 1)


def _glorot(n: int, rows: int, columns: int, random: torch.Generator) -> Tensor:
    """N matrices (rows, columns), uniform within sqrt(6 / (rows + columns))."""
    bound = (6 / (rows + columns)) ** 0.5
    return torch.empty(n, rows, columns).uniform_(-bound, bound, generator=random)
