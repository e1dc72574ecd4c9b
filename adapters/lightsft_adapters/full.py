"""Full fine-tuning: W <- W - learning_rate * gradient, for all weights or some of them.

The weights are trained in place as fp32 masters. `targets="head"` is the linear probe: the task head on frozen
features.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import nn

from lightsft import Backbone, Injection, injecting
from lightsft.errors import ConfigurationError, TargetError
from lightsft.quantization import matrix_size, quantized_layers
from lightsft.targets import resolve_layers, select_parameters
from lightsft_adapters.checks import at_least, one_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Full:
    """Train existing weights.

    targets: "all" (but what arrives fixed, as sinusoidal positions do); "head" (the task head alone); or names of
        modules or parameters, ends of names, or regular expressions ("layer.5", "LayerNorm", r".*bias").
    last_blocks: only the last so many blocks of each stack, and the head. None is all of them.
    save: "delta" writes the tensors that were trained, "checkpoint" the whole transformers model beside them.
    quantized: "skip" leaves the weights of quantized layers as codes and trains what is in floating point; "dequantize"
        makes the chosen layers plain while they are trained, in fp32, and keeps their codes beside.
    """

    targets: str | Sequence[str] = "all"
    last_blocks: int | None = None
    save: str = "delta"
    quantized: str = "skip"

    learning_rate: ClassVar[float] = 1e-4

    def __post_init__(self) -> None:
        one_of("save", self.save, ("delta", "checkpoint"))
        one_of("quantized", self.quantized, ("skip", "dequantize"))
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
        codes = _codes(backbone)
        if codes and self.save == "checkpoint":
            raise ConfigurationError(
                f"save='checkpoint' on weights in {backbone.quantization}",
                expected="save='delta'",
                todo="make a plain checkpoint of the adapter folder: lightsft merge ADAPTER --out FOLDER",
            )
        with injecting(self, backbone, seed) as injection:
            chosen = self._chosen(backbone, injection.arrived_fixed, codes)
            left = [layer for name, layer in codes.items() if name in chosen] if self.quantized == "skip" else []
            injection.unfreeze(name for name in chosen if name not in codes or not left)
        if left:
            _say_what_is_left(backbone, left)
        return injection

    def write_companions(self, injection: Injection, directory: Path) -> None:
        """With save="checkpoint", the whole model beside the trained tensors, in the backbone's own type."""
        if self.save == "checkpoint":
            stored = injection.backbone.stored_dtype
            state = {n: t.to(stored) if t.is_floating_point() else t for n, t in injection.model.state_dict().items()}
            injection.model.save_pretrained(directory, state_dict=state)
            injection.model.config.dtype = stored  # save_pretrained took it from the fp32 masters
            injection.model.config.save_pretrained(directory)

    def _chosen(self, backbone: Backbone, fixed: frozenset[str], codes: Mapping[str, nn.Module]) -> list[str]:
        """Names of parameters, those of `codes` among them."""
        beside = tuple(f"{name.removesuffix('weight')}" for name in codes)
        free = {name for name in _parameters(backbone, codes) if name not in fixed or name.startswith(beside)}
        names = [name for name in _parameters(backbone, codes) if name in free]
        if self.last_blocks is not None:
            return _in_last_blocks(backbone, names, self.last_blocks)
        if self.targets == "all":
            return names
        if self.targets == "head":
            return _head(backbone)
        return self._named(backbone, codes)

    def _named(self, backbone: Backbone, codes: Mapping[str, nn.Module]) -> list[str]:
        """What `targets` names; TargetError if one names nothing but quantized layers, which would stay as they are."""
        targets = [self.targets] if isinstance(self.targets, str) else list(self.targets)
        for target in targets:
            found = select_parameters(backbone, target)
            meant = [name for name in found if name in codes]
            if self.quantized == "skip" and meant and _names_them(target, meant, found):
                raise TargetError(
                    f"{target!r} names weights in {backbone.quantization} ({meant[0]}"
                    + (f" and {len(meant) - 1} more)" if len(meant) > 1 else ")"),
                    expected="weights in floating point: codes cannot be trained",
                    todo="train a lora beside them, or make them plain with quantized='dequantize'",
                )
        return select_parameters(backbone, targets)


def _names_them(target: str, codes: Sequence[str], found: Sequence[str]) -> bool:
    """Whether a target means these codes, not a block with codes in it: by their name, or by finding nothing else."""
    layers = [name.rpartition(".")[0] for name in codes]
    return any(f".{name}".endswith(f".{target}") for name in (*codes, *layers)) or all(
        name.rpartition(".")[0] in layers for name in found
    )


def _codes(backbone: Backbone) -> dict[str, nn.Module]:
    """The quantized layers by the names of their weights."""
    backbone.quantization  # noqa: B018 - read from the bare model, before anything is made plain
    return {f"{name}.weight": layer for name, layer in quantized_layers(backbone.model).items()}


def _parameters(backbone: Backbone, codes: Mapping[str, nn.Module]) -> list[str]:
    """Names of what could be trained: parameters in floating point, and weights that are codes."""
    named = backbone.model.named_parameters()
    return [name for name, parameter in named if name in codes or parameter.is_floating_point()]


def _say_what_is_left(backbone: Backbone, layers: Sequence[nn.Module]) -> None:
    every = sum(matrix_size(layer) for layer in quantized_layers(backbone.model).values())
    plain = sum(p.numel() for p in backbone.model.parameters() if p.is_floating_point())
    share = sum(map(matrix_size, layers)) / (every + plain)
    logger.warning(
        "Full trains what is in floating point: the weights of %d layers (%.0f %% of the model) stay in %s; to train "
        "them, use lora, or Full(quantized='dequantize')",
        len(layers),
        100 * share,
        backbone.quantization,
    )


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
