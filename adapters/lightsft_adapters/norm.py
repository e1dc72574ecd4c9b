"""LayerNorm tuning: y = g N(x) + b with g and b trained, all else frozen (2312.11420, section 3).

N(x) is a layer, group or batch normalisation, or the root mean square alone; g and b are as wide as its features. They
are trained in place, as fp32 masters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lightsft import Backbone, Injection, injecting
from lightsft.errors import TargetError
from lightsft.roles import find_norms
from lightsft.targets import resolve_layers


@dataclass(frozen=True)
class NormTuning:
    """Train the gains and biases of the normalisation layers.

    bias: train b too, where there is one.
    layers: only norms in blocks with these indices; negative ones count from the end. None takes every norm of the
        backbone, those before and after the blocks among them.
    """

    bias: bool = True
    layers: Sequence[int] | None = None

    learning_rate: ClassVar[float] = 1e-3

    def inject(self, backbone: Backbone, *, seed: int = 0) -> Injection:
        """Unfreeze the norms of `backbone`."""
        with injecting(self, backbone, seed) as injection:
            injection.unfreeze(self._chosen(backbone))
        return injection

    def _chosen(self, backbone: Backbone) -> list[str]:
        norms = find_norms(backbone)
        if self.layers is not None:
            wanted = resolve_layers(backbone.anatomy.depth, self.layers)
            norms = [norm for norm in norms if backbone.anatomy.block_of(norm.name) in wanted]
        if not norms:
            raise TargetError(
                f"no normalisation layer with parameters in {type(backbone.model).__name__}"
                + (f" in layers {list(self.layers)}" if self.layers is not None else ""),
                expected="layers that normalise and scale what they read",
                todo="use bitfit, ia3 or lora on this model",
            )
        return [name for norm in norms for name in norm.scales + (norm.biases if self.bias else ())]
