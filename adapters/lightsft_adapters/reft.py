"""LoReFT: h <- h + R^T (W h + b - R h) on the residual stream, at some positions (2404.03592).

Shapes: h (..., size), R (rank, size) with orthonormal rows, W (rank, size), b (rank). R is made of a free matrix P
(size, rank) by its decomposition P = Q T, T upper triangular with a positive diagonal: R = Q^T. W starts as R and b at
zero, so training starts from the backbone's own function.

Positions count the prompt's tokens: "f7+l7" are its first 7 and last 7. What the prompt is, in training
and in generation: `lightsft_adapters.prompt_reader`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightsft import Backbone, Injection, injecting
from lightsft.anatomy import CONVOLUTIONS, is_within
from lightsft.errors import ConfigurationError, TargetError
from lightsft.primitives import Side
from lightsft.primitives.standalone import Standalone
from lightsft.seeding import generator
from lightsft.standalone.edits import Edits
from lightsft.targets import resolve_layers
from lightsft_adapters.checks import at_least, probability
from lightsft_adapters.prompt_reader import PromptReader, prompt_reader
from lightsft_adapters.shared import refer

ALL = "all"


@dataclass(frozen=True)
class ReFT:
    """Edits of the residual stream after each block, within a small subspace.

    rank: of the subspace.
    positions: "f7+l7" (the first 7 and the last 7 tokens of the prompt), "f7", "l7", or "all" (every token, generated
        ones too). In an encoder-decoder the prompt is what the encoder reads: its blocks are edited, and with "all"
        the decoder's as well. In a short prompt each token belongs to the nearer end.
    tied_weights: one edit for both ends; otherwise each end has its own.
    dropout: on the edit, in training.
    layers: only blocks with these indices; negative ones count from the end.
    """

    rank: int = 8
    positions: str = "f7+l7"
    tied_weights: bool = True
    dropout: float = 0.0
    layers: Sequence[int] | None = None

    learning_rate: ClassVar[float] = 4e-3  # measured on the demo; the authors' commands for LLaMA-7B have 9e-4
    search_space: ClassVar[Mapping[str, tuple[Any, ...]]] = {"rank": (2, 4, 8, 16)}

    def __post_init__(self) -> None:
        at_least("rank", self.rank, 1)
        probability("dropout", self.dropout)
        if self.positions != ALL and not any(self._ends()):
            raise ConfigurationError(
                f"positions={self.positions!r}", expected="'all', or numbers of tokens such as 'f7+l7', 'f1' or 'l4'"
            )

    def inject(self, backbone: Backbone, *, seed: int = 0) -> Injection:
        """Put an edit on each chosen block of `backbone`."""
        with injecting(self, backbone, seed) as injection:
            sites = list(self._sites(backbone))
            if not sites:
                raise TargetError(
                    f"no residual stream to edit in {type(backbone.model).__name__}",
                    expected="blocks that are called with hidden states and return them",
                    todo="use another strategy",
                )
            injection.skip(block for block in self._blocks(backbone) if block not in {site.block for site in sites})
            reader = None if self.positions == ALL else prompt_reader(injection)
            for site in sites:
                side = LoReFTSide(site, self, self._ends(), reader, generator(seed, site.block))
                injection.add_side(site.block, side)
        return injection

    def _ends(self) -> tuple[int, int]:
        """How many of the first and of the last tokens; (0, 0) of something else."""
        found = re.fullmatch(r"(?:f(\d+))?(?:(?:^|(?<=\d)\+)l(\d+))?", self.positions)
        return (0, 0) if found is None else (int(found[1] or 0), int(found[2] or 0))

    def _blocks(self, backbone: Backbone) -> list[str]:
        """The chosen blocks of the stacks with a residual stream: not those of convolutions that only read sound."""
        anatomy, encoder = backbone.anatomy, self._encoder(backbone)
        writers = () if anatomy.trace is None else anatomy.trace.writers
        stacks = [stack for stack in anatomy.blocks if is_within(stack[0], encoder)] or list(anatomy.blocks)
        stacks = [s for s in stacks if any(is_within(writer, block) for writer in writers for block in s)] or stacks
        blocks = [block for stack in stacks for block in stack]
        if self.layers is None:
            return blocks
        wanted = resolve_layers(anatomy.depth, self.layers)
        return [block for block in blocks if anatomy.block_of(block) in wanted]

    def _encoder(self, backbone: Backbone) -> str:
        """Where the prompt is read: the encoder of an encoder-decoder, else the whole model."""
        if self.positions == ALL or not backbone.model.config.is_encoder_decoder:
            return ""
        encoder = backbone.model.get_encoder()
        return next((name for name, module in backbone.model.named_modules() if module is encoder), "")

    def _sites(self, backbone: Backbone) -> Iterator[Site]:
        seen = backbone.anatomy.trace
        ids = (backbone.example or {}).get("input_ids")
        for block in self._blocks(backbone):
            if seen is not None and block in seen.calls and len(seen.calls[block].output_shape) > 2:
                module, shape = backbone.module(block), seen.calls[block].output_shape
                yield Site.of(block, module, shape, tokens=0 if ids is None else ids.shape[-1])


@dataclass(frozen=True)
class Site:
    """Where in a block's output the features, the rows of a batch and the tokens lie.

    `axis`: of the features, 1 after a convolution, else the last. Counted without it, `batch` and `token` are the axes
    of rows and tokens; `token` is None where all axes but the batch are (an image). Others are parallel streams.
    """

    block: str
    size: int
    axis: int
    batch: int
    token: int | None

    @classmethod
    def of(cls, block: str, module: nn.Module, shape: tuple[int, ...], tokens: int) -> Site:
        """From the shape of its output for a batch of one, and the number of tokens there were."""
        channels = {part.out_channels for part in module.modules() if isinstance(part, CONVOLUTIONS)}
        widths = {part.out_features for part in module.modules() if isinstance(part, nn.Linear)}
        axis = 1 if shape[1] in channels and (len(shape) == 4 or shape[-1] not in channels | widths) else -1
        others = list(shape)
        size = others.pop(axis)
        token = others.index(tokens) if tokens in others else None
        batch = next((index for index, length in enumerate(others) if length == 1 and index != token), 0)
        if token is None and len(others) == 2:
            token = 1 - batch
        return cls(block, size, axis, batch, token)

    def count(self, states: Tensor) -> tuple[int, int]:
        """(rows, tokens) of a block's output with its features last."""
        rows, length = states.shape[self.batch], states.shape[:-1].numel() // states.shape[self.batch]
        return rows, length if self.token is None else states.shape[self.token]

    def spread(self, place: Tensor, states: Tensor) -> Tensor:
        """What is known of each token (rows or 1, tokens), to be multiplied with `states`."""
        if self.token is None:
            return place.reshape(len(place), *states.shape[1:-1], 1)
        shape = [1] * states.ndim
        shape[self.batch], shape[self.token] = place.shape
        return (place.T if self.token < self.batch else place).reshape(shape)


