"""(IA)^3: y = l (W x + b) where keys and values are made, y = W (l x) + b where a feed-forward ends (2205.05638, 3.3).

l is a trained vector that multiplies feature by feature, starting at 1. Shapes: x (..., in), W (out, in), y (..., out);
l_k and l_v (out, 1), l_ff (1, in). Which layers, and which of their features, is read off the dataflow: of a fused
query-key-value layer the keys' and values' rows are scaled, of several layers behind one key the last. Experts have an
l_ff each. A block without attention has the input of the layer that writes its residual stream scaled.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightsft import Backbone, Injection, injecting
from lightsft.adapter_files import PEFT_SETTINGS
from lightsft.anatomy import CONVOLUTIONS, Weight, linear_shape
from lightsft.dataflow import Dataflow, Hidden, feature_axis, is_served, read_dataflow
from lightsft.errors import ArtifactError, InjectionError, TargetError
from lightsft.files import write_json
from lightsft.plain_layers import plain_twin, unquantize
from lightsft.primitives import Part, PlacedPart, PlacedSide, Side, WeightDelta
from lightsft.primitives.base import Change, drop_pre_hook
from lightsft.quantization import device_of, parameter_names
from lightsft.roles import find_biases
from lightsft.row_changes import RowChange, Scaled, as_matrix
from lightsft.targets import resolve_layers
from lightsft_adapters.checks import one_of
from lightsft_adapters.peft_folder import TASK_TYPES, any_tied, whole_modules

logger = logging.getLogger(__name__)

TARGETS = ("key", "value", "feed_forward")
INPUT_SCALE = "lightsft_input_scale"


@dataclass(frozen=True)
class IA3:
    """Vectors that scale keys, values, and the hidden activations of feed-forwards.

    targets: which of "key", "value" and "feed_forward".
    layers: only blocks with these indices; negative ones count from the end.
    """

    targets: str | Sequence[str] = TARGETS
    layers: Sequence[int] | None = None

    learning_rate: ClassVar[float] = 3e-3

    def __post_init__(self) -> None:
        for target in self._targets:
            one_of("targets", target, TARGETS)

    @property
    def _targets(self) -> tuple[str, ...]:
        return (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)

    def inject(self, backbone: Backbone, *, seed: int = 0) -> Injection:
        """Put a vector on every target of `backbone`."""
        with injecting(self, backbone, seed) as injection:
            flow, weights = read_dataflow(backbone), backbone.anatomy.weights
            features = {n: f for n, f in _features(flow, self._targets).items() if self._is_wanted(backbone, n)}
            biases = _biases_read_elsewhere(backbone, features)
            for name, mask in features.items():
                _scale_outputs(injection, weights[name], mask, biases.get(name, ()))
            for hidden in flow.hidden if "feed_forward" in self._targets else ():
                if self._is_wanted(backbone, hidden.weight):
                    _scale_inputs(injection, weights[hidden.weight], hidden)
            if not injection.primitives:
                raise self._nothing(backbone)
        return injection

    def _is_wanted(self, backbone: Backbone, name: str) -> bool:
        anatomy = backbone.anatomy
        return self.layers is None or anatomy.block_of(name) in resolve_layers(anatomy.depth, self.layers)

    def _nothing(self, backbone: Backbone) -> TargetError:
        return TargetError(
            f"nothing to scale for {', '.join(self._targets)} in {type(backbone.model).__name__}",
            expected="attentions with keys and values, or feed-forwards, in the blocks, and an example that runs",
            todo="leave targets at its default, or use lora on this model",
        )

    def write_peft_config(self, injection: Injection, directory: Path) -> None:
        """PEFT's configuration, so that PeftModel.from_pretrained opens the folder."""
        write_peft_config(injection, directory)


def _features(flow: Dataflow, roles: Sequence[str]) -> dict[str, Tensor]:
    """For each weight behind keys or values, the mask of the features to scale.

    Features that queries are made of too are left alone, unless a block has no others (queries and keys are one).
    """
    queries: dict[str, Tensor] = {}
    for projection in flow.projections:
        if projection.role == "query":
            name, features = projection.source.weight, projection.source.features
            queries[name] = features | queries[name] if name in queries else features
    found: dict[str, Tensor] = {}
    for role, block in dict.fromkeys((p.role, p.block) for p in flow.projections if p.role in roles):
        sources = [p.source for p in flow.projections if (p.role, p.block) == (role, block)]
        own = [
            replace(source, features=source.features & ~queries[source.weight]) if source.weight in queries else source
            for source in sources
        ]
        for source in [source for source in own if source.features.any()] or sources:
            found[source.weight] = source.features | found.get(source.weight, torch.zeros_like(source.features))
    return found


