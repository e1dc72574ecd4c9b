"""What PEFT's tuners must be told about a model, read off its structure instead of PEFT's tables of model names.

Options that the user left at their defaults are filled in: the modules to serve, which of them are feed-forward
outputs (IA3), whether weights lie transposed (Conv1D), how many blocks there are, and sizes that must divide or fit
the layers' widths.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightsft import Backbone
from lightsft.anatomy import is_linear, is_within, may_be_routed_to
from lightsft.dry_run import input_embeddings
from lightsft.errors import TargetError
from lightsft.roles import find_norms
from lightsft.sublayers import find_sublayers
from lightsft.targets import select_modules
from lightsft.trace import Trace
from lightsft_adapters.peft_tuner import UNKNOWN_STEPS

logger = logging.getLogger(__name__)

PROMPT_TOKENS = 10  # of adaption_prompt, which has no default
ALL_LINEAR = "all-linear"  # PEFT's word for every linear layer but the head


def find_targets(backbone: Backbone, tuner: str, asked: str | Sequence[str] | None) -> list[str]:
    """Names of the modules to serve: what was asked for, else what this tuner is made for, else linear layers."""
    if asked == ALL_LINEAR or asked == (ALL_LINEAR,):
        return _linear(backbone) or select_modules(backbone, "linear")
    if asked is not None:
        return select_modules(backbone, asked, servable=lambda module: module is not backbone.model)
    if tuner in _NAMES_ITS_OWN:
        return []
    kind, find = _SERVES.get(tuner, ("linear layer in its blocks", _linear))
    found = find(backbone)
    if not found:
        raise TargetError(
            f"{type(backbone.model).__name__} has no {kind}, which PEFT's {tuner} serves",
            expected="a model with one, or target_modules",
            todo="name layers of another class that PEFT serves with target_modules, or use another strategy",
        )
    return found


def unused(backbone: Backbone, targets: Sequence[str]) -> list[str]:
    """Those of the targets that the output does not depend on: unused towers, layers that only choose indices."""
    seen = backbone.anatomy.trace
    return [] if seen is None else [name for name in targets if not _is_used(backbone, seen, name)]


def _is_used(backbone: Backbone, seen: Trace, name: str) -> bool:
    weights = {f"{name}.{own}": p.is_floating_point() for own, p in backbone.module(name).named_parameters()}
    if seen.used & weights.keys() or may_be_routed_to(backbone.model, name, frozenset(seen.calls)):
        return True
    block = backbone.anatomy.block_name_of(name) or ""
    differentiable = any(weights.values()) and any(is_within(other, block) for other in seen.used)
    return not differentiable and name in seen.calls  # quantized, or in a block that computes its own gradients


def fill(
    backbone: Backbone, tuner: str, targets: Sequence[str], options: Mapping[str, Any], chosen: Collection[str]
) -> dict[str, Any]:
    """`options`, with the targets, and with those that the user has not `chosen` fitted to the model."""
    layers = [backbone.module(name) for name in targets]
    values = {name: value(backbone, targets, layers) for name, value in _FILLS.items()}
    values |= _fitting_sizes(tuner, layers, {name: v for name, v in options.items() if name not in chosen})
    filled = {**options, **{name: v for name, v in values.items() if name in options and name not in chosen}}
    return {**filled, **written_targets(backbone.model, targets, filled.get("feedforward_modules"))}


def _fitting_sizes(tuner: str, layers: Sequence[nn.Module], options: Mapping[str, Any]) -> dict[str, int]:
    """Sizes that are too large for the layers, or do not divide their widths, made to."""
    widths = [width for width in map(_widths, layers) if width]
    fitted = {}
    for name, fit in [*_SIZES.items(), ("r", _RANKS.get(tuner))]:
        if fit is not None and widths and options.get(name):
            fitted[name] = fit(widths, options[name])
            if fitted[name] != options[name]:
                logger.info("%s=%s, since %s does not fit the layers' widths", name, fitted[name], options[name])
    return fitted


def written_targets(model: nn.Module, targets: Sequence[str], outputs: Sequence[str] | None) -> dict[str, Any]:
    """The targets for PEFT: by short names, but in full where some are to be named again as feed-forward outputs."""
    if outputs is None:
        return {"target_modules": shortest_endings(model, targets) or None}
    again = [name for name in targets if any(f".{name}".endswith(f".{output}") for output in outputs)]
    return {"target_modules": list(targets), "feedforward_modules": again}


def shortest_endings(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The shortest ends of the `names` that no other module's name has: some tuners share between equal ends."""
    names = set(names)
    taken = {ending for other, _ in model.named_modules() if other not in names for ending in _endings(other)}
    return sorted({next((e for e in _endings(name) if e not in taken), name) for name in names})


