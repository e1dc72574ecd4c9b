"""Full fine-tuning: W <- W - learning_rate * gradient, for all weights or some of them.

The weights are trained in place as fp32 masters. `targets="head"` is the linear probe: the task head on frozen
features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from lightsft import Backbone, Injection, injecting
from lightsft.errors import ConfigurationError, TargetError
from lightsft.targets import resolve_layers, select_parameters
from lightsft_adapters.checks import at_least, one_of


@dataclass(frozen=True)
class Full:
    """Train existing weights.

    targets: "all" (but what arrives fixed, as sinusoidal positions do); "head" (the task head alone); or names of
        modules or parameters, ends of names, or regular expressions ("layer.5", "LayerNorm", r".*bias").
    last_blocks: only the last so many blocks of each stack, and the head. None is all of them.
    save: "delta" writes the tensors that were trained, "checkpoint" the whole transformers model beside them.
    """

    targets: str | Sequence[str] = "all"
    last_blocks: int | None = None
    save: str = "delta"

    learning_rate: ClassVar[float] = 1e-4

    def __post_init__(self) -> None:
        one_of("save", self.save, ("delta", "checkpoint"))
        if self.last_blocks is not None:
            at_least("last_blocks", self.last_blocks, 1)
            if self.targets != "all":
                raise ConfigurationError(
                    f"targets={self.targets!r} together with last_blocks={self.last_blocks}",
                    expected="one of the two",
                )

    @property
    def trains_weights(self) -> bool:
        """Whether weights of the backbone proper are trained, so that it is worth loading them in fp32."""
        return self.targets != "head"

    def inject(self, backbone: Backbone, *, seed: int = 0) -> Injection:
        """Unfreeze the chosen weights of `backbone`."""
        with injecting(self, backbone, seed) as injection:
            injection.unfreeze(self._chosen(backbone, injection.arrived_fixed))
        return injection

    def write_companions(self, injection: Injection, directory: Path) -> None:
        """With save="checkpoint", the whole model beside the trained tensors, in the backbone's own type."""
        if self.save == "checkpoint":
            stored = injection.backbone.stored_dtype
            state = {n: t.to(stored) if t.is_floating_point() else t for n, t in injection.model.state_dict().items()}
            injection.model.save_pretrained(directory, state_dict=state)
            injection.model.config.dtype = stored  # save_pretrained took it from the fp32 masters
            injection.model.config.save_pretrained(directory)

    def _chosen(self, backbone: Backbone, fixed: frozenset[str]) -> list[str]:
        names = [name for name, _ in backbone.model.named_parameters() if name not in fixed]
        if self.last_blocks is not None:
            return _in_last_blocks(backbone, names, self.last_blocks)
        if self.targets == "all":
            return names
        if self.targets == "head":
            return _head(backbone)
        return select_parameters(backbone, self.targets)


def _in_last_blocks(backbone: Backbone, names: list[str], count: int) -> list[str]:
    anatomy = backbone.anatomy
    resolve_layers(anatomy.depth, [-count])
    last = [block for stack in anatomy.blocks for block in stack[-count:]]
    return [name for name in names if any(name.startswith(block + ".") for block in last)]


def _head(backbone: Backbone) -> list[str]:
    """The task head; of a language model, the output embeddings."""
    if backbone.head:
        return sorted(backbone.head)
    output = backbone.model.get_output_embeddings()
    if output is None:
        raise TargetError(f"{type(backbone.model).__name__} has no head", expected="a model with a task head")
    owned = {id(parameter) for parameter in output.parameters()}
    return [name for name, parameter in backbone.model.named_parameters() if id(parameter) in owned]