# ---- placing


def _scale_outputs(injection: Injection, weight: Weight, features: Tensor, biases: Iterable[Weight]) -> None:
    """A side on the layer; where the weight is read elsewhere, deltas on it and on the bias that follows it."""
    model = injection.model
    if is_served(model, weight):
        injection.add_side(weight.name, OutputScale(features, feature_axis(model.get_submodule(weight.name))))
        return
    delta = ScaleDelta(features)
    injection.add_delta(weight, delta)
    for bias in biases:
        injection.add_delta(bias, SameScaleDelta(delta))


def _biases_read_elsewhere(backbone: Backbone, names: Iterable[str]) -> dict[str, list[Weight]]:
    """For each of these weights that is not read by its own layer alone, the biases that follow it."""
    weights = [weight for name in names if not is_served(backbone.model, weight := backbone.anatomy.weights[name])]
    biases = find_biases(backbone) if weights else []
    return {
        weight.name: [_read_beside(backbone.model, weight, b.name) for b in biases if b.follows == weight.name]
        for weight in weights
    }


def _read_beside(model: nn.Module, weight: Weight, bias: str) -> Weight:
    """The bias as a weight that is read where `weight` is."""
    parameter = model.get_parameter(bias)
    owners = tuple(n for n, other in model.named_parameters(remove_duplicate=False) if other is parameter)
    places = tuple(
        (owner, reader)
        for owner in owners
        for place, reader in weight.places
        if owner.rpartition(".")[0] == place.rpartition(".")[0]
    )
    return Weight(name=bias, owners=owners, places=places or ((bias, bias.rpartition(".")[0]),), called=False)


def _scale_inputs(injection: Injection, weight: Weight, hidden: Hidden) -> None:
    model = injection.model
    if is_served(model, weight):
        served = model.get_submodule(weight.name)
        injection.place(PlacedInputScale(model, weight.name, InputScale(_input_size(served), feature_axis(served))))
        return
    shape = model.get_parameter(weight.owners[0]).shape
    kept = {*hidden.summed, *([0] if weight.experts else [])}
    mask = torch.ones([size if d in kept else 1 for d, size in enumerate(shape)], dtype=torch.bool)
    injection.add_delta(weight, ScaleDelta(mask))


def _input_size(layer: Any) -> int:
    if isinstance(layer, CONVOLUTIONS):
        return int(layer.in_channels)
    return linear_shape(layer)[1]


# ---- the vectors


def scaled(tensor: Tensor, factors: Tensor) -> Tensor:
    """Tensor * factors, as x + x (l - 1): in half precision l itself would lose its digits beside 1."""
    return torch.addcmul(tensor, tensor, (factors - 1).to(tensor.dtype))


def _along(axis: int, factors: Tensor, tensor: Tensor) -> Tensor:
    """The vector `factors`, to multiply along an axis of `tensor`."""
    return factors if axis == -1 else factors.reshape(-1, *[1] * (tensor.ndim - axis - 1))


