"""LoRA-FA against LoRA with A frozen, against PEFT, and in what it keeps for the backward pass."""

import copy
import dataclasses

import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import lightsft
from lightsft import Backbone
from lightsft.errors import ConfigurationError, TargetError
from lightsft_adapters import LoRA
from lightsft_adapters.lora_fa import LoRAFA
from tests.adapters.peft_models import merged_state, sides
from tests.tiny_models import batch, gradients, logits, off, randomise, tiny
from tests.zoo.models_and_inputs import build, find

VARIANTS = {
    "plain": {},
    "dora": {"dora": True},
    "pissa": {"initialisation": "pissa"},
    "olora": {"initialisation": "olora"},
}


def inject(model, seed=0, kind=LoRAFA, **options):
    return kind(**{"rank": 4, "alpha": 6.0, **options}).inject(Backbone(model), seed=seed)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients_are_those_of_lora_without_a(variant):
    frozen = inject(tiny("llama"), **VARIANTS[variant])
    lora = inject(tiny("llama"), kind=LoRA, **VARIANTS[variant])
    assert set(lora.named_parameters()) - set(frozen.named_parameters()) == {
        key for key in lora.named_parameters() if key.endswith("lora_A.weight")
    }
    randomise(frozen)
    lora.load_tensors(frozen.tensors())
    assert torch.equal(logits(frozen.model), logits(lora.model))
    theirs = gradients(lora.model, lora.named_parameters())
    for key, gradient in gradients(frozen.model, frozen.named_parameters()).items():
        assert torch.equal(gradient, theirs[key]), key


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_peft_opens_the_folder_and_merges_to_the_same_weights(name, tmp_path):
    plain = tiny(name)
    injection = randomise(inject(copy.deepcopy(plain)))
    injection.save(tmp_path)
    peft = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval()
    assert off(logits(injection.model), logits(peft)) <= 1e-6
    expected = merged_state(peft)
    for key, weight in injection.merge().state_dict().items():
        assert off(weight, expected[key]) <= 1e-6, key


def test_the_folder_loads_with_the_same_bits(tmp_path):
    injection = randomise(inject(tiny("llama"), seed=3))
    injection.save(tmp_path)
    loaded = lightsft.load(tmp_path, tiny("llama"))
    assert isinstance(loaded.strategy, LoRAFA)
    assert torch.equal(logits(loaded.model), logits(injection.model))
    assert loaded.named_parameters().keys() == injection.named_parameters().keys()


def kept_for_backward(side, served, inputs):
    """The tensors that the side keeps, of all that a forward pass through it computes."""
    output, kept = served(inputs).detach(), []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        side(served, inputs, output)
    weights = {tensor.data_ptr() for tensor in (*side.parameters(), *side.buffers(), *served.parameters())}
    return [tensor for tensor in kept if tensor.data_ptr() not in weights]


@pytest.mark.parametrize(
    ("kind", "options", "widest"), [(LoRA, {}, 32), (LoRAFA, {}, 4), (LoRAFA, {"initialisation": "pissa"}, 4)]
)
@pytest.mark.parametrize("requires_grad", [True, False])
def test_only_the_narrow_product_is_kept_for_the_backward_pass(kind, options, widest, requires_grad):
    primitive = sides(inject(tiny("llama"), kind=kind, targets="q_proj", **options))[0]
    inputs = torch.randn(2, 5, 32, requires_grad=requires_grad)
    kept = kept_for_backward(primitive.side, primitive.served, inputs)
    assert max(tensor.shape[-1] for tensor in kept) == widest
    assert any(tensor.data_ptr() == inputs.data_ptr() for tensor in kept) == (kind is LoRA)


def test_a_forward_pass_of_the_model_keeps_fewer_bytes_than_with_lora():
    def kept_bytes(kind):
        injection, sizes = inject(tiny("llama"), kind=kind), {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            injection.model(**batch(injection.model))
        return sum(sizes.values())

    assert kept_bytes(LoRAFA) < kept_bytes(LoRA)


def test_a_stays_while_b_learns():
    injection = inject(tiny("bert"))
    before = {key: tensor.clone() for key, tensor in injection.tensors().items()}
    optimizer = torch.optim.AdamW(injection.parameters(), lr=0.1)
    injection.model(**batch(injection.model)).loss.backward()
    optimizer.step()
    for key, tensor in injection.tensors().items():
        assert torch.equal(tensor, before[key]) == key.endswith("lora_A.weight"), key


def test_experts_and_convolutions_train_only_b():
    for task, model_type in (("causal-lm", "mixtral"), ("ctc", "wav2vec2")):
        injection = inject(build(find(task, model_type)))
        names = list(injection.named_parameters())
        assert any("lora_B" in name for name in names)
        assert not any("lora_A" in name for name in names)


@pytest.mark.parametrize("options", [{"rank": 0}, {"dora": True, "initialisation": "pissa"}])
def test_an_option_out_of_range_is_refused(options):
    with pytest.raises(ConfigurationError):
        LoRAFA(**options)


def test_its_options_are_those_of_lora_without_the_ratio_of_learning_rates():
    names = [{field.name for field in dataclasses.fields(kind)} for kind in (LoRA, LoRAFA)]
    assert names[0] - names[1] == {"lora_plus_ratio"}
    with pytest.raises(ConfigurationError, match="no option lora_plus_ratio"):
        lightsft.strategy("lora_fa", lora_plus_ratio=16.0)


def test_an_embedding_is_refused():
    with pytest.raises(TargetError, match="use lora"):
        inject(tiny("llama"), targets="embedding")


def test_a_keeps_fp32_beside_a_bf16_weight_and_the_output_stays_bf16():
    injection = inject(tiny("llama", dtype=torch.bfloat16))
    assert {tensor.dtype for tensor in injection.tensors().values()} == {torch.float32}
    assert logits(injection.model).dtype == torch.bfloat16
    assert isinstance(sides(injection)[0].served, nn.Linear)