def _endings(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1))


# ---- modules


def _linear(backbone: Backbone) -> list[str]:
    linear = set(backbone.anatomy.linear)
    return [name for name, module in backbone.model.named_modules() if is_linear(module) and name in linear]


def _norms(backbone: Backbone) -> list[str]:
    """But for those that keep statistics of batches."""
    return [norm.name for norm in find_norms(backbone) if not backbone.module(norm.name)._buffers]


def _embedding(backbone: Backbone) -> list[str]:
    embeddings = input_embeddings(backbone.model)
    return [n for n, m in backbone.model.named_modules() if m is embeddings and isinstance(m, nn.Embedding)]


_SERVES: dict[str, tuple[str, Callable[[Backbone], list[str]]]] = {
    "ln_tuning": ("norm with weights", _norms),
    "trainable_tokens": ("token embedding", _embedding),
}
_NAMES_ITS_OWN = ("adaption_prompt",)  # attentions, by the name they have in the models that PEFT wrote it for


# ---- values


def _feed_forward_outputs(backbone: Backbone, targets: Sequence[str], layers: Sequence[nn.Module]) -> list[str]:
    outputs = {sublayer.writes for sublayer in find_sublayers(backbone) if not sublayer.attention}
    return [name for name in targets if name in outputs]


_FILLS: dict[str, Callable[[Backbone, Sequence[str], Sequence[nn.Module]], Any]] = {
    "feedforward_modules": _feed_forward_outputs,
    "fan_in_fan_out": lambda backbone, targets, layers: any(isinstance(layer, Conv1D) for layer in layers),
    "adapter_layers": lambda backbone, targets, layers: backbone.anatomy.depth,
    "adapter_len": lambda backbone, targets, layers: PROMPT_TOKENS,
    "total_step": lambda backbone, targets, layers: UNKNOWN_STEPS,
    "progressbar": lambda backbone, targets, layers: False,
}


def _widths(layer: nn.Module) -> tuple[int, ...]:
    """In and out, in any order; of a quantized layer too, whose weight has another shape."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    weight = getattr(layer, "weight", None)
    return tuple(weight.shape) if isinstance(weight, Tensor) else ()


def _divisor(layers: Sequence[Sequence[int]], limit: int) -> int:
    """The largest divisor of every width, up to `limit`."""
    common = math.gcd(*(size for widths in layers for size in widths))
    return max(size for size in range(1, min(common, limit) + 1) if common % size == 0)


def _entries(layers: Sequence[Sequence[int]], limit: int) -> int:
    """Not more values than the smallest weight has."""
    return min(limit, *(math.prod(widths) for widths in layers))


def _rank(layers: Sequence[Sequence[int]], limit: int) -> int:
    """Not more than the smallest width."""
    return min(limit, *(size for widths in layers for size in widths))


def _sparse_rank(layers: Sequence[Sequence[int]], limit: int) -> int:
    """r (in + out) values are trained: not more than the smallest weight has."""
    return min(limit, *(max(1, math.prod(widths) // sum(widths)) for widths in layers))


_SIZES = {
    "boft_block_size": _divisor,
    "oft_block_size": _divisor,
    "block_size": _divisor,
    "group_size": _divisor,
    "vector_length": _divisor,
    "n_frequency": _entries,
}
_RANKS = {"adamss": _rank, "miss": _rank, "psoft": _rank, "shira": _sparse_rank}
