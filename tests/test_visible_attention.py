"""Attention inside a kernel that torch's functions do not show is recognised all the same."""

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from lightsft import Backbone
from lightsft_adapters import Adapter, LoRA
from lightsft_adapters.ia3 import IA3
from tests.tiny_models import logits, tiny

KERNEL = "opaque_kernel"


@torch.library.custom_op("lightsft_test::attention", mutates_args=())
def _kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


@_kernel.register_fake
def _(query, key, value):
    return torch.empty_like(query)


def _gradients(context, gradient):
    with torch.enable_grad():
        inputs = [tensor.detach().requires_grad_() for tensor in context.saved_tensors]
        output = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
    return torch.autograd.grad(output, inputs, gradient)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


_kernel.register_autograd(_gradients, setup_context=_keep)


def _attention(module, query, key, value, attention_mask, **kwargs):
    return _kernel(query, key, value).transpose(1, 2).contiguous(), None


@pytest.fixture
def names():
    """The trainable names of a strategy on a model with, or without, a kernel."""
    AttentionInterface.register(KERNEL, _attention)
    AttentionMaskInterface.register(KERNEL, sdpa_mask)

    def of(strategy, implementation):
        model = tiny("llama")
        model.set_attn_implementation(implementation)
        injection = strategy.inject(Backbone(model))
        assert model.config._attn_implementation == implementation
        assert torch.isfinite(logits(model)).all()
        return set(injection.named_parameters())

    return of


@pytest.mark.parametrize(
    "strategy",
    [IA3(), LoRA(4, targets="attention"), LoRA(4, targets="mlp"), Adapter(4, "pfeiffer")],
    ids=["ia3", "attention", "mlp", "pfeiffer"],
)
def test_a_strategy_trains_the_same_tensors_on_a_kernel(strategy, names):
    assert names(strategy, KERNEL) == names(strategy, "sdpa")
