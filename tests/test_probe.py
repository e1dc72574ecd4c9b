"""The probe names what is wrong with a strategy before anything is trained."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from lightsft import Backbone, injecting
from lightsft.dry_run import tiny_inputs
from lightsft.errors import InjectionError
from lightsft.primitives import Side
from lightsft_adapters import Full, LoRA
from tests.tiny_models import batch, logits, tiny

QUERY = "bert.encoder.layer.0.attention.self.query"


@dataclass(frozen=True)
class Places:
    """A strategy that puts the given side on one module."""

    side: Any
    name: str = QUERY

    def inject(self, backbone, *, seed=0):
        with injecting(self, backbone, seed) as injection:
            injection.add_side(self.name, self.side())
        return injection


class Scaled(Side):
    """A sound side: y = y + w x y."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))

    def forward(self, served, inputs, output):
        return output + self.w * output


class Deaf(Scaled):
    def forward(self, served, inputs, output):
        return output + 1.0


class Detached(Scaled):
    def forward(self, served, inputs, output):
        return output + self.w.detach() * output


class Exploding(Scaled):
    def forward(self, served, inputs, output):
        return output + self.w / torch.zeros(())


class Broken(Scaled):
    def forward(self, served, inputs, output):
        return output + (self.w - 9.0).log()


class Idle(Scaled):
    def forward(self, served, inputs, output):
        return output + self.w * torch.zeros_like(output)


class HalfDeaf(Scaled):
    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(3))


class Meddling(Scaled):
    """Trains the module that it serves behind everyone's back."""

    def forward(self, served, inputs, output):
        served.bias.requires_grad_(True)
        return output + self.w * output + served.bias


@pytest.mark.parametrize(
    ("side", "told"),
    [
        (Deaf, f"no gradient reaches {QUERY}.w"),
        (Detached, f"no gradient reaches {QUERY}.w"),
        (HalfDeaf, f"no gradient reaches {QUERY}.unused"),
        (Exploding, f"the gradient of {QUERY}.w is not finite"),  # this attention turns infinite queries finite
        (Meddling, f"{QUERY}.bias gets a gradient though it is not trained"),
    ],
)
def test_a_broken_side_is_refused_by_name_and_removed(side, told):
    model = tiny("bert")
    before, keys = logits(model), list(model.state_dict())
    with pytest.raises(InjectionError, match=told):
        Places(side).inject(Backbone(model))
    assert list(model.state_dict()) == keys
    assert torch.equal(logits(model), before)


def test_an_output_that_is_not_finite_is_refused():
    with pytest.raises(InjectionError, match="output is not finite"):
        Places(Broken, "bert.pooler.dense").inject(Backbone(tiny("bert")))


def test_a_side_without_an_effect_is_refused():
    """On a language model: a new task head would change the output by itself."""
    with pytest.raises(InjectionError, match="Places has no effect on the output of LlamaForCausalLM"):
        Places(Idle, "model.layers.0.self_attn.q_proj").inject(Backbone(tiny("llama")))


def test_a_side_without_an_effect_is_refused_beside_a_trained_head_too():
    with pytest.raises(InjectionError, match="no effect"):
        Places(Idle).inject(Backbone(tiny("bert")))


def test_a_sound_side_passes_and_keeps_its_start():
    injection = Places(Scaled).inject(Backbone(tiny("bert")))
    assert injection.named_parameters()[f"{QUERY}.w"] == 0.0
    assert injection.skipped == []


