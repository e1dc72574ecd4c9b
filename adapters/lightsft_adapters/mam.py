"""Mix-and-match adapter: prefixes on the attentions and scaled parallel adapters on the feed-forwards (2110.04366).

Attention over [P_k; K] and [P_v; V] with a few virtual tokens, and h + s (U f(D x + d) + u) beside each feed-forward
with s = 4 (section 4.6, "MAM adapter": 30 tokens, a bottleneck of 512 in a width of 1024). The two parts are
`lightsft_adapters.prefix` and `lightsft_adapters.adapter`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightsft import Strategy
from lightsft_adapters.adapter import Adapter
from lightsft_adapters.combined import Combination
from lightsft_adapters.prefix import Prefix


@dataclass(frozen=True)
class MAM(Combination):
    """A prefix of few tokens together with scaled parallel adapters.

    num_virtual_tokens: of the prefix.
    reduction_factor: the residual stream's width over the adapters' bottleneck.
    scaling: s, a number or "learned".
    reparameterisation: train the prefix through a small network, as the paper does.
    dropout: on the prefix and on the adapters' output, in training.
    layers: only blocks with these indices; negative ones count from the end.
    """

    num_virtual_tokens: int = 30
    reduction_factor: float = 2
    scaling: float | str = 4.0
    reparameterisation: bool = False
    dropout: float = 0.0
    layers: Sequence[int] | None = None

    def __post_init__(self) -> None:
        self.parts  # noqa: B018 - each part checks its own options

    @property
    def parts(self) -> Sequence[Strategy]:
        """Prefix and parallel adapter."""
        prefix = Prefix(
            self.num_virtual_tokens,
            reparameterisation=self.reparameterisation,
            dropout=self.dropout,
            layers=self.layers,
        )
        adapter = Adapter(
            self.reduction_factor, "parallel", scaling=self.scaling, dropout=self.dropout, layers=self.layers
        )
        return prefix, adapter
