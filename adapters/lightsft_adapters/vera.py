"""VeRA: y = W x + L_b B L_d A x, with one random and frozen A and B for all layers (2310.11454, section 3.1).

L_d and L_b are the diagonal matrices of d (rank) and b (out), the vectors that each layer learns. Shapes: x (..., in),
A (rank, in), B (out, rank). A and B have the size of the largest layer; one with fewer inputs takes the first columns
of A, one with fewer outputs the first rows of B. Both are Kaiming-uniform (bounded by sqrt(6 / columns)), d starts at
`d_initial` and b at zero, so training starts from the backbone's own function.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightsft import Backbone, Injection, injecting
from lightsft.anatomy import Weight, linear_shape
from lightsft.errors import TargetError
from lightsft.low_rank import LowRank
from lightsft.primitives import Part, Side, WeightDelta
from lightsft.seeding import generator
from lightsft.targets import select_weights
from lightsft_adapters.checks import above, at_least, one_of, probability
from lightsft_adapters.lora import like_weight, matrices
from lightsft_adapters.shared import PlacedShared, refer
from lightsft_adapters.tied import CHOICES, resolve_tied


@dataclass(frozen=True)
class VeRA:
    """Trained scales on a random low-rank update that all layers share.

    rank: of the update. It costs few trained numbers (one each per layer), so it is larger than LoRA's.
    d_initial: what d starts at.
    dropout: on the update's input, in training.
    targets: "linear" (every linear map in the blocks), "attention", "mlp", "experts", names, regular expressions.
    layers: only blocks with these indices; negative ones count from the end.
    tied: what to do with a target whose weight the input or output embeddings share: "refuse", "skip" or "untie" it.
    save_projection: keep A and B in the saved folder. Otherwise they are made again from the injection's seed, which
        gives the same bits as long as torch's random numbers stay the same.
    """

    rank: int = 256
    d_initial: float = 0.1
    dropout: float = 0.0
    targets: str | Sequence[str] = "linear"
    layers: Sequence[int] | None = None
    tied: str = "refuse"
    save_projection: bool = False

    learning_rate: ClassVar[float] = 2e-2  # measured on the demo, as the other defaults
    search_space: ClassVar[Mapping[str, tuple[Any, ...]]] = {"rank": (64, 128, 256, 512)}

    def __post_init__(self) -> None:
        at_least("rank", self.rank, 1)
        above("d_initial", self.d_initial, 0)
        probability("dropout", self.dropout)
        one_of("tied", self.tied, CHOICES)

    def inject(self, backbone: Backbone, *, seed: int = 0) -> Injection:
        """Put A and B on `backbone`, and d and b beside every target."""
        with injecting(self, backbone, seed) as injection:
            weights = list(self._served(injection))
            if weights:
                outputs, inputs = (max(sizes) for sizes in zip(*(_shape(backbone, w) for w in weights), strict=True))
                shared = Projections(self.rank, outputs, inputs, seed, saved=self.save_projection)
                injection.place(PlacedShared(backbone.model, "vera", shared))
                for weight in weights:
                    self._place(injection, weight, shared)
        if self.targets == "linear" and self.layers is None:
            injection.report_coverage()
        return injection

    def _served(self, injection: Injection) -> Iterator[Weight]:
        backbone = injection.backbone
        for weight in select_weights(backbone, self.targets, layers=self.layers):
            if weight.embedding:
                raise TargetError(
                    f"VeRA on the embedding {weight.name}",
                    expected="linear layers, convolutions or experts",
                    todo="leave it out of the targets, or use lora, which serves embeddings",
                )
            if backbone.anatomy.idle.intersection(weight.owners):
                injection.skip([weight.name])
            else:
                served = resolve_tied(injection, weight, self.tied)
                if served is not None:
                    yield served

    def _place(self, injection: Injection, weight: Weight, shared: Projections) -> None:
        """A side where a linear layer is called, a delta on the weight everywhere else."""
        if weight.called:
            module = injection.backbone.module(weight.name)
            injection.add_side(weight.name, VeRASide(module, shared, self.d_initial, self.dropout))
        else:
            parameter = injection.backbone.model.get_parameter(weight.owners[0])
            injection.add_delta(weight, VeRADelta(parameter, weight.experts, shared, self.d_initial))


class Projections(Part):
    """A (rank, inputs) and B (outputs, rank), frozen; `saved` or made again from the seed."""

    mergeable = True
    A: Tensor
    B: Tensor

    def __init__(self, rank: int, outputs: int, inputs: int, seed: int, *, saved: bool) -> None:
        super().__init__()
        self.seed = seed
        for name, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            value = self._made(name, shape)
            if saved:
                self.register_parameter(name, nn.Parameter(value, requires_grad=False))
            else:
                self.register_buffer(name, value, persistent=False)

    def _made(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return nn.init.kaiming_uniform_(torch.empty(shape), generator=generator(self.seed, f"vera.{name}"))

    def make_again(self) -> None:
        """What is not saved comes from the seed."""
        for name, buffer in self.named_buffers():
            buffer.copy_(self._made(name, tuple(buffer.shape)))

    def factors(self, d: Tensor, b: Tensor, inputs: int) -> tuple[Tensor, Tensor]:
        """(L_b B (..., out, rank), L_d A (..., rank, inputs)), with d (..., rank) and b (..., out)."""
        a, b_rows = self.A[:, :inputs], self.B[: b.shape[-1]]
        return b[..., None] * b_rows, d[..., None] * a

    def product(self, d: Tensor, b: Tensor, inputs: int) -> Tensor:
        """L_b B L_d A, (..., out, in)."""
        left, right = self.factors(d, b, inputs)
        return left @ right


class VeRASide(Side):
    """L_b B L_d A x beside a linear layer. All four are fp32 and cast to the activation's type, never the reverse."""

    mergeable = True
    shared: Projections

    def __init__(self, served: nn.Module, shared: Projections, d_initial: float, dropout: float = 0.0) -> None:
        super().__init__()
        refer(self, "shared", shared)
        outputs, self.inputs = linear_shape(served)
        self.vera_lambda_d = nn.Parameter(torch.full((len(shared.A),), d_initial))
        self.vera_lambda_b = nn.Parameter(torch.zeros(outputs))
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, served: nn.Module, inputs: Tensor, output: Tensor) -> Tensor:
        """Y + L_b B L_d A x."""
        a, b = self.shared.A[:, : self.inputs].to(inputs), self.shared.B[: len(self.vera_lambda_b)].to(inputs)
        low = nn.functional.linear(self.dropout(inputs), a) * self.vera_lambda_d.to(inputs.dtype)
        update = nn.functional.linear(low, b) * self.vera_lambda_b.to(inputs.dtype)
        return output + update.to(output.dtype)

    def low_rank(self, served: nn.Module) -> LowRank | None:
        """W + L_b B L_d A, as W is stored."""
        d, b = self.vera_lambda_d.detach(), self.vera_lambda_b.detach()
        rows, columns = self.shared.B[: len(b)].detach(), self.shared.A[:, : self.inputs].detach()
        if isinstance(served, Conv1D):
            return LowRank(columns.T, (b[:, None] * rows).T, rank_factors=d)
        return LowRank(rows, columns, row_factors=b, rank_factors=d)

    def delta(self, served: nn.Module) -> Tensor:
        """L_b B L_d A, in the layout of the served weight."""
        return like_weight(served, self.shared.product(self.vera_lambda_d, self.vera_lambda_b, self.inputs))


