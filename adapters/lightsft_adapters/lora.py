"""LoRA: y = W x + s B A x, with s = alpha / rank (2106.09685, section 4.1).

Shapes: x (..., in), A (rank, in), B (out, rank), y (..., out). With rank stabilisation s = alpha / sqrt(rank)
(2312.03732). DoRA learns the length of each row too (2402.09353): y = m V x / ||V||, V = W + s B A, m (out), the
norm taken as a constant in the gradient. PiSSA (2404.02948) and OLoRA (2406.01775) start A and B from W itself and
train the difference: y = W x + s (B A - B0 A0) x, so W stays as it was.

Beside codes Q = q(W), LoftQ (2310.08659) and QPiSSA (2404.02948) start near W instead: training begins at
Q' + s B0 A0 ~ W, not at the function of the quantized backbone, which `disabled()` still gives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightsft import Backbone, Injection, injecting
from lightsft.anatomy import Weight, linear_shape
from lightsft.codes import Codes, Difference, difference
from lightsft.errors import ConfigurationError
from lightsft.low_rank import LowRank
from lightsft.originals import Originals, originals
from lightsft.primitives import Side, WeightDelta
from lightsft.quantization import is_quantized, matrix
from lightsft.seeding import generator
from lightsft.targets import by_pattern, select_parameters, select_weights
from lightsft_adapters.checks import above, at_least, one_of, probability
from lightsft_adapters.peft_lora import read_peft_config, write_peft_config
from lightsft_adapters.starts import check_rank, loftq, orthogonal, principal, qpissa
from lightsft_adapters.tied import CHOICES, resolve_tied

NEAR_W = {"loftq": "default", "qpissa": "pissa"}  # beside codes; and what they are beside a weight that has none
INITIALISATIONS = ("default", "gaussian", "pissa", "olora", *NEAR_W)


@dataclass(frozen=True)
class LoRA:
    """Low-rank updates beside linear layers and embeddings.

    rank, alpha: the size of the update and its strength, s = alpha / rank.
    dropout: on the update's input, in training.
    rank_stabilised: s = alpha / sqrt(rank), so that high ranks keep learning.
    targets: "linear" (every linear layer in the blocks), "attention", "mlp", "embedding", names, regular expressions.
    layers: only blocks with these indices; negative ones count from the end.
    rank_pattern, alpha_pattern: other values for modules whose name ends in, or matches, a key.
    initialisation: "default" (A Kaiming-uniform, B zero), "gaussian" (A normal with deviation 1/rank, B zero),
        "pissa" (the principal singular vectors of W), "olora" (its QR decomposition); on a quantized backbone "loftq"
        (what the codes lose) and "qpissa" (the principal singular vectors, and codes of the rest).
    dora: learn magnitude and direction separately.
    lora_plus_ratio: the learning rate of B over that of A (2402.12354; 16 is the paper's value).
    modules_to_save: parts of the backbone to train whole, by name; they carry no update.
    tied: what to do with a target whose weight the input or output embeddings share, since merging would change both:
        "refuse", "skip" it, or "untie" it (it gets a copy of its own, which the merged checkpoint keeps).
    loftq_steps: LoftQ's alternations. The first keeps the backbone's codes; more make other ones, which are saved.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rank_stabilised: bool = False
    targets: str | Sequence[str] = "linear"
    layers: Sequence[int] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    initialisation: str = "default"
    dora: bool = False
    lora_plus_ratio: float = 1.0
    modules_to_save: Sequence[str] = ()
    tied: str = "refuse"
    loftq_steps: int = 1

    learning_rate: ClassVar[float] = 1e-3
    search_space: ClassVar[Mapping[str, tuple[Any, ...]]] = {"rank": (4, 8, 16, 32)}

    def __post_init__(self) -> None:
        for rank in (self.rank, *self.rank_pattern.values()):
            at_least("rank", rank, 1)
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            above("alpha", alpha, 0)
        above("lora_plus_ratio", self.lora_plus_ratio, 0)
        probability("dropout", self.dropout)
        one_of("initialisation", self.initialisation, INITIALISATIONS)
        one_of("tied", self.tied, CHOICES)
        at_least("loftq_steps", self.loftq_steps, 1)
        if self.loftq_steps > 1 and self.initialisation != "loftq":
            raise ConfigurationError(
                f"loftq_steps={self.loftq_steps} with initialisation={self.initialisation!r}",
                expected="initialisation='loftq'",
            )
        if self.dora and self.initialisation not in ("default", "gaussian"):
            raise ConfigurationError(
                f"dora=True together with initialisation={self.initialisation!r}",
                expected="dora with the default or gaussian initialisation",
            )

    def inject(self, backbone: Backbone, *, seed: int = 0) -> Injection:
        """Put A and B beside every target of `backbone`."""
        exact = self._originals(backbone)
        with injecting(self, backbone, seed) as injection:
            whole = set(select_parameters(backbone, self.modules_to_save))
            for weight in select_weights(backbone, self.targets, layers=self.layers):
                if backbone.anatomy.idle.intersection(weight.owners):
                    injection.skip([weight.name])
                elif not whole.intersection(weight.owners):
                    served = resolve_tied(injection, weight, self.tied)
                    if served is not None:
                        self._place(injection, served, seed, exact)
            injection.unfreeze(whole)
        if self.targets == "linear" and self.layers is None:
            injection.report_coverage()
        return injection

    def write_peft_config(self, injection: Injection, directory: Path) -> None:
        """PEFT's configuration, so that PeftModel.from_pretrained opens the folder."""
        write_peft_config(self, injection, directory)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LoRA | None:
        """The LoRA in a PEFT folder."""
        options = read_peft_config(config, tensors)
        return None if options is None else cls(**options)

    def rank_of(self, name: str) -> int:
        """The rank for the module `name`."""
        return int(by_pattern(name, self.rank_pattern.items(), self.rank))

    def alpha_of(self, name: str) -> float:
        """The alpha for the module `name`."""
        return by_pattern(name, self.alpha_pattern.items(), self.alpha)

    @property
    def makes_codes(self) -> bool:
        """Whether it puts codes of its own in place of a quantized layer's."""
        return self.initialisation == "qpissa" or self.loftq_steps > 1

    def _originals(self, backbone: Backbone) -> Originals | None:
        """The weights that the codes were made of, if this start is near them; a folder's values need none."""
        if self.initialisation not in NEAR_W:
            return None
        if backbone.quantization is None and (self.makes_codes or not backbone.restoring):
            raise ConfigurationError(
                f"initialisation={self.initialisation!r} on a backbone that is not quantized",
                expected="codes, which lose something that it can start from",
                todo="take 'pissa' or 'olora', or Backbone.load(path, quantization='nf4')",
            )
        return None if backbone.restoring else originals(backbone)

    def _place(self, injection: Injection, weight: Weight, seed: int, exact: Originals | None) -> None:
        """A side where a linear layer or an embedding is called, a delta on the weight everywhere else."""
        rank, alpha = self.rank_of(weight.name), self.alpha_of(weight.name)
        scaling = alpha / (math.sqrt(rank) if self.rank_stabilised else rank)
        random = generator(seed, weight.name)
        if weight.embedding:
            self._check_embedding(weight)
            served: Any = injection.backbone.module(weight.name)
            injection.add_side(weight.name, LoRAEmbeddingSide(served, rank, scaling, random))
        elif weight.called:
            served = injection.backbone.module(weight.name)
            side = self._side(served, rank, scaling, random)
            if exact is not None and is_quantized(served):
                self._start_near(side, served, exact(weight.name))
            injection.add_side(weight.name, side)
        else:
            injection.add_delta(weight, self._delta(injection.backbone, weight, rank, scaling, random))

    def _side(self, served: nn.Module, rank: int, scaling: float, random: torch.Generator) -> LoRASide:
        options = {"dropout": self.dropout, "lora_plus_ratio": self.lora_plus_ratio}
        if self.dora:
            return DoRASide(served, rank, scaling, self.initialisation, random, **options)
        if is_quantized(served) and self.makes_codes:
            return RecodedLoRASide(served, rank, scaling, "default", random, **options)
        start = "default" if is_quantized(served) and self.initialisation in NEAR_W else self._start
        if start in ("pissa", "olora"):
            return ResidualLoRASide(served, rank, scaling, start, random, **options)
        return LoRASide(served, rank, scaling, start, random, **options)

    @property
    def _start(self) -> str:
        """The initialisation beside a weight in floating point."""
        return NEAR_W.get(self.initialisation, self.initialisation)

    def _start_near(self, side: LoRASide, served: nn.Module, exact: Tensor) -> None:
        """Q' + s B A ~ W."""
        rank = side.lora_A.weight.shape[0]
        check_rank(rank <= min(exact.shape), rank, self.initialisation, exact)
        if self.initialisation == "qpissa":
            side.start(*qpissa(served, exact, rank, side.scaling))
        else:
            side.start(*loftq(served, exact, rank, side.scaling, self.loftq_steps))

    def _delta(
        self, backbone: Backbone, weight: Weight, rank: int, scaling: float, random: torch.Generator
    ) -> LoRADelta:
        kind = DoRADelta if self.dora else LoRADelta
        parameter = backbone.model.get_parameter(weight.owners[0])
        return kind(parameter, weight.experts, rank, scaling, self._start, random, self.lora_plus_ratio)

    def _check_embedding(self, weight: Weight) -> None:
        if self.dora or self._start in ("pissa", "olora"):
            raise ConfigurationError(
                f"{'dora' if self.dora else self.initialisation} on the embedding {weight.name}",
                expected="a plain LoRA on embeddings",
                todo="leave the embedding out of the targets",
            )


class LoRASide(Side):
    """s B A x beside a linear layer. A and B are fp32 and cast to the activation's type, never the reverse."""

    mergeable = True

    def __init__(
        self,
        served: nn.Module,
        rank: int,
        scaling: float,
        initialisation: str,
        random: torch.Generator,
        *,
        dropout: float = 0.0,
        lora_plus_ratio: float = 1.0,
    ) -> None:
        super().__init__()
        outputs, inputs = linear_shape(served)
        self.scaling, self.lora_plus_ratio = scaling, lora_plus_ratio
        self.lora_A = nn.Linear(inputs, rank, bias=False, dtype=torch.float32)
        self.lora_B = nn.Linear(rank, outputs, bias=False, dtype=torch.float32)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        nn.init.zeros_(self.lora_B.weight)
        if initialisation == "gaussian":
            nn.init.normal_(self.lora_A.weight, std=1 / rank, generator=random)
        else:
            nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5), generator=random)

    @torch.no_grad()
    def start(self, b: Tensor, a: Tensor, codes: Codes | None = None) -> None:
        """Start from these factors; `codes` are for those that have a place for them."""
        assert codes is None
        self.lora_B.weight.copy_(b)
        self.lora_A.weight.copy_(a)

    def update(self, inputs: Tensor) -> Tensor:
        """s B A x."""
        a, b = self.lora_A.weight.to(inputs.dtype), self.lora_B.weight.to(inputs.dtype)
        low: Tensor = nn.functional.linear(self.dropout(inputs), a)
        return nn.functional.linear(low, b) * self.scaling

    def forward(self, served: nn.Module, inputs: Tensor, output: Tensor) -> Tensor:
        """Y + s B A x."""
        return output + self.update(inputs).to(output.dtype)

    def matrix_delta(self) -> Tensor:
        """s B A, (out, in)."""
        return (self.lora_B.weight @ self.lora_A.weight) * self.scaling

    def delta(self, served: nn.Module) -> Tensor:
        """The matrix delta, in the layout of the served weight."""
        return like_weight(served, self.matrix_delta())

    def factors(self) -> tuple[Tensor, Tensor]:
        """(B, A) of the matrix delta."""
        return self.lora_B.weight.detach(), self.lora_A.weight.detach()

    def low_rank(self, served: nn.Module) -> LowRank | None:
        """W + s B A, as W is stored."""
        b, a = self.factors()
        return LowRank(a.T * self.scaling, b.T) if isinstance(served, Conv1D) else LowRank(b * self.scaling, a)

    def learning_rate_ratio(self, name: str) -> float:
        """LoRA+: B learns faster."""
        return self.lora_plus_ratio if name.startswith("lora_B") else 1.0


