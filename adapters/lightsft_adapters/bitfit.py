"""BitFit: y = W x + b with b trained, all else frozen (2106.10199, section 3).

Every parameter that is added counts as a bias: those of linear layers, convolutions, normalisation layers, experts,
attention scores, in the blocks and outside them. They are trained in place, as fp32 masters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lightsft import Backbone, Injection, injecting
from lightsft.dataflow import read_dataflow
from lightsft.errors import TargetError
from lightsft.roles import Bias, find_biases
from lightsft.targets import resolve_layers, select_parameters

PARTS = ("attention", "mlp", "norm")
KEYWORDS = ("all", *PARTS, "query", "intermediate")


@dataclass(frozen=True)
class BitFit:
    """Train the biases.

    targets: "all", in the blocks and outside them; "attention", "mlp" or "norm" of the blocks; "query" (of the layers
        that make queries) or "intermediate" (of the layers whose product is the feed-forward's hidden activation),
        which together are the paper's smaller variant (section 4.2); names of modules or parameters, ends of names,
        regular expressions; or several of these.
    layers: only blocks with these indices, none outside them; negative ones count from the end.
    """

    targets: str | Sequence[str] = "all"
    layers: Sequence[int] | None = None

    learning_rate: ClassVar[float] = 1e-3

    def inject(self, backbone: Backbone, *, seed: int = 0) -> Injection:
        """Unfreeze the chosen biases of `backbone`."""
        with injecting(self, backbone, seed) as injection:
            injection.unfreeze(self._chosen(backbone))
        return injection

    def _chosen(self, backbone: Backbone) -> list[str]:
        biases = find_biases(backbone)
        if not biases:
            raise TargetError(
                f"no bias in {type(backbone.model).__name__}",
                expected="layers that add a trained vector, and an example input that runs",
                todo="use norm, ia3 or lora on this model",
            )
        targets = [self.targets] if isinstance(self.targets, str) else list(self.targets)
        chosen = {name for target in targets for name in _matching(backbone, biases, target)}
        if self.layers is not None:
            wanted = resolve_layers(backbone.anatomy.depth, self.layers)
            chosen = {name for name in chosen if backbone.anatomy.block_of(name) in wanted}
        return [bias.name for bias in biases if bias.name in chosen]


def _matching(backbone: Backbone, biases: list[Bias], target: str) -> set[str]:
    """The biases that a target means; TargetError if there is none."""
    if target == "all":
        found = {bias.name for bias in biases}
    elif target in PARTS:
        found = {bias.name for bias in biases if bias.part == target}
    elif target in KEYWORDS:
        weights = _weights_behind(backbone, target)
        found = {bias.name for bias in biases if bias.follows in weights}
    else:
        found = {bias.name for bias in biases} & set(select_parameters(backbone, [target]))
    if not found:
        parts = sorted({bias.part for bias in biases})
        raise TargetError(
            f"no bias in {type(backbone.model).__name__} belongs to {target!r}",
            expected=f"one of {', '.join(KEYWORDS)}, or the name of a layer with a bias",
            todo=f"this model has biases in {', '.join(parts)}; targets='all' takes them all",
        )
    return found


def _weights_behind(backbone: Backbone, target: str) -> set[str]:
    flow = read_dataflow(backbone)
    if target == "query":
        return {projection.source.weight for projection in flow.projections if projection.role == "query"}
    return {name for hidden in flow.hidden for name in hidden.reads}
