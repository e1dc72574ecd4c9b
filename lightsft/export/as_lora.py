"""Changes of weights as a LoRA: which of them one expresses, which stay whole, which are left; and that LoRA.

W' = W + B A   (rank r, alpha = r, so that the scaling is 1)      linear layers and embeddings that are called
W' itself                                                         a task head, modules_to_save
left                                                              everything else: norms, biases, experts, ...
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightsft import registry
from lightsft.anatomy import Weight, is_linear
from lightsft.backbone import Backbone
from lightsft.errors import MergeError
from lightsft.export.low_rank_fit import Fit, best_factors, norm
from lightsft.injection import Strategy

_SHOWN = 12


@dataclass(frozen=True)
class Left:
    """A change that a LoRA cannot express: its norm, None if it has none, and why."""

    name: str
    delta: float | None
    reason: str


class AsLoRA:
    """Takes changes one by one, and keeps their factors alone."""

    def __init__(
        self,
        backbone: Backbone,
        *,
        rank: int,
        energy: float | None = None,
        drop_rest: bool = False,
        whole: frozenset[str] = frozenset(),
        untied: frozenset[str] = frozenset(),
    ) -> None:
        """`whole`: parameters that are kept as they are; `untied`: modules with a copy of a weight that was shared."""
        self.backbone, self.rank, self.energy, self.drop_rest = backbone, rank, energy, drop_rest
        self.whole, self.untied = whole, untied
        self.fits: dict[str, Fit] = {}  # by module
        self.left: list[Left] = []
        self.unchanged: list[str] = []
        self.capped: list[str] = []  # modules whose matrix has fewer rows or columns than the rank asked for
        self._weights = {owner: weight for weight in backbone.anatomy.weights.values() for owner in weight.owners}

    def add(self, name: str, before: Tensor, after: Tensor, *, noise: float = 0.0) -> None:
        """The parameter `name` changed so, in fp32; a change whose singular values lie below `noise` is none."""
        if name in self.whole:
            return
        delta = after - before
        size = norm(delta)
        reason = self._cannot(name, delta) if size > 0 else None
        if size == 0 or name in self.backbone.anatomy.idle:
            self.unchanged.append(name)
        elif reason is not None:
            self.leave(name, size, reason)
        elif self.drop_rest or not self.left:  # else all this will be refused
            self._fit(name, delta, noise)

    def leave(self, name: str, delta: float | None, reason: str) -> None:
        """Note a change that is left."""
        self.left.append(Left(name, delta, reason))

    def _fit(self, name: str, delta: Tensor, noise: float) -> None:
        path = name.removesuffix(".weight")
        matrix = delta.T if isinstance(self.backbone.module(path), Conv1D) else delta
        fit = best_factors(matrix, self.rank, energy=self.energy, noise=noise)
        if fit.rank == 0:
            self.unchanged.append(name)
            return
        self.fits[path] = fit
        if self.rank > min(matrix.shape):
            self.capped.append(path)

    def _cannot(self, name: str, delta: Tensor) -> str | None:
        """Why PEFT's LoRA does not express a change of this parameter; None if it does."""
        weight, path = self._weights.get(name), name.removesuffix(".weight")
        if weight is None:
            return "it is a vector: a LoRA changes matrices" if delta.ndim < 2 else "no linear layer is called with it"
        if path in self.untied:
            weight = Weight(path, (name,), ((name, path),), called=True)
        if len(weight.owners) > 1:
            return f"it is shared with {', '.join(owner for owner in weight.owners if owner != name)}"
        if weight.experts:
            return "it holds several experts"
        module = self.backbone.module(path)
        if not weight.called or not (is_linear(module) or _only_looks_up(module)):
            return "it is read by other code than a linear layer or a lookup"
        return None

    # ---- the LoRA

    def require_expressed(self, source: str) -> None:
        """Raise MergeError if something is left that may not be dropped, or nothing was found."""
        if self.left and not self.drop_rest:
            shown = [f"{one.name}: {one.reason}{self._shown_share(one)}" for one in self.left[:_SHOWN]]
            more = [f"and {len(self.left) - _SHOWN} more"] if len(self.left) > _SHOWN else []
            raise MergeError(
                "\n  ".join([f"a LoRA cannot express all of {source}:", *shown, *more]),
                expected="changes of linear layers and embeddings alone",
                todo="leave these out with --drop-rest (the report says how much they are), or keep all of it: "
                "lightsft merge",
            )
        if not self.fits:
            raise MergeError(
                f"{source} changes no linear layer", expected="something to express as a LoRA", todo="check --base"
            )

    def _shown_share(self, one: Left) -> str:
        return "" if one.delta is None else f" (norm of the change: {one.delta:.3g})"

    def share(self, one: Left) -> float | None:
        """Of the squared norm of all changes that have one."""
        return None if one.delta is None else (one.delta / self.change) ** 2 if one.delta else 0.0

    @property
    def change(self) -> float:
        """The norm of all changes that have one, but for those that are kept whole."""
        return math.hypot(*(fit.delta for fit in self.fits.values()), *(one.delta or 0.0 for one in self.left))

    @property
    def total(self) -> tuple[float, float]:
        """Norms of all changes with factors, and of what these lose."""
        fits = self.fits.values()
        return math.hypot(*(fit.delta for fit in fits)), math.hypot(*(fit.error for fit in fits))

    def strategy(self, modules_to_save: Sequence[str] = ()) -> Strategy:
        """The LoRA that holds the factors. `modules_to_save`: those of `whole` that are no task head."""
        most = max(fit.rank for fit in self.fits.values())
        ranks = {name: fit.rank for name, fit in self.fits.items() if fit.rank != most}
        return registry.strategy(
            "lora",
            rank=most,
            alpha=float(most),
            targets=list(self.fits),
            rank_pattern=ranks,
            alpha_pattern={name: float(rank) for name, rank in ranks.items()},
            modules_to_save=list(modules_to_save),
            tied="untie" if self.untied else "refuse",
        )

    def tensors(self) -> Mapping[str, Tensor]:
        """The factors, by the names that the LoRA gives them."""
        found: dict[str, Tensor] = {}
        for name, fit in self.fits.items():
            if isinstance(self.backbone.module(name), nn.Embedding):
                found |= {f"{name}.lora_embedding_A": fit.b.T, f"{name}.lora_embedding_B": fit.a.T}
            else:
                found |= {f"{name}.lora_A.weight": fit.a, f"{name}.lora_B.weight": fit.b}
        return found

    def as_json(self) -> dict[str, Any]:
        """What was made of which change, by weight and in total."""
        delta, error = self.total
        return {
            "rank": self.rank,
            "energy": self.energy,
            "weights": {
                name: {"rank": fit.rank, "shape": [len(fit.b), fit.a.shape[1]], "delta": fit.delta, "loss": fit.loss}
                for name, fit in self.fits.items()
            },
            "delta": delta,
            "loss": error / delta,
            "narrower_than_rank": self.capped,
            "unchanged": len(self.unchanged),
            "kept_whole": sorted(self.whole),
            "dropped": {
                one.name: {"delta": one.delta, "share": self.share(one), "reason": one.reason} for one in self.left
            },
            "dropped_share": sum(self.share(one) or 0.0 for one in self.left),
        }


def _only_looks_up(module: nn.Module) -> bool:
    """An embedding that returns rows, scaled at most; one that reckons positions first does not hand on its input."""
    kind: Any = type(module)
    return isinstance(module, nn.Embedding) and (
        kind.forward is nn.Embedding.forward or hasattr(module, "scalar_embed_scale")
    )
