"""Weight deltas on small models whose weights are read in every way that needs one, in fp64.

The reference is the same model with W' put in place of W by `torch.func.functional_call`, where W' is written out.
"""

import copy
import pickle

import peft
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lightsft.anatomy import Weight
from lightsft.primitives import PlacedDelta
from lightsft_adapters.lora import DoRADelta, LoRADelta

EXPERTS, TOKENS, INPUTS, OUTPUTS, RANK, SCALING = 3, 7, 6, 5, 2, 1.5


class ExpertsInOut(nn.Module):
    """Weight (experts, in, out): each expert multiplies its own tokens, x W."""

    def __init__(self):
        super().__init__()
        self.experts = nn.Module()
        self.experts.up = nn.Parameter(torch.randn(EXPERTS, INPUTS, OUTPUTS))

    def forward(self, x):
        return torch.cat([x[i::EXPERTS] @ self.experts.up[i] for i in range(EXPERTS)])


class ExpertsOutIn(ExpertsInOut):
    """Weight (experts, out, in): each expert is a linear layer, W x."""

    def __init__(self):
        super().__init__()
        self.experts.up = nn.Parameter(torch.randn(EXPERTS, OUTPUTS, INPUTS))

    def forward(self, x):
        return torch.einsum("eoi,ti->eto", self.experts.up, x)


class Bypassed(nn.Module):
    """Multiplies with the weight of a layer that it never calls."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(INPUTS, OUTPUTS, bias=False)

    def forward(self, x):
        return functional.linear(x, self.router.weight).tanh()


class Convolutional(nn.Module):
    """A convolution over (batch, channels, places)."""

    def __init__(self, groups=1):
        super().__init__()
        self.conv = nn.Conv1d(INPUTS, INPUTS, 3, padding=1, groups=groups)

    def forward(self, x):
        return self.conv(x.T[None])


class Grouped(Convolutional):
    def __init__(self):
        super().__init__(groups=2)


class Depthwise(Convolutional):
    def __init__(self):
        super().__init__(groups=INPUTS)


class Shared(nn.Module):
    """One weight in two layers, each called."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(INPUTS, INPUTS), nn.Linear(INPUTS, INPUTS)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x).tanh())


def weight(name, *others, readers=(), experts=0):
    owners = (name, *others)
    modules = readers or [owner.rpartition(".")[0] for owner in owners]
    return Weight(name, owners, tuple(zip(owners, modules, strict=True)), called=False, experts=experts)


KINDS = {
    "experts (in, out)": (ExpertsInOut, weight("experts.up", readers=[""], experts=EXPERTS)),
    "experts (out, in)": (ExpertsOutIn, weight("experts.up", readers=[""], experts=EXPERTS)),
    "bypassed": (Bypassed, weight("router.weight", readers=[""])),
    "convolution": (Convolutional, weight("conv.weight")),
    "grouped convolution": (Grouped, weight("conv.weight")),
    "depthwise convolution": (Depthwise, weight("conv.weight")),
    "shared": (Shared, weight("first.weight", "second.weight")),
}


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def bare(kind):
    """(model, weight) of one kind, frozen, in fp64."""
    torch.manual_seed(0)
    model, described = KINDS[kind][0]().double().requires_grad_(False), KINDS[kind][1]
    return model, described


def place(kind, delta=LoRADelta, initialisation="default"):
    """(model, placed delta) of one kind, moved away from its start."""
    model, described = bare(kind)
    parameter = model.get_parameter(described.owners[0])
    part = delta(parameter, described.experts, RANK, SCALING, initialisation, torch.Generator().manual_seed(1))
    primitive = PlacedDelta(model, described, part.double())
    with torch.no_grad():
        for seed, trained in enumerate(part.trained().values()):
            trained.add_(draw(*trained.shape, seed=seed), alpha=0.3)
    return model, primitive


INPUT = draw(TOKENS, INPUTS, seed=50)


def lora(weight, a, b):
    """W + s B A, by matrix for experts, over all but the first dimension for a convolution."""
    return weight + (b @ a * SCALING).reshape(weight.shape)


def reference(kind, changed):
    """(output, gradients) of the bare model whose weight is `changed(weight, *leaves)`, for the delta's own leaves."""
    model, described = bare(kind)
    leaves = [tensor.detach().clone().requires_grad_() for tensor in place(kind)[1].delta.trained().values()]
    value = changed(model.get_parameter(described.owners[0]), *leaves)
    output = functional_call(model, dict.fromkeys(described.owners, value), (INPUT,))
    return output.detach(), torch.autograd.grad(output.square().sum(), leaves)


def result(model, primitive, run=None):
    """(output, gradients) of a model that carries a delta."""
    output = model(INPUT) if run is None else run(model, INPUT)
    return output.detach(), torch.autograd.grad(output.square().sum(), list(primitive.trainable().values()))


