"""The weight that the codes of a stored weight stand for: what a strategy trained beside codes was trained beside.

    W -> D(Q(W)),  Q the quantization of a layer's matrix (out, in), D what its codes mean

Rows are coded apart from each other in 8 bits, and in 4 bits where a row is whole blocks of 64 weights. With double
quantization the scales of all blocks are coded together: their codes and scales (an eighth of the weight's bf16 size
and a little) are kept while the tensor is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightsft.low_rank import tiles
from lightsft.quantization import Quantization, bitsandbytes_library, dequantized, from_4_bits
from lightsft.quantizing import quantized_layer

BLOCK = 64  # weights that share a scale in 4 bits
SCALES = 256  # scales that share one, with double quantization
ROWS = 256  # that are coded together where a whole matrix is wanted
AT_ONCE = 16  # tiles that are coded together

Read = Callable[[slice], Tensor]  # rows of the stored matrix
Rows = Callable[[Tensor, slice], Tensor]  # (those rows as stored, which they are) -> what they stand for


@dataclass(frozen=True)
class Recoding:
    """Q, and whether the matrix is stored as (in, out).

    The mean of all scales depends on how many `threads` torch sums them with: as many as where the model is loaded.
    """

    how: Quantization
    transposed: bool = False
    threads: int = field(default_factory=torch.get_num_threads)

    def by_rows(self, rows: int, columns: int, read: Read) -> Rows:
        """What rows of the matrix stand for; reads the whole of it first where they depend on each other."""
        whole_blocks = columns % BLOCK == 0
        if not self.transposed and (self.how.scheme == "int8" or (whole_blocks and not self.how.double)):
            return lambda stored, part: self(stored)
        if not self.transposed and whole_blocks:
            return _DoubleCodes(self, rows, columns, read).rows
        values = self(read(slice(0, rows)))
        return lambda stored, part: values[part]

    @torch.no_grad()
    def whole(self, weight: Tensor) -> Tensor:
        """D(Q(W)), made some rows at a time where that can be: coding takes many times the memory of what is coded."""
        rows = self.by_rows(weight.shape[0], weight.shape[1], lambda part: weight[part])
        parts = (slice(start, start + ROWS) for start in range(0, len(weight), ROWS))
        return torch.cat([rows(weight[part], part) for part in parts])

    @torch.no_grad()
    def __call__(self, weight: Tensor) -> Tensor:
        """D(Q(W)), (rows, columns) as given; of 4 bits in W's type, which holds it exactly, of 8 in fp32."""
        matrix = weight.T if self.transposed else weight
        with torch.device("meta"):
            layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
        made = quantized_layer(layer, self.how, weight.dtype, weight=matrix)
        values = dequantized(made) if self.how.scheme == "int8" else from_4_bits(made)
        return values.T.contiguous() if self.transposed else values


@contextmanager
def _computing_with(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _DoubleCodes:
    """The 4-bit codes of a matrix, and what its coded scales stand for."""

    def __init__(self, recoding: Recoding, rows: int, columns: int, read: Read) -> None:
        functional = bitsandbytes_library().functional
        self.columns, self.kind = columns, recoding.how.scheme
        codes, scales = [], []
        parts = list(tiles(rows, columns))
        for first in range(0, len(parts), AT_ONCE):
            some = parts[first : first + AT_ONCE]
            stored = read(slice(some[0].start, some[-1].stop))
            packed, state = functional.quantize_4bit(stored, blocksize=BLOCK, quant_type=self.kind)
            codes.append(packed.flatten())
            scales.append(state.absmax)
        self.codes, found = torch.cat(codes), torch.cat(scales)
        with _computing_with(recoding.threads):
            mean = found.mean()
        coded, again = functional.quantize_blockwise(found - mean, blocksize=SCALES)
        self.scales: Tensor = functional.dequantize_blockwise(coded, again) + mean

    def rows(self, stored: Tensor, part: slice) -> Tensor:
        """These rows, in the type that they are stored in."""
        functional: Any = bitsandbytes_library().functional
        first, last = part.start * self.columns, part.stop * self.columns
        state = functional.QuantState(
            absmax=self.scales[first // BLOCK : last // BLOCK],
            shape=stored.shape,
            dtype=stored.dtype,
            blocksize=BLOCK,
            quant_type=self.kind,
        )
        values: Tensor = functional.dequantize_4bit(self.codes[first // 2 : last // 2].reshape(-1, 1), state)
        return values
