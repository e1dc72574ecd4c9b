import pytest
import torch
from torch import nn

from lightsft import Backbone
from lightsft.roles import find_biases, find_norms, try_out
from tests.tiny_models import logits, tiny
from tests.zoo.models_and_inputs import build, find

WIDTH = 12


class RootMeanSquare(nn.Module):
    """x / rms(x), times the weight or one more than it (Gemma)."""

    def __init__(self, offset=0.0, epsilon=1e-6):
        super().__init__()
        self.gain, self.offset, self.epsilon = nn.Parameter(torch.zeros(WIDTH)), offset, epsilon

    def forward(self, x):
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.epsilon)
        return ((self.offset + self.gain) * x.float() * scale).to(x.dtype)


class Gated(RootMeanSquare):
    """Mamba's: the gate comes first, or last."""

    def __init__(self, first):
        super().__init__()
        self.first = first

    def forward(self, x, gate):
        gate = nn.functional.silu(gate)
        return super().forward(x * gate) if self.first else super().forward(x) * gate


class ThenReLU(nn.GroupNorm):
    def forward(self, x):
        return super().forward(x).relu()


class ScaleAndShift(nn.Module):
    """What MobileBERT has in a norm's place."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x):
        return x * self.weight + self.bias


class LayerScale(nn.Module):
    def __init__(self, start=0.0):
        super().__init__()
        self.factor = nn.Parameter(torch.full((WIDTH,), start))

    def forward(self, x):
        return x * self.factor


class Learned(nn.Module):
    """A constant, whatever it reads."""

    def __init__(self):
        super().__init__()
        self.vector = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        return self.vector.expand(x.shape)


class Recurrence(nn.Module):
    """Two inputs, scaled and shifted: a residual connection, no norm."""

    def __init__(self):
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x, residual):
        return x * self.scale + residual + self.bias


SEQUENCE, IMAGE = (1, 5, WIDTH), (1, WIDTH, 4, 4)
NORMS = {
    "layer": (nn.LayerNorm(WIDTH), SEQUENCE, ("weight",), ("bias",)),
    "layer-without-bias": (nn.LayerNorm(WIDTH, bias=False), SEQUENCE, ("weight",), ()),
    "rms": (nn.RMSNorm(WIDTH), SEQUENCE, ("weight",), ()),
    "rms-by-hand": (RootMeanSquare(), SEQUENCE, ("gain",), ()),
    "one-more-than-the-weight": (RootMeanSquare(offset=1.0), SEQUENCE, ("gain",), ()),
    "large-epsilon": (RootMeanSquare(epsilon=1e-3), SEQUENCE, ("gain",), ()),
    "gate-first": (Gated(first=True), SEQUENCE, ("gain",), ()),
    "gate-last": (Gated(first=False), SEQUENCE, ("gain",), ()),
    "group": (nn.GroupNorm(3, WIDTH), IMAGE, ("weight",), ("bias",)),
    "group-then-relu": (ThenReLU(3, WIDTH), IMAGE, ("weight",), ("bias",)),
    "batch": (nn.BatchNorm2d(WIDTH), IMAGE, ("weight",), ("bias",)),
    "batch-of-vectors": (nn.BatchNorm1d(WIDTH), (1, WIDTH), ("weight",), ("bias",)),
    "per-head": (nn.LayerNorm((3, 4)), (1, 5, 3, 4), ("weight",), ("bias",)),
    "scale-and-shift": (ScaleAndShift(), SEQUENCE, ("weight",), ("bias",)),
}
OTHERS = {
    "linear": nn.Linear(WIDTH, WIDTH),
    "layer-scale": LayerScale(0.1),
    "layer-scale-of-zero": LayerScale(),
    "constant": Learned(),
    "residual": Recurrence(),
    "prelu": nn.PReLU(WIDTH),
    "table": nn.Embedding(WIDTH, WIDTH),
}


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("shown", [True, False], ids=["shape-seen", "shape-unknown"])
def test_a_norm_is_known_by_what_it_does_to_three_times_its_input(kind, shown):
    norm, shape, scales, biases = NORMS[kind]
    assert try_out(norm, shape if shown else ()) == (scales, biases)


@pytest.mark.parametrize("kind", OTHERS)
def test_what_follows_its_inputs_scale_is_no_norm(kind):
    assert try_out(OTHERS[kind], SEQUENCE) is None


def test_trying_out_changes_nothing():
    norm = nn.BatchNorm2d(WIDTH).eval()
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    random = torch.get_rng_state()
    try_out(norm, IMAGE)
    assert not norm.training
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


def test_a_norm_in_half_precision_and_one_without_values_are_known_too():
    assert try_out(nn.LayerNorm(WIDTH, dtype=torch.bfloat16), SEQUENCE) == (("weight",), ("bias",))
    assert try_out(nn.LayerNorm(WIDTH, device="meta"), SEQUENCE) == (("weight",), ("bias",))


def test_every_norm_of_a_model_is_found(name, model):
    """Two a block, three with cross attention, and those before and after the blocks."""
    per_stack = {"bert": 1 + 4, "roberta": 1 + 4, "llama": 4 + 1, "gpt2": 4 + 1, "t5": 4 + 6 + 2, "bart": 4 + 6 + 2}
    norms = find_norms(Backbone(model))
    assert len(norms) == per_stack[name]
    assert all(len(norm.scales) == 1 for norm in norms)
    assert all(len(norm.biases) == (0 if name in ("llama", "t5") else 1) for norm in norms)


def test_a_norm_in_the_task_head_is_trained_with_the_head():
    backbone = Backbone(build(find("token-cls", "modernbert")))
    found = {name for norm in find_norms(backbone) for name in norm.scales + norm.biases}
    assert "head.norm.weight" in backbone.head
    assert found
    assert not found & backbone.head


def test_a_shared_norm_is_found_once():
    norms = find_norms(Backbone(build(find("causal-lm", "zamba"))))
    scales = [name for norm in norms for name in norm.scales]
    assert len(set(scales)) == len(scales)
    assert set(scales) <= dict(build(find("causal-lm", "zamba")).named_parameters()).keys()


def test_mobileberts_scales_and_shifts_are_found():
    norms = find_norms(Backbone(build(find("masked-lm", "mobilebert"))))
    assert any("bottleneck" in norm.name for norm in norms)


# ---- biases


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("bert", {"attention": 8, "mlp": 4, "norm": 4, "outside": 2}),
        ("gpt2", {"attention": 4, "mlp": 4, "norm": 4, "outside": 1}),
        ("bart", {"attention": 24, "mlp": 8, "norm": 10, "outside": 2}),
        ("llama", {}),
        ("t5", {}),
    ],
)
def test_biases_are_the_vectors_that_are_added(name, parts):
    found = find_biases(Backbone(tiny(name)))
    assert {part: sum(bias.part == part for bias in found) for part in parts} == parts
    assert len(found) == sum(parts.values())
    assert all(bias.name.endswith("bias") for bias in found)


def test_a_bias_follows_the_weight_whose_product_it_is_added_to():
    found = {bias.name: bias.follows for bias in find_biases(Backbone(tiny("bert")))}
    assert found["bert.encoder.layer.0.output.dense.bias"] == "bert.encoder.layer.0.output.dense"
    assert found["bert.encoder.layer.0.output.LayerNorm.bias"] is None


@pytest.mark.parametrize(
    ("task", "model_type", "ending", "follows"),
    [
        ("causal-lm", "gpt_oss", "mlp.experts.down_proj_bias", "mlp.experts.down_proj"),  # (experts, width)
        ("causal-lm", "xlnet", "rel_attn.r_w_bias", "rel_attn.q"),  # (heads, size), added to queries
        ("causal-lm", "mamba", "mixer.conv1d.bias", "mixer.conv1d"),
        ("causal-lm", "recurrent_gemma", "rg_lru.input_gate_bias", "rg_lru.input_gate_weight"),  # in baddbmm
        ("causal-lm", "gpt_neox_japanese", "attention.dense_bias", "attention.dense"),  # expanded, then added
        ("audio-cls", "wav2vec2-conformer", "self_attn.pos_bias_u", "self_attn.linear_q"),
    ],
)
def test_biases_without_a_layer_of_their_own_are_found(task, model_type, ending, follows):
    found = {bias.name: bias.follows for bias in find_biases(Backbone(build(find(task, model_type))))}
    named = [name for name in found if name.endswith(ending)]
    assert named
    prefix = named[0].removesuffix(ending)
    assert found[named[0]] == prefix + follows


@pytest.mark.parametrize("model_type", ["gemma", "qwen3", "inkling2_text"])
def test_one_plus_a_gain_and_a_kernel_with_a_static_part_are_no_biases(model_type):
    assert not find_biases(Backbone(build(find("causal-lm", model_type))))


def test_a_bias_that_only_chooses_experts_is_left_out():
    """No gradient reaches it."""
    found = {bias.name for bias in find_biases(Backbone(build(find("causal-lm", "ernie4_5_moe"))))}
    assert not any("e_score_correction_bias" in name for name in found)


def test_biases_of_reversible_blocks_are_found_though_their_gradient_is_not_seen():
    found = find_biases(Backbone(build(find("masked-lm", "reformer"))))
    assert any(bias.part == "norm" for bias in found)
    assert any(bias.part == "mlp" for bias in found)


def test_looking_for_roles_leaves_the_model_as_it_was(name, model):
    backbone, before = Backbone(model), logits(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    find_norms(backbone)
    find_biases(backbone)
    assert torch.equal(before, logits(model))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