def assert_equal(actual, expected, tolerance=1e-12):
    for one, other in zip((actual[0], *actual[1]), (expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=KINDS)
def kind(request):
    """Each way of reading a weight in turn."""
    return request.param


# ---- the formulas


def test_output_and_gradient_are_those_of_a_model_with_the_changed_weight(kind):
    assert_equal(result(*place(kind)), reference(kind, lora))


def test_each_expert_has_factors_of_its_own():
    for layout, inputs, outputs in (("(in, out)", OUTPUTS, INPUTS), ("(out, in)", INPUTS, OUTPUTS)):
        delta = place(f"experts {layout}")[1].delta
        assert delta.lora_A.weight.shape == (EXPERTS, RANK, inputs)
        assert delta.lora_B.weight.shape == (EXPERTS, outputs, RANK)
        assert torch.linalg.matrix_rank(delta.delta()).tolist() == [RANK] * EXPERTS


def test_dora_is_the_magnitude_times_the_direction(kind):
    """m V / ||V|| by row, V = W + s B A; the norm is a constant in the gradient."""
    model, primitive = place(kind, DoRADelta)
    parameter, experts = primitive.parameter, KINDS[kind][1].experts
    assert list(primitive.delta.trained()) == ["lora_magnitude_vector", "lora_A.weight", "lora_B.weight"]
    leaves = [tensor.detach().clone().requires_grad_() for tensor in primitive.delta.trained().values()]
    magnitude, a, b = leaves
    direction = parameter if experts else parameter.flatten(1)
    direction = direction + b @ a * SCALING
    changed = magnitude.unsqueeze(-1) * direction / direction.detach().norm(dim=-1, keepdim=True)
    output = functional_call(
        bare(kind)[0], dict.fromkeys(KINDS[kind][1].owners, changed.reshape(parameter.shape)), (INPUT,)
    )
    expected = output.detach(), torch.autograd.grad(output.square().sum(), leaves)
    # its arithmetic is in fp32 whatever the weight's type
    assert_equal(result(model, primitive), expected, tolerance=1e-5)


def test_dora_starts_at_the_weight_itself(kind):
    model, described = bare(kind)
    before = model(INPUT)
    parameter = model.get_parameter(described.owners[0])
    part = DoRADelta(parameter, described.experts, RANK, SCALING, "default", torch.Generator().manual_seed(1))
    PlacedDelta(model, described, part)
    torch.testing.assert_close(model(INPUT), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("initialisation", ["pissa", "olora"])
def test_pissa_and_olora_train_the_difference_to_their_start(initialisation, kind):
    """W' = W + s (B A - B0 A0), with s B0 A0 the best approximation of W of this rank, or Q[:, :r] R[:r]."""
    model, primitive = place(kind, initialisation=initialisation)
    delta, parameter = primitive.delta, primitive.parameter
    matrix = (parameter if KINDS[kind][1].experts else parameter.flatten(1)).float()
    start = (delta.initial_B @ delta.initial_A).float()
    if initialisation == "pissa":
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        expected, start = (u[..., :RANK] * s[..., None, :RANK]) @ vt[..., :RANK, :], start * SCALING
    else:
        q, r = torch.linalg.qr(matrix)
        expected = q[..., :RANK] @ r[..., :RANK, :]
    torch.testing.assert_close(start, expected, rtol=1e-5, atol=1e-5)

    changed = lora(parameter, delta.lora_A.weight, delta.lora_B.weight)
    changed = changed - (delta.initial_B @ delta.initial_A * SCALING).reshape(parameter.shape)
    output = functional_call(bare(kind)[0], dict.fromkeys(KINDS[kind][1].owners, changed), (INPUT,))
    torch.testing.assert_close(model(INPUT), output, rtol=1e-12, atol=1e-12)
    assert set(delta.trained()) == {"lora_A.weight", "lora_B.weight"}
    assert {"initial_A", "initial_B"} <= set(delta.tensors())  # saved: elsewhere, a decomposition may differ in sign


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}], ids=str)
def test_lora_on_a_convolution_equals_pefts_with_the_same_factors(options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, **options))
    described = weight("0.weight")
    delta = LoRADelta(model[0].weight, 0, RANK, 2.0, "gaussian", torch.Generator().manual_seed(1))
    nn.init.normal_(delta.lora_B.weight)
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["0"])
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        layer = theirs.base_model.model[0]
        layer.lora_A["default"].weight.copy_(delta.lora_A.weight.view(RANK, 4, 3, 3))
        layer.lora_B["default"].weight.copy_(delta.lora_B.weight.view(6, RANK, 1, 1))
    image = torch.randn(2, 4, 9, 9)
    before = model(image)
    primitive = PlacedDelta(model, described, delta)
    expected = theirs(image)
    torch.testing.assert_close(model(image), expected, rtol=1e-5, atol=1e-5)
    assert (expected - before).abs().max() > 0.1
    primitive.merge()
    torch.testing.assert_close(model(image), expected, rtol=1e-5, atol=1e-5)