class OutputScale(Side):
    """l y: the chosen features of a layer's output; the others keep the factor 1."""

    mergeable = True
    rows: Tensor

    def __init__(self, features: Tensor, axis: int = -1) -> None:
        """`features` (out) marks the chosen ones; they lie along `axis` of the output."""
        super().__init__()
        self.size, self.axis = len(features), axis
        self.register_buffer("rows", features.nonzero().flatten(), persistent=False)
        self.ia3_l = nn.Parameter(torch.ones(len(self.rows), 1))

    def factors(self) -> Tensor:
        """A factor for every feature, (out)."""
        if len(self.rows) == self.size:
            return self.ia3_l.flatten()
        return torch.ones(self.size, device=self.ia3_l.device).index_copy(0, self.rows, self.ia3_l.flatten())

    def forward(self, served: nn.Module, inputs: Tensor, output: Tensor) -> Tensor:
        """L y."""
        return scaled(output, _along(self.axis, self.factors(), output))

    def merged(self, served: nn.Module) -> dict[str, Tensor]:
        """L W and l b."""
        weight, bias, factors = served.weight, served.bias, self.factors()
        assert isinstance(weight, Tensor)
        assert bias is None or isinstance(bias, Tensor)
        rows = factors if isinstance(served, Conv1D) else factors.reshape(-1, *[1] * (weight.ndim - 1))
        merged = {"weight": weight.float() * rows}
        return merged if bias is None else merged | {"bias": bias.float() * factors}

    def row_changes(self, served: nn.Module) -> Mapping[str, RowChange]:
        """The same by rows."""
        weight, factors = served.get_parameter("weight"), self.factors().detach()
        along = factors[None] if isinstance(served, Conv1D) else factors[:, None]
        found: dict[str, RowChange] = {"weight": Scaled(as_matrix(weight.shape), along)}
        if getattr(served, "bias", None) is not None:
            found["bias"] = Scaled((self.size, 1), factors[:, None])
        return found

    def tensors(self) -> dict[str, Tensor]:
        """The factors of all features, (out, 1), as PEFT has them."""
        return {"ia3_l": self.factors().detach()[:, None]}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take the chosen features out of them; the others have to be 1, as they are here."""
        others = tensors["ia3_l"].detach().cpu().flatten().index_fill(0, self.rows.cpu(), 1.0)
        if not bool((others == 1).all()):
            raise ArtifactError(
                f"{int((others != 1).sum())} of {self.size} features are scaled that this (IA)^3 leaves alone",
                expected=f"factors for the {len(self.rows)} features of keys and values, and 1 for the rest",
                todo="it was trained with other targets: open it with PEFT",
            )
        self.ia3_l.copy_(tensors["ia3_l"].to(self.rows.device)[self.rows])


class InputScale(Part):
    """W (l x) + b: the input of a layer."""

    mergeable = True

    def __init__(self, size: int, axis: int = -1) -> None:
        super().__init__()
        self.axis = axis
        self.ia3_l = nn.Parameter(torch.ones(1, size))

    def forward(self, inputs: Tensor) -> Tensor:
        """L x."""
        return scaled(inputs, _along(self.axis, self.ia3_l.flatten(), inputs))

    def merged(self, served: Any) -> Tensor:
        """W with its columns scaled, in fp32."""
        weight, factors = served.weight.float(), self.ia3_l.flatten()
        if isinstance(served, CONVOLUTIONS):  # (out, in / groups, ...): each group of rows has columns of its own
            per_row = factors.reshape(served.groups, -1).repeat_interleave(len(weight) // served.groups, 0)
            factors = per_row.reshape(*per_row.shape, *[1] * (weight.ndim - 2))
        result: Tensor = weight * (factors[:, None] if isinstance(served, Conv1D) else factors)
        return result


class ScaleDelta(WeightDelta):
    """W' = l W for a weight that is read, not called; `mask` is W's shape, with 1 where a factor is shared."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask, persistent=False)
        self.ia3_l = nn.Parameter(torch.ones(int(mask.sum())))

    def factors(self) -> Tensor:
        """The factors in the shape of the mask."""
        return torch.ones(self.mask.shape, device=self.ia3_l.device).masked_scatter(self.mask, self.ia3_l)

    def row_change(self, shape: torch.Size) -> RowChange | None:
        """The same of a matrix, or of one for each expert."""
        return Scaled(tuple(shape), self.factors().detach(), near_one=True) if len(shape) in (2, 3) else None

    def forward(self, weight: Tensor) -> Tensor:
        """L W."""
        return scaled(weight, self.factors())


class SameScaleDelta(WeightDelta):
    """b' = l b with the l of the weight that b follows."""

    def __init__(self, delta: ScaleDelta) -> None:
        super().__init__()
        self.source = (delta,)  # in a tuple: it is no child, and saved once

    def row_change(self, shape: torch.Size) -> RowChange | None:
        """The same of a vector."""
        factors = self.source[0].factors().detach()
        return Scaled(as_matrix(shape), factors.reshape(as_matrix(shape)), near_one=True)

    def forward(self, weight: Tensor) -> Tensor:
        """L b."""
        return scaled(weight, self.source[0].factors().reshape(weight.shape))