class ResidualLoRASide(LoRASide):
    """y + s (B A - B0 A0) x, with B0 A0 the start taken from W: PiSSA and OLoRA without touching W.

    Saved as one LoRA of twice the rank, A stacked on A0 and B beside -B0, which any LoRA reader understands.
    """

    initial_A: Tensor
    initial_B: Tensor

    def __init__(
        self,
        served: nn.Module,
        rank: int,
        scaling: float,
        initialisation: str,
        random: torch.Generator,
        *,
        dropout: float = 0.0,
        lora_plus_ratio: float = 1.0,
    ) -> None:
        super().__init__(served, rank, scaling, "default", random, dropout=dropout, lora_plus_ratio=lora_plus_ratio)
        decompose = principal if initialisation == "pissa" else orthogonal
        b, a = decompose(matrix(served).float().cpu(), rank, scaling)
        check_rank(a.shape == self.lora_A.weight.shape, rank, initialisation, matrix(served))
        with torch.no_grad():
            self.lora_A.weight.copy_(a)
            self.lora_B.weight.copy_(b)
        self.register_buffer("initial_A", a.clone(), persistent=False)
        self.register_buffer("initial_B", b.clone(), persistent=False)

    def update(self, inputs: Tensor) -> Tensor:
        """s (B A - B0 A0) x."""
        start = nn.functional.linear(self.dropout(inputs), self.initial_A.to(inputs.dtype))
        start = nn.functional.linear(start, self.initial_B.to(inputs.dtype)) * self.scaling
        return super().update(inputs) - start

    def matrix_delta(self) -> Tensor:
        """s (B A - B0 A0)."""
        return super().matrix_delta() - (self.initial_B @ self.initial_A) * self.scaling

    def factors(self) -> tuple[Tensor, Tensor]:
        """Of twice the rank: (B beside -B0, A on A0)."""
        b, a = super().factors()
        return torch.cat([b, -self.initial_B], dim=1), torch.cat([a, self.initial_A])

    def tensors(self) -> dict[str, Tensor]:
        """One LoRA of twice the rank."""
        b, a = self.factors()
        return {"lora_A.weight": a, "lora_B.weight": b}

    def shapes(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        """Twice the rank, or the bare A and B of a PEFT folder, whose start is then the one computed here."""
        (rank, inputs), outputs = self.lora_A.weight.shape, self.lora_B.weight.shape[0]
        return {
            "lora_A.weight": ((2 * rank, inputs), (rank, inputs)),
            "lora_B.weight": ((outputs, 2 * rank), (outputs, rank)),
        }

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Split the doubled LoRA again."""
        rank = self.lora_A.weight.shape[0]
        a, b = tensors["lora_A.weight"], tensors["lora_B.weight"]
        self.lora_A.weight.copy_(a[:rank])
        self.lora_B.weight.copy_(b[:, :rank])
        if a.shape[0] == 2 * rank:
            self.initial_A.copy_(a[rank:])
            self.initial_B.copy_(-b[:, rank:])


class RecodedLoRASide(LoRASide):
    """y = Q x + (Q' - Q) x + s B A x: other codes Q' in place of the layer's Q, which stay where they are.

    It costs the memory of the codes once more, and a product. Saved are Q', beside A and B.
    """

    def __init__(self, served: nn.Module, *args: Any, **options: Any) -> None:
        super().__init__(served, *args, **options)
        self.own, self.recoded = Codes(served), Codes.made_of(matrix(served), served)

    def start(self, b: Tensor, a: Tensor, codes: Codes | None = None) -> None:
        """Start from these factors and codes."""
        super().start(b, a)
        assert codes is not None
        self.recoded = codes

    def update(self, inputs: Tensor) -> Tensor:
        """(Q' - Q) x + s B A x."""
        other: Tensor = Difference.apply(inputs, self.recoded, self.own)  # type: ignore[no-untyped-call]
        return other + super().update(inputs)

    def matrix_delta(self) -> Tensor:
        """Q' - Q + s B A."""
        return difference(self.recoded, self.own) + super().matrix_delta()

    def low_rank(self, served: nn.Module) -> LowRank | None:
        """Q' - Q is of full rank."""
        return None

    def tensors(self) -> dict[str, Tensor]:
        """The factors, codes and scales."""
        return {**super().tensors(), "codes": self.recoded.codes, "scales": self.recoded.scales}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take all of them back."""
        super().load(tensors)
        self.recoded.codes.copy_(tensors["codes"])
        self.recoded.scales.copy_(tensors["scales"])


class DoRASide(LoRASide):
    """y = m V x / ||V||, V = W + s B A; the bias is added after."""

    def __init__(self, served: nn.Module, *args: Any, **options: Any) -> None:
        super().__init__(served, *args, **options)
        self.lora_magnitude_vector = nn.Parameter(torch.linalg.norm(matrix(served).float(), dim=1))

    def _scale(self, served: nn.Module) -> Tensor:
        """M / ||W + s B A|| per output row, (out); the norm is a constant in the gradient (section 4.3)."""
        directions = matrix(served).float() + self.matrix_delta().detach()
        scale: Tensor = self.lora_magnitude_vector / torch.linalg.norm(directions, dim=1)
        return scale

    def forward(self, served: nn.Module, inputs: Tensor, output: Tensor) -> Tensor:
        """(y - bias + s B A x) m / ||V|| + bias."""
        bias = getattr(served, "bias", None)
        scale = self._scale(served).to(output.dtype)
        linear = output if bias is None else output - bias
        result = (linear + self.update(inputs).to(output.dtype)) * scale
        return result if bias is None else result + bias

    def low_rank(self, served: nn.Module) -> LowRank | None:
        """With the magnitude; the columns of a transpose are not normed by rows."""
        if isinstance(served, Conv1D):
            return None
        b, a = self.factors()
        return LowRank(b * self.scaling, a, self.lora_magnitude_vector.detach())

    def delta(self, served: nn.Module) -> Tensor:
        """M V / ||V|| - W."""
        weight = matrix(served).float()
        scaled = (weight + self.matrix_delta()) * self._scale(served)[:, None]
        return like_weight(served, scaled - weight)


class LoRADelta(WeightDelta):
    """W' = W + s B A for a weight that is read, not called.

    A weight of more than two dimensions (a convolution's) counts as (out, everything else). An expert tensor
    (experts, d1, d2), in either layout, has a pair for each expert: A (experts, rank, d2), B (experts, d1, rank).
    """

    def __init__(
        self,
        weight: Tensor,
        experts: int,
        rank: int,
        scaling: float,
        initialisation: str,
        random: torch.Generator,
        lora_plus_ratio: float = 1.0,
    ) -> None:
        super().__init__()
        self.experts, self.scaling, self.lora_plus_ratio = experts, scaling, lora_plus_ratio
        *batch, outputs, inputs = self.matrices(weight).shape
        self.lora_A = _Factor(torch.empty(*batch, rank, inputs))
        self.lora_B = _Factor(torch.zeros(*batch, outputs, rank))
        if initialisation == "gaussian":
            nn.init.normal_(self.lora_A.weight, std=1 / rank, generator=random)
        elif initialisation == "default":  # Kaiming-uniform with a = sqrt(5): bounded by 1 / sqrt(inputs)
            nn.init.uniform_(self.lora_A.weight, -1 / math.sqrt(inputs), 1 / math.sqrt(inputs), generator=random)
        else:
            self._start_from(weight, initialisation)

    def _start_from(self, weight: Tensor, initialisation: str) -> None:
        """PiSSA or OLoRA: the start is kept and taken off again, so that W stays as it was."""
        decompose = principal if initialisation == "pissa" else orthogonal
        rank = self.lora_A.weight.shape[-2]
        b, a = decompose(self.matrices(weight.detach()).float().cpu(), rank, self.scaling)
        check_rank(a.shape == self.lora_A.weight.shape, rank, initialisation, weight)
        with torch.no_grad():
            self.lora_A.weight.copy_(a)
            self.lora_B.weight.copy_(b)
        self.initial_A = nn.Parameter(a.clone(), requires_grad=False)
        self.initial_B = nn.Parameter(b.clone(), requires_grad=False)

    def matrices(self, weight: Tensor) -> Tensor:
        """The weight as (out, in), or (experts, d1, d2)."""
        return matrices(weight, self.experts)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(B, A), or of twice the rank (B beside -B0, A on A0)."""
        b, a = self.lora_B.weight.detach(), self.lora_A.weight.detach()
        if hasattr(self, "initial_A"):
            b, a = torch.cat([b, -self.initial_B.detach()], dim=-1), torch.cat([a, self.initial_A.detach()], dim=-2)
        return b, a

    def low_rank(self) -> LowRank | None:
        """W + s B A."""
        b, a = self.factors()
        return LowRank(b * self.scaling, a)

    def delta(self) -> Tensor:
        """s B A, or s (B A - B0 A0), in the shape of `matrices`."""
        product: Tensor = self.lora_B.weight @ self.lora_A.weight
        if hasattr(self, "initial_A"):
            product = product - self.initial_B @ self.initial_A
        result: Tensor = product * self.scaling
        return result

    def forward(self, weight: Tensor) -> Tensor:
        """W + s B A."""
        return weight + self.delta().reshape(weight.shape).to(weight.dtype)

    def learning_rate_ratio(self, name: str) -> float:
        """LoRA+: B learns faster."""
        return self.lora_plus_ratio if name.startswith("lora_B") else 1.0


class DoRADelta(LoRADelta):
    """W' = m V / ||V||, V = W + s B A, with a norm for each row of each matrix."""

    def __init__(self, weight: Tensor, *args: Any, **options: Any) -> None:
        super().__init__(weight, *args, **options)
        norms = torch.linalg.norm(self.matrices(weight.detach()).float(), dim=-1)
        self.lora_magnitude_vector = nn.Parameter(norms)

    def low_rank(self) -> LowRank | None:
        """With the magnitude."""
        b, a = self.factors()
        return LowRank(b * self.scaling, a, self.lora_magnitude_vector.detach())

    def forward(self, weight: Tensor) -> Tensor:
        """M V / ||V||; the norm is a constant in the gradient."""
        directions = self.matrices(weight).float() + self.delta()
        scale: Tensor = self.lora_magnitude_vector / torch.linalg.norm(directions.detach(), dim=-1)
        changed: Tensor = directions * scale.unsqueeze(-1)
        return changed.reshape(weight.shape).to(weight.dtype)


class _Factor(nn.Module):
    """One trained matrix, so that it is called `lora_A.weight` like every other."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class LoRAEmbeddingSide(Side):
    """y = E[ids] + s (B A)[:, ids]^T beside an embedding: A (rank, vocabulary), starting at zero, B (size, rank)."""

    mergeable = True

    def __init__(self, served: nn.Embedding, rank: int, scaling: float, random: torch.Generator) -> None:
        super().__init__()
        self.scaling = scaling
        self.lora_embedding_A = nn.Parameter(torch.zeros(rank, served.num_embeddings))
        self.lora_embedding_B = nn.Parameter(torch.empty(served.embedding_dim, rank).normal_(generator=random))

    def forward(self, served: nn.Module, inputs: Tensor, output: Tensor) -> Tensor:
        """The ids are `inputs`, (batch, length)."""
        padding = getattr(served, "padding_idx", None)  # its row gets no gradient, as in the served embedding
        low = nn.functional.embedding(inputs, self.lora_embedding_A.T, padding_idx=padding)
        return output + (low @ self.lora_embedding_B.T * self._scale_of(served)).to(output.dtype)

    def _scale_of(self, served: nn.Module) -> float:
        """Some embeddings multiply what they look up (Gemma): the update is multiplied alike."""
        return self.scaling * float(getattr(served, "scalar_embed_scale", 1.0))

    def low_rank(self, served: nn.Module) -> LowRank | None:
        """E + s A^T B^T."""
        return LowRank(self.lora_embedding_A.detach().T * self.scaling, self.lora_embedding_B.detach().T)

    def delta(self, served: nn.Module) -> Tensor:
        """s A^T B^T, (vocabulary, size)."""
        return (self.lora_embedding_B @ self.lora_embedding_A).T * self.scaling


def like_weight(served: nn.Module, matrix_delta: Tensor) -> Tensor:
    """A (out, in) matrix in the layout of the served weight."""
    return matrix_delta.T if isinstance(served, Conv1D) else matrix_delta


def matrices(weight: Tensor, experts: int) -> Tensor:
    """A weight that is read: (out, everything else), or an expert tensor (experts, d1, d2) as it is."""
    return weight if experts else weight.flatten(1)