class VeRADelta(WeightDelta):
    """W' = W + L_b B L_d A for a weight that is read, not called.

    A weight of more than two dimensions (a convolution's) counts as (out, everything else). An expert tensor
    (experts, d1, d2), in either layout, has a d (experts, rank) and a b (experts, d1).
    """

    shared: Projections

    def __init__(self, weight: Tensor, experts: int, shared: Projections, d_initial: float) -> None:
        super().__init__()
        refer(self, "shared", shared)
        *batch, outputs, self.inputs = matrices(weight, experts).shape
        self.vera_lambda_d = nn.Parameter(torch.full((*batch, len(shared.A)), d_initial))
        self.vera_lambda_b = nn.Parameter(torch.zeros(*batch, outputs))

    def low_rank(self) -> LowRank | None:
        """W + (L_b B) (L_d A)."""
        factors = self.shared.factors(self.vera_lambda_d.detach(), self.vera_lambda_b.detach(), self.inputs)
        return LowRank(*factors)

    def forward(self, weight: Tensor) -> Tensor:
        """W + L_b B L_d A."""
        delta = self.shared.product(self.vera_lambda_d, self.vera_lambda_b, self.inputs)
        return weight + delta.reshape(weight.shape).to(weight.dtype)


def _shape(backbone: Backbone, weight: Weight) -> tuple[int, int]:
    """(outputs, inputs) of the matrix, or of each of the matrices, that the weight holds."""
    if weight.called:
        outputs, inputs = linear_shape(backbone.module(weight.name))
    else:
        outputs, inputs = matrices(backbone.model.get_parameter(weight.owners[0]), weight.experts).shape[-2:]
    return outputs, inputs