class PlacedInputScale(PlacedPart):
    """An InputScale on the layer called `name`: its child, and a forward pre-hook that finds it there."""

    def __init__(self, model: nn.Module, name: str, scale: InputScale) -> None:
        self.name, self.model = name, model
        served = self.served
        if INPUT_SCALE in served._modules:
            raise InjectionError(f"the input of {name} is already scaled", expected="one (IA)^3 per layer")
        scale.to(device_of(served))
        served.add_module(INPUT_SCALE, scale.train(served.training))
        served.register_forward_pre_hook(scale_input, with_kwargs=True)

    @property
    def served(self) -> nn.Module:
        """The layer."""
        return self.model.get_submodule(self.name)

    @property
    def part(self) -> Part:  # type: ignore[override]
        """The scale."""
        scale = self.served._modules[INPUT_SCALE]
        assert isinstance(scale, InputScale)
        return scale

    @property
    def mergeable(self) -> bool:
        """Whether the layer multiplies with its weight as it is; some convolutions standardise it first."""
        kinds = [kind for kind in CONVOLUTIONS if isinstance(self.served, kind)]
        return all(type(self.served).forward is kind.forward for kind in kinds)

    def covers(self) -> set[str]:
        """The parameters of the layer; of a quantized one the weight that its codes stand for."""
        return {f"{self.name}.{name}" for name in parameter_names(self.served)}

    @torch.no_grad()
    def changes(self) -> Iterator[Change]:
        """W and W l."""
        assert isinstance(self.part, InputScale)
        served = plain_twin(self.served)
        yield Change(f"{self.name}.weight", served.get_parameter("weight").float(), self.part.merged(served))

    def row_changes(self) -> Mapping[str, RowChange] | None:
        """The same by rows; the groups of a convolution have columns of their own."""
        if isinstance(self.served, CONVOLUTIONS):
            return None
        factors, weight = self.part.get_parameter("ia3_l").detach(), self.served.get_parameter("weight")
        along = factors.T if isinstance(self.served, Conv1D) else factors
        return {f"{self.name}.weight": Scaled(as_matrix(weight.shape), along)}

    @torch.no_grad()
    def merge(self) -> None:
        """W <- round(W l), then remove the scale."""
        unquantize(self.served)
        scale, weight = self.part, self.served.weight
        assert isinstance(scale, InputScale)
        assert isinstance(weight, Tensor)
        weight.copy_(scale.merged(self.served).to(weight.dtype))
        self.remove()

    def remove(self) -> None:
        """Take the child and the hook off again."""
        del self.served._modules[INPUT_SCALE]
        drop_pre_hook(self.served, scale_input)


def scale_input(
    served: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook of a layer: its input, positional or not, is scaled."""
    scale = served._modules[INPUT_SCALE]
    assert isinstance(scale, InputScale)
    if not scale.enabled:
        return None
    if args:
        return (scale(args[0]), *args[1:]), kwargs
    return args, {name: scale(value) if isinstance(value, Tensor) else value for name, value in kwargs.items()}


# ---- PEFT


def write_peft_config(injection: Injection, directory: Path) -> None:
    """Write adapter_config.json, where PEFT's IA3 computes the same: every vector on a linear layer."""
    whole, parts = whole_modules(injection)
    placed = [primitive for primitive in injection.primitives if isinstance(primitive, PlacedPart)]
    layers = [injection.backbone.model.get_submodule(primitive.name) for primitive in placed if _is_scale(primitive)]
    transposed = {isinstance(layer, Conv1D) for layer in layers if isinstance(layer, nn.Linear | Conv1D)}
    if len(layers) < len(placed) or any(isinstance(layer, CONVOLUTIONS) for layer in layers) or len(transposed) > 1:
        logger.warning("PEFT cannot open %s (lightsft can): not every scaled weight is a linear layer's", directory)
        return
    if parts or any_tied(injection, whole):
        logger.warning("PEFT cannot open %s (lightsft can): a weight is trained in part, or tied", directory)
        return
    write_json(
        directory / PEFT_SETTINGS,
        {
            "peft_type": "IA3",
            "task_type": TASK_TYPES.get(injection.backbone.task or ""),
            "base_model_name_or_path": injection.backbone.source,
            "inference_mode": True,
            "target_modules": sorted(primitive.name for primitive in placed),
            "feedforward_modules": sorted(p.name for p in placed if isinstance(p, PlacedInputScale)),
            "fan_in_fan_out": transposed == {True},
            "init_ia3_weights": True,
            "modules_to_save": whole or None,
        },
    )


def _is_scale(primitive: PlacedPart) -> bool:
    return isinstance(primitive, PlacedSide | PlacedInputScale)
