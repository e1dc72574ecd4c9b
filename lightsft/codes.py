"""Codes of a quantized matrix apart from the layer they serve: held, moved and saved by something else.

    W_ij = table[code_ij] scale_block(ij)   4 bits: nf4, fp4
    W_ij = code_ij scale_i / 127            int8

Doubly quantized scales are held as the fp32 numbers that they stand for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightsft.errors import ConfigurationError
from lightsft.plain_layers import plain_layer
from lightsft.quantization import Quantization, describe
from lightsft.quantizing import quantized_layer


class Codes(nn.Module):
    """The codes (out in / 2 bytes, or out x in of int8) and scales of a layer that bitsandbytes quantized.

    They are the layer's own tensors, not copies. Raises ConfigurationError for any other format.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, layer: Any) -> None:
        super().__init__()
        how = Quantization.parse(describe(layer))
        if how is None:
            raise ConfigurationError(
                f"new codes for a layer stored as {describe(layer) or 'floating point'}",
                expected="one that bitsandbytes quantized (int8, nf4, fp4)",
                todo="initialisation='loftq' with one step keeps the codes as they are",
            )
        self.how = Quantization(how.scheme)
        self.shape = (int(layer.out_features), int(layer.in_features))
        self.dtype, self.block = torch.float32, 0
        codes = layer.weight.data
        if how.scheme == "int8":
            codes = codes if codes.dtype == torch.int8 else layer.state.CB
            scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
        else:
            state = layer.weight.quant_state
            self.dtype, self.block = state.dtype, state.blocksize
            codes, scales = codes.view(torch.uint8).reshape(-1, 1), _scales(state)
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scales", scales, persistent=False)

    @classmethod
    def made_of(cls, weight: Tensor, layer: nn.Module) -> Codes:
        """Those of another `weight` (out, in), in the scheme of `layer`, with scales in fp32."""
        device = next(layer.parameters()).device
        how = cls(layer).how
        return cls(quantized_layer(plain_layer(layer), how, torch.float32, weight=weight.float().to(device)))

    @torch.no_grad()
    def weight(self) -> Tensor:
        """W (out, in) in fp32."""
        if self.how.scheme == "int8":
            return self.codes.float() * (self.scales.float().view(-1, 1) / 127.0)
        from bitsandbytes import functional as untyped

        functional: Any = untyped
        table = functional.get_4bit_type(self.how.scheme, device=self.codes.device)
        state = functional.QuantState(
            self.scales.float(),
            torch.Size(self.shape),
            code=table,
            blocksize=self.block,
            quant_type=self.how.scheme,
            dtype=self.dtype,
        )
        found: Tensor = functional.dequantize_4bit(self.codes, state)
        return found.float()


def _scales(state: Any) -> Tensor:
    """One fp32 number for each block."""
    if not state.nested:
        scales: Tensor = state.absmax
        return scales
    from bitsandbytes import functional

    blocks: Tensor = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    return blocks.float()


class Difference(torch.autograd.Function):
    """x (W1 - W0)^T of two sets of codes. Neither matrix is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, one: Codes, other: Codes) -> Tensor:
        """Inputs (..., in), output (..., out)."""
        ctx.pair = one, other
        return nn.functional.linear(inputs, difference(one, other).to(inputs.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Of the inputs alone."""
        return gradient @ difference(*ctx.pair).to(gradient.dtype), None, None


def difference(one: Codes, other: Codes) -> Tensor:
    """W1 - W0, (out, in), in fp32."""
    return one.weight() - other.weight()
