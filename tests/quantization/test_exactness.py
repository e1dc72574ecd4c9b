"""One function in training, in evaluation and merged; nothing is cast to fp32 for that."""

import copy

import peft
import pytest
import torch
from bitsandbytes import MatmulLtState

import lightsft
from lightsft import Backbone
from lightsft.plain_layers import forget_quantization, plain_copy
from lightsft.quantization import quantized_layers
from tests.quantization.test_quantization import WAYS, each_way, quantized
from tests.tiny_models import batch, off


def in_mode(model, training):
    """Logits without a gradient; no tiny model has dropout."""
    model.train(training)
    with torch.no_grad():
        return model(**batch(model)).logits


@each_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_evaluation_computes_what_is_trained(how, dtype):
    model = Backbone(quantized("llama", how, dtype)).model
    assert torch.equal(in_mode(model, training=False), in_mode(model, training=True))


@each_way
def test_evaluation_computes_with_the_dequantized_weights(how):
    model = Backbone(quantized("llama", how)).model
    assert off(in_mode(model, training=False), in_mode(plain_copy(model), training=False)) < 1e-5


def test_8_bits_alone_would_round_the_inputs():
    model = quantized("llama", WAYS["int8"])
    raw = copy.deepcopy(model)
    for layer in quantized_layers(raw).values():
        layer.state.__class__ = MatmulLtState
    assert off(in_mode(raw, training=False), in_mode(model, training=False)) > 1e-3
    assert torch.equal(in_mode(raw, training=True), in_mode(model, training=True))


def test_a_copy_and_a_second_backbone_keep_to_it():
    model = Backbone(quantized("llama", WAYS["int8"])).model
    for again in (copy.deepcopy(model), Backbone(model).model):
        assert torch.equal(in_mode(again, training=False), in_mode(model, training=True))


@each_way
def test_loss_and_gradients_are_those_of_a_model_cast_to_fp32(how, tmp_path):
    """PEFT casts what is not quantized to fp32; here it stays in bf16. Both are as near to the exact ones."""
    model = quantized("llama", how, torch.bfloat16)
    exact = plain_copy(model)
    forget_quantization(exact)
    exact = exact.float()
    cast = peft.prepare_model_for_kbit_training(copy.deepcopy(model), use_gradient_checkpointing=False)
    cast = peft.get_peft_model(cast, peft.LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in cast.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    cast.save_pretrained(tmp_path)
    for one in (exact, model):
        for parameter in lightsft.load(tmp_path, Backbone(one), other_quantization=True).parameters():
            parameter.requires_grad_(True)
    (loss, wanted), (ours, found), (theirs, others) = map(loss_and_gradients, (exact, model, cast))
    assert ours == pytest.approx(loss, rel=2e-3)
    assert theirs == pytest.approx(loss, rel=2e-3)
    assert cosine(found, wanted) > 0.999
    assert cosine(found, others) > 0.999
    found[: len(found) // 2] *= 0.8
    assert cosine(found, others) < 0.999


def loss_and_gradients(model):
    """The loss in training mode, and the gradients of every A and B in the order of the layers."""
    model.train()
    loss = model(**batch(model)).loss
    loss.backward()
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(found) == 2 * 14
    return loss.item(), torch.cat([gradient.double().flatten() for gradient in found])


def cosine(one, other):
    """Of the angle between two gradients."""
    return torch.nn.functional.cosine_similarity(one, other, dim=0)
