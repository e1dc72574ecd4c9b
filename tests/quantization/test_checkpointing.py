"""Gradient checkpointing beside codes: the same gradients as without, reentrant or not."""

import pytest
import torch

import lightsft
from lightsft import Backbone
from lightsft_adapters import Full
from tests.quantization.test_quantization import WAYS, quantized
from tests.tiny_models import furthest, gradients_with_and_without_checkpointing, randomise

pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("how", [WAYS["nf4"], WAYS["int8"]], ids=str)
@pytest.mark.parametrize("strategy", ["lora", "adapter", "prefix", "ia3", "full"])
def test_the_gradients_are_the_same(strategy, how, name, reentrant):
    injection = randomise(lightsft.strategy(strategy).inject(Backbone(quantized(name, how))))
    plain, checkpointed = gradients_with_and_without_checkpointing(injection, use_reentrant=reentrant)
    assert len(plain) == len(injection.named_parameters())
    assert any(gradient.abs().max() > 0 for gradient in plain.values())
    assert furthest(checkpointed, plain) == 0


@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
@pytest.mark.parametrize("how", [WAYS["nf4"], WAYS["int8"]], ids=str)
@pytest.mark.parametrize("strategy", [Full(), Full(quantized="dequantize")], ids=["skip", "dequantize"])
def test_the_gradients_are_the_same_beside_half_precision(strategy, how, reentrant):
    injection = strategy.inject(Backbone(quantized("bert", how, torch.bfloat16)))
    plain, checkpointed = gradients_with_and_without_checkpointing(injection, use_reentrant=reentrant)
    assert furthest(checkpointed, plain) == 0
    assert all(parameter.dtype == torch.float32 for parameter in injection.parameters())