def test_a_backbone_with_nan_is_refused():
    model = tiny("bert")
    with torch.no_grad():
        model.bert.pooler.dense.bias[0] = float("nan")
    with pytest.raises(InjectionError, match="not finite"):
        LoRA().inject(Backbone(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probe_leaves_values_modes_gradients_and_randomness_alone(dtype):
    model = tiny("bert", dtype=dtype).train()
    model.bert.pooler.eval()
    values = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    Full().inject(Backbone(model))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(values[key], value.to(dtype)) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert (model.training, model.bert.pooler.training) == (True, False)


# ---- modules that a forward pass never calls


def with_a_module_that_is_read_but_never_called():
    """Layer 0 computes its query from the weight itself, as some routers do."""
    model = tiny("bert")
    attention = model.get_submodule("bert.encoder.layer.0.attention.self")
    attention.add_module("direct", nn.Linear(32, 32))
    attention.query.register_forward_hook(
        lambda module, args, output: output + nn.functional.linear(args[0], attention.direct.weight)
    )
    return model


@pytest.mark.parametrize("targets", ["linear", "direct"])
def test_a_module_that_is_read_but_never_called_is_served_through_its_weight(targets):
    injection = LoRA(targets=targets).inject(Backbone(with_a_module_that_is_read_but_never_called()))
    name = "bert.encoder.layer.0.attention.self.direct"
    assert injection.skipped == []
    assert f"{name}.lora_B.weight" in injection.named_parameters()
    inputs = tiny_inputs(injection.model)
    with torch.no_grad():
        injection.named_parameters()[f"{name}.lora_B.weight"].normal_()
        tuned = injection.model(**inputs).logits
        with injection.disabled():
            assert not torch.allclose(injection.model(**inputs).logits, tuned, atol=1e-4)
        assert torch.allclose(injection.merge()(**inputs).logits, tuned, atol=1e-5)


def with_an_unused_tower():
    model = tiny("bert")
    model.bert.add_module("tower", nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)))
    return model


def test_an_unused_tower_is_left_out_of_full_tuning_by_name():
    injection = Full().inject(Backbone(with_an_unused_tower()))
    assert injection.skipped == [f"bert.tower.{i}.{kind}" for i in (0, 1) for kind in ("bias", "weight")]
    assert not [name for name in injection.named_parameters() if "tower" in name]
    assert not injection.model.bert.tower[0].weight.requires_grad


def test_what_is_left_out_keeps_its_values():
    """The probe moves what is trainable; what it then finds to be idle has to be put back with the rest."""
    model = tiny("bert")
    model.bert.encoder.extra = nn.Linear(8, 8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    injection = Full().inject(Backbone(model))
    assert not any("extra" in name for name in injection.named_parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_unused_tower_is_left_out_of_lora_and_of_the_file(tmp_path):
    model = with_an_unused_tower()
    injection = LoRA(targets=[r".*tower\.\d", "query"]).inject(Backbone(model))
    assert injection.skipped == ["bert.tower.0", "bert.tower.1"]
    assert not any("tower" in key for key in injection.tensors())
    assert not any("lightsft" in key for key in model.bert.tower.state_dict())


def test_experts_that_the_probes_few_tokens_miss_are_kept():
    """A token goes to one of many experts: those that the probe's tokens miss will see others in training."""
    model = tiny("bert")
    for layer in model.bert.encoder.layer:
        layer.intermediate.add_module("experts", nn.ModuleList(nn.Linear(32, 64) for _ in range(3)))
        layer.intermediate.register_forward_hook(lambda module, args, output: output + module.experts[0](args[0]))
    injection = LoRA().inject(Backbone(model))
    carrying = {primitive.name for primitive in injection.primitives if ".experts." in primitive.name}
    assert carrying == {f"bert.encoder.layer.{i}.intermediate.experts.{e}" for i in (0, 1) for e in range(3)}
    assert injection.skipped == []


def test_a_model_on_the_meta_device_is_injected_without_being_run():
    with torch.device("meta"):
        model = type(tiny("llama"))(tiny("llama").config)
    injection = LoRA().inject(Backbone(model))
    assert {parameter.device.type for parameter in injection.parameters()} == {"meta"}


def test_a_probe_within_inference_of_an_old_gradient_does_not_mistake_it():
    model = tiny("bert")
    model(**batch(model)).loss.backward()
    assert LoRA().inject(Backbone(model)).parameters()