class CalledAndRead(nn.Module):
    """A layer that is called, and whose weight is then read by the module around it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(INPUTS, INPUTS, bias=False)

    def forward(self, x):
        return functional.linear(self.layer(x).tanh(), self.layer.weight)


# ---- what it leaves alone


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(kind, use_reentrant):
    model, primitive = place(kind)
    plain = result(model, primitive)

    def checkpointed(model, inputs):
        return checkpoint(model, inputs.requires_grad_(use_reentrant), use_reentrant=use_reentrant)

    def gradients_by_backward():
        output = checkpointed(model, INPUT.clone())
        output.square().sum().backward()
        return output.detach(), [parameter.grad for parameter in primitive.trainable().values()]

    assert_equal(gradients_by_backward(), plain, tolerance=0)


def shadows(model):
    """Tensors in the instances' dictionaries, which hide parameters."""
    return [
        name for module in model.modules() for name, value in vars(module).items() if isinstance(value, torch.Tensor)
    ]


def test_the_parameter_shows_again_after_the_forward_pass(kind):
    model, primitive = place(kind)
    model(INPUT)
    assert not shadows(model)
    for owner in KINDS[kind][1].owners:
        module, _, attribute = owner.rpartition(".")
        assert getattr(model.get_submodule(module), attribute) is primitive.parameter


def test_the_parameter_shows_again_after_an_error_in_the_forward_pass(kind):
    model, _ = place(kind)
    expected = model(INPUT)
    with pytest.raises(RuntimeError):
        model(torch.ones(TOKENS, INPUTS + 1, dtype=torch.float64))
    assert not shadows(model)
    assert torch.equal(model(INPUT), expected)


def test_keys_and_classes_of_the_model_stay(kind):
    model, primitive = place(kind)
    original, _ = bare(kind)
    added = model.state_dict().keys() - original.state_dict().keys()
    assert original.state_dict().keys() <= model.state_dict().keys()
    assert all("lightsft_delta_" in name for name in added)
    twins = zip(
        original.named_modules(), ((n, m) for n, m in model.named_modules() if "lightsft" not in n), strict=True
    )
    assert all(name == other and type(module) is type(twin) for (name, module), (other, twin) in twins)
    for name, tensor in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert set(primitive.trainable()) == {f"{KINDS[kind][1].name}.lora_{factor}.weight" for factor in "AB"}
    assert primitive.covers() == set(KINDS[kind][1].owners)


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copied_model_carries_its_own_delta(kind, way):
    model, primitive = place(kind)
    expected = model(INPUT)
    twin = way(model)
    assert torch.equal(twin(INPUT), expected)
    with torch.no_grad():
        for parameter in primitive.trainable().values():
            parameter.zero_()
    assert torch.equal(twin(INPUT), expected)
    assert not torch.equal(model(INPUT), expected)


def test_disabled_it_is_as_if_it_were_not_there(kind):
    model, primitive = place(kind)
    original, _ = bare(kind)
    changed = model(INPUT)
    primitive.enable(False)
    assert torch.equal(model(INPUT), original(INPUT))
    primitive.enable(True)
    assert torch.equal(model(INPUT), changed)
    assert not torch.equal(changed, original(INPUT))


def test_removed_it_leaves_every_bit_as_it_was(kind):
    model, primitive = place(kind)
    original, _ = bare(kind)
    model(INPUT)
    primitive.remove()
    assert model.state_dict().keys() == original.state_dict().keys()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in original.state_dict().items())
    assert torch.equal(model(INPUT), original(INPUT))
    for module in model.modules():
        tables = (module._forward_hooks, module._forward_pre_hooks, module._forward_hooks_always_called)
        assert not any(tables)


def test_saved_tensors_load_bit_for_bit(kind):
    model, primitive = place(kind)
    twin, other = place(kind)
    with torch.no_grad():
        for parameter in other.trainable().values():
            parameter.zero_()
    other.load(primitive.tensors())
    assert torch.equal(twin(INPUT), model(INPUT))


# ---- merging


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("delta", [LoRADelta, DoRADelta])
def test_merging_rounds_once(kind, delta, dtype):
    """W <- round(W'), with W' in fp32: not the sum of two rounded terms."""
    model, described = bare(kind)
    model.to(dtype)
    parameter = model.get_parameter(described.owners[0])
    part = delta(parameter, described.experts, RANK, SCALING, "gaussian", torch.Generator().manual_seed(1))
    nn.init.normal_(part.lora_B.weight)
    primitive = PlacedDelta(model, described, part)
    with torch.no_grad():
        expected = part(parameter.float()).to(dtype)
    primitive.merge()
    for owner in described.owners:
        if dtype == torch.float32:  # the factor of a LoRA is multiplied into B before, or into the product after
            torch.testing.assert_close(model.get_parameter(owner), expected, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(model.get_parameter(owner), expected)
    assert model.state_dict().keys() == bare(kind)[0].state_dict().keys()


def test_a_merged_model_computes_what_the_delta_did(kind):
    model, primitive = place(kind)
    model.float()
    expected = model(INPUT.float())
    primitive.merge()
    torch.testing.assert_close(model(INPUT.float()), expected, rtol=1e-5, atol=1e-5)


def test_a_merged_shared_weight_stays_shared():
    model, primitive = place("shared")
    primitive.merge()
    assert model.first.weight is model.second.weight