class LoReFTSide(Side):
    """The edit of one block's output: one subspace, or one for each end of the prompt."""

    reader: PromptReader | None

    def __init__(
        self, site: Site, options: ReFT, ends: tuple[int, int], reader: PromptReader | None, random: torch.Generator
    ) -> None:
        super().__init__()
        if options.rank > site.size:
            raise ConfigurationError(
                f"rank={options.rank} in a residual stream of width {site.size}",
                expected=f"a rank of at most {site.size}",
            )
        refer(self, "reader", reader)
        self.site, self.ends = site, ends
        self.edits = nn.ModuleList(
            Subspace(options.rank, site.size, random) for _ in range(1 if options.tied_weights or 0 in ends else 2)
        )
        self.dropout = nn.Dropout(options.dropout) if options.dropout else nn.Identity()

    def forward(self, served: nn.Module, inputs: Tensor, output: Tensor) -> Tensor:
        """H + R^T (W h + b - R h) at the chosen positions, h elsewhere."""
        states = output.movedim(self.site.axis, -1)
        places = self._places(served, inputs, states)
        if places is None:
            return output
        changes = [edit(states, place) for edit, place in zip(self.edits, places, strict=True)]
        change: Tensor = self.dropout(sum(changes[1:], start=changes[0]))
        return output + change.movedim(-1, self.site.axis).to(output.dtype)

    @torch.no_grad()
    def standalone(self) -> Standalone:
        """The same with R and W - R as they are now."""
        site, tensors, rank = self.site, dict[str, Tensor](), 0
        for number, edit in enumerate(self.edits):
            assert isinstance(edit, Subspace)
            rotation, rank = edit.rotation(), len(edit.bias)
            made = {"rotation": rotation, "rest": edit.weight - rotation, "bias": edit.bias}
            tensors |= {f"edits.{number}.{name}": tensor.detach().contiguous() for name, tensor in made.items()}
        options: dict[str, Any] = {"rank": rank, "size": site.size, "number": len(self.edits)}
        options |= {"ends": None if self.reader is None else list(self.ends)}
        options |= {"axis": site.axis, "batch": site.batch, "token": site.token}
        return Standalone(Edits, options, tensors)

    def _places(self, served: nn.Module, inputs: Tensor, states: Tensor) -> list[Tensor | None] | None:
        """For each edit what is true where it applies, None for everywhere; or None if none applies anywhere."""
        if self.reader is None:
            return [None]
        prompt = self.reader.prompt(served, inputs, *self.site.count(states))
        if prompt is None:
            return None
        first, last = ends_of(prompt, *self.ends)
        chosen = [first | last] if len(self.edits) == 1 else [first, last]
        return [self.site.spread(place, states) for place in chosen]


class Subspace(nn.Module):
    """R, W and b of one edit, fp32; cast to the type of h, never the reverse."""

    def __init__(self, rank: int, size: int, random: torch.Generator) -> None:
        super().__init__()
        self.basis = nn.Parameter(nn.init.orthogonal_(torch.empty(size, rank), generator=random))
        self.weight = nn.Parameter(self.rotation().detach().clone())
        self.bias = nn.Parameter(torch.zeros(rank))

    def rotation(self) -> Tensor:
        """R (rank, size): P's columns, orthonormalised one after the other."""
        q, t = torch.linalg.qr(self.basis)
        rotation: Tensor = (q * t.diagonal().sign()).T
        return rotation

    def forward(self, states: Tensor, place: Tensor | None) -> Tensor:
        """R^T (W h + b - R h) where `place` is true, zero elsewhere."""
        rotation = self.rotation()
        low = nn.functional.linear(states, (self.weight - rotation).to(states.dtype), self.bias.to(states.dtype))
        if place is not None:
            low = low * place
        return low @ rotation.to(states.dtype)


def ends_of(prompt: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
    """(the first tokens of the prompt, the last ones), each (batch, length); no token is both."""
    index, count = prompt.cumsum(1) - 1, prompt.sum(1, keepdim=True)
    among_first, among_last = prompt & (index < first), prompt & (index >= count - last)
    nearer_first = 2 * index < count
    among_first = among_first & (nearer_first | ~among_last)
    return among_first, among_last & ~among_first
