"""What leaves the frozen first blocks of a backbone, computed once per example instead of once per pass.

h = block_k(... block_1(embeddings(x))) depends on the example alone where nothing below is trained or left to chance.
The first pass over an example computes h without a gradient and keeps it, in memory up to a share of it, then in files
that have no name. In later passes the first k blocks are not run: each returns the kept h, and the model goes on from
there with its own code.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from lightsft.dry_run import evaluating
from lightsft.primitives.side import first_output, with_first_output
from lightsft.tasks.base import Feature, Task

ROWS = "_rows"  # in a batch: the numbers of its examples
MEMORY_SHARE = 0.1  # of the machine's memory, for what is kept
DISK_SHARE = 0.5  # of the free space, beyond that

Forward = Callable[..., Any]


class Enough(Exception):
    """Ends a forward pass of which nothing more is wanted."""


@contextlib.contextmanager
def forwards(blocks: Sequence[nn.Module], make: Callable[[Forward], Forward]) -> Iterator[None]:
    """Within it the `forward` of each block is what `make` makes of it, however the model calls the block."""
    before = [block.__dict__.get("forward") for block in blocks]
    for block in blocks:
        block.__dict__["forward"] = make(block.forward)
    try:
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            del block.__dict__["forward"]
            if own is not None:
                block.__dict__["forward"] = own


@contextlib.contextmanager
def watched(block: nn.Module, *, stop: bool = False) -> Iterator[list[Any]]:
    """The outputs of the block's calls; with `stop`, the pass ends with the first."""
    seen: list[Any] = []

    def make(forward: Forward) -> Forward:
        def noted(*args: Any, **options: Any) -> Any:
            seen.append(forward(*args, **options))
            if stop:
                raise Enough
            return seen[-1]

        return noted

    with forwards([block], make), contextlib.suppress(Enough):
        yield seen


def mask_of(inputs: Mapping[str, Any], states: Tensor) -> Tensor | None:
    """Which positions of the states are real, where the batch says so: (rows, length)."""
    mask = inputs.get("attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.shape == states.shape[:2] else None


class Kept:
    """Tensors by number: in memory up to `limit` bytes, then in files below `directory`, then not at all."""

    def __init__(self, directory: Path, limit: int | None = None) -> None:
        self.directory = directory
        self.limit = int(MEMORY_SHARE * psutil.virtual_memory().total) if limit is None else limit
        self.in_memory = self.in_files = 0  # bytes
        self._found: dict[int, Tensor] = {}

    def __contains__(self, number: int) -> bool:
        return number in self._found

    def __getitem__(self, number: int) -> Tensor:
        return self._found[number]

    def keep(self, numbers: Sequence[int], tensors: Sequence[Tensor]) -> None:
        """Keep copies on the CPU; where there is no room, none is kept."""
        place = self._room(sum(tensor.numel() for tensor in tensors), tensors[0].dtype)
        if place is None:
            return
        pieces = place.split([tensor.numel() for tensor in tensors])
        for number, piece, tensor in zip(numbers, pieces, tensors, strict=True):
            self._found[number] = piece.view(tensor.shape).copy_(tensor)

    def _room(self, numbers: int, dtype: torch.dtype) -> Tensor | None:
        """An uninitialised vector of so many numbers."""
        size = numbers * dtype.itemsize
        if self.in_memory + size <= self.limit:
            self.in_memory += size
            return torch.empty(numbers, dtype=dtype)
        self.directory.mkdir(parents=True, exist_ok=True)
        if size > DISK_SHARE * shutil.disk_usage(self.directory).free:
            return None
        self.in_files += size
        with tempfile.NamedTemporaryFile(dir=self.directory, delete=False) as file:
            path = Path(file.name)
        place = torch.from_file(str(path), shared=True, size=numbers, dtype=dtype)
        with contextlib.suppress(OSError):  # mapped files can be without a name, where the system lets them
            path.unlink()
        return place


class FrozenCache:
    """The states that leave `blocks`, the frozen first ones of `model`, for `features`, which are known by identity.

    output: what the last of them returns, with anything in the place of the states. wants_gradient: whether the states
    require a gradient in a plain pass, where layers ask for one without anything being trained below.
    """

    def __init__(
        self,
        model: Any,
        task: Task,
        blocks: Sequence[nn.Module],
        output: Any,
        *,
        features: Iterable[Feature],
        wants_gradient: bool,
        kept: Kept,
    ) -> None:
        self.model, self.task, self.blocks, self.output = model, task, tuple(blocks), output
        self.wants_gradient, self.kept = wants_gradient, kept
        self._features = list(features)  # held, so that an identity is not given again
        self._numbers = {id(feature): number for number, feature in enumerate(self._features)}

    def rows_of(self, features: Sequence[Feature]) -> Tensor | None:
        """The numbers of a batch's examples; None where one is not known."""
        numbers = [self._numbers.get(id(feature), -1) for feature in features]
        return None if min(numbers, default=-1) < 0 else torch.tensor(numbers)

    @contextlib.contextmanager
    def passing(self, rows: Tensor | None, inputs: Mapping[str, Any], labels: Tensor) -> Iterator[None]:
        """Within it a forward pass on this batch begins behind the frozen blocks; with unknown rows, as ever."""
        if rows is None:
            yield
            return
        states = self._states(rows.tolist(), inputs, labels)
        if torch.is_grad_enabled():
            states.requires_grad_(self.wants_gradient)
        with forwards(self.blocks, lambda forward: lambda *args, **options: with_first_output(self.output, states)):
            yield

    def _states(self, rows: list[int], inputs: Mapping[str, Any], labels: Tensor) -> Tensor:
        if not all(number in self.kept for number in rows):
            return self._computed(rows, inputs, labels)
        mask, kept = inputs.get("attention_mask"), [self.kept[number] for number in rows]
        if kept[0].ndim == 2 and mask is not None:  # (tokens, size) each
            states = kept[0].new_zeros((*mask.shape, kept[0].shape[-1]))
            states[mask.bool().cpu()] = torch.cat(kept)
        else:
            states = torch.stack(kept)
        return states.to(labels.device)

    def _computed(self, rows: list[int], inputs: Mapping[str, Any], labels: Tensor) -> Tensor:
        """The states of a batch by the frozen part alone, in evaluation mode; they are kept."""
        with torch.no_grad(), evaluating(self.model), watched(self.blocks[-1], stop=True) as seen:
            self.task.forward(self.model, inputs, labels)
        states = first_output(seen[0]).detach()
        mask = mask_of(inputs, states)
        each = list(states) if mask is None else [row[real] for row, real in zip(states, mask, strict=True)]
        self.kept.keep(rows, each)
        return states
