"""The contract holds for every installed strategy, and each way of breaking it is caught by the check for it."""

import dataclasses
from dataclasses import dataclass
from importlib.metadata import EntryPoint

import pytest
import torch
from torch import nn

from lightsft import injecting, registry
from lightsft.errors import BackboneError, LightsftError
from lightsft.primitives import Side
from lightsft.seeding import generator
from lightsft.targets import select_modules
from lightsft.testing import CHECKS, TINY_MODELS, ContractError, check_strategy
from tests.tiny_models import batch, tiny

# What a strategy needs to be told, or what keeps it small; the others run with their defaults.
OPTIONS = {
    "adapter": {"reduction_factor": 4},
    "combined": {"strategies": ("lora", "prompt")},
    "new_tokens": {"rows": tuple(range(100))},
    "prefix": {"num_virtual_tokens": 4},
}
MEMBERS = {"peft": "peft/loha"}  # of a family, one
REFUSED = {
    ("bitfit", "decoder"): "no bias in LlamaForCausalLM",
    ("bitfit", "encoder-decoder"): "no bias in T5ForConditionalGeneration",
}


@pytest.mark.parametrize("model", TINY_MODELS)
@pytest.mark.parametrize("name", registry.strategies())
def test_every_installed_strategy_keeps_the_contract(name, model):
    strategy = registry.strategy(MEMBERS.get(name, name), **OPTIONS.get(name, {}))
    if (name, model) in REFUSED:
        with pytest.raises(LightsftError, match=REFUSED[name, model]):
            check_strategy(strategy, model)
    else:
        check_strategy(strategy, model)


# ---- strategies that break it


class Offset(Side):
    """y = h + offset, merged into the bias."""

    mergeable = True

    def __init__(self, size):
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(size))

    def forward(self, served, inputs, output):
        return output + self.offset

    def merged(self, served):
        return {"bias": served.bias + self.offset}


@dataclass(frozen=True)
class Sound:
    """Keeps the contract: what the others below break in one point each."""

    targets: str = "query"

    def side(self, size, random):
        return Offset(size)

    def inject(self, backbone, *, seed=0):
        with injecting(self, backbone, seed) as injection:
            for name in select_modules(backbone, self.targets):
                side = self.side(backbone.module(name).out_features, generator(seed, name))
                injection.add_side(name, side)
        return injection


class LeaksATrainableParameter(Sound):
    def inject(self, backbone, *, seed=0):
        injection = super().inject(backbone, seed=seed)
        injection.model.bert.embeddings.LayerNorm.weight.requires_grad_(True)
        return injection


class StopsTheGradient(Sound):
    def inject(self, backbone, *, seed=0):
        injection = super().inject(backbone, seed=seed)
        primitive = injection.primitives[0]
        primitive.side.unused = nn.Parameter(torch.zeros(1))
        return injection


class LosesItsEffect(Sound):
    def inject(self, backbone, *, seed=0):
        injection = super().inject(backbone, seed=seed)
        for primitive in injection.primitives[:2]:  # one for each block
            primitive.enable(False)
        return injection


class ChangesAWeight(Sound):
    def inject(self, backbone, *, seed=0):
        with torch.no_grad():
            backbone.model.bert.pooler.dense.weight.mul_(1.0001)
        return super().inject(backbone, seed=seed)


class ChangesTheMode(Sound):
    def inject(self, backbone, *, seed=0):
        injection = super().inject(backbone, seed=seed)
        injection.model.bert.pooler.train()
        return injection


class LeavesAHook(Sound):
    def inject(self, backbone, *, seed=0):
        backbone.model.bert.register_forward_hook(_does_nothing)
        return super().inject(backbone, seed=seed)


def _does_nothing(module, args, output):
    return None


class HalfMerged(Offset):
    def merged(self, served):
        return {"bias": served.bias + 0.999 * self.offset}


class MergesWrongly(Sound):
    def side(self, size, random):
        return HalfMerged(size)


class Forgetful(Offset):
    def __init__(self, size):
        super().__init__(size)
        self.register_buffer("calls", torch.zeros(()))
        self.start = torch.zeros(size)

    def tensors(self):
        return {"offset": self.start}

    def load(self, tensors):
        pass


class LosesStateOnSaving(Sound):
    def side(self, size, random):
        return Forgetful(size)


class Wilful(Offset):
    @property
    def enabled(self):
        return True

    @enabled.setter
    def enabled(self, value):
        pass


class CannotBeDisabled(Sound):
    def side(self, size, random):
        return Wilful(size)


class DrawsAnything(Sound):
    def side(self, size, random):
        side = Offset(size)
        nn.init.normal_(side.offset)
        return side


class Bound(Offset):
    """Its forward is a closure over its own parameter, as a hook in a local function is."""

    def __init__(self, size):
        super().__init__(size)
        self.shift = _Shift(self.offset)

    def forward(self, served, inputs, output):
        return self.shift(output)


class _Shift:
    def __init__(self, offset):
        self.offset = [offset]

    def __call__(self, output):
        return output + self.offset[0]

    def __deepcopy__(self, memo):
        return self


class SharesTensorsWithItsCopies(Sound):
    def side(self, size, random):
        return Bound(size)


class CannotBePickled(Sound):
    def side(self, size, random):
        side = Offset(size)
        side.register_forward_hook(lambda module, args, output: None)
        return side


BROKEN = {
    LeaksATrainableParameter: "only its own tensors are trainable: bert.embeddings.LayerNorm.weight requires",
    StopsTheGradient: "every tensor gets a gradient: bert.encoder.layer.0.attention.self.query.unused gets none",
    LosesItsEffect: "it changes the output: 0.1 of noise on its tensors changes nothing",
    ChangesAWeight: "ejected it leaves no trace: bert.pooler.dense.weight has other values",
    ChangesTheMode: "ejected it leaves no trace: bert.pooler has mode training; expected evaluation",
    LeavesAHook: "ejected it leaves no trace: bert has hooks 1; expected 0",
    MergesWrongly: "merged it computes the same: merged outputs are off by",
    LosesStateOnSaving: "what is saved loads: outputs are off by",
    CannotBeDisabled: "disabled it is the backbone: outputs are off by",
    DrawsAnything: "a seed decides its start: bert.encoder.layer.0.attention.self.query.offset has other values",
    SharesTensorsWithItsCopies: "copies carry it: training the deep copy",
    CannotBePickled: "copies carry it: AttributeError",
}


@pytest.fixture
def registered(monkeypatch):
    """The strategies of this file, found by name like any other."""
    known = list(registry.entry_points(group=registry.GROUP))
    mine = [EntryPoint(kind.__name__, f"{__name__}:{kind.__name__}", registry.GROUP) for kind in (Sound, *BROKEN)]
    monkeypatch.setattr(registry, "entry_points", lambda group: [*known, *mine])
    registry._entries.cache_clear()
    yield
    monkeypatch.undo()
    registry._entries.cache_clear()


def test_a_sound_strategy_passes(registered):
    check_strategy(Sound(), "encoder")


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_a_broken_strategy_is_caught_by_what_it_breaks(kind, registered):
    with pytest.raises(ContractError) as caught:
        check_strategy(kind(), "encoder")
    assert BROKEN[kind] in str(caught.value), str(caught.value)
    assert kind.__name__ in str(caught.value)


def test_every_check_is_failed_by_something_here():
    caught = {message.partition(":")[0].replace(" ", "_") for message in BROKEN.values()}
    assert {check.__name__ for check in CHECKS} == caught


def test_a_failure_says_what_was_expected(registered):
    with pytest.raises(ContractError) as caught:
        check_strategy(MergesWrongly(), "encoder")
    assert "; expected at most" in str(caught.value)


def test_an_unregistered_strategy_is_told_how_to_register():
    with pytest.raises(ContractError, match="is not registered as a strategy"):
        check_strategy(Sound(), "encoder")


# ---- models and inputs


def test_a_function_that_makes_a_model_will_do(registered):
    check_strategy(Sound(), lambda: tiny("roberta"))


def test_inputs_may_be_given(registered):
    inputs = batch(tiny("bert"), labels=False)
    check_strategy(Sound(), lambda: tiny("bert"), inputs)
    seen = []
    model = tiny("bert")
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    with pytest.raises(ContractError):  # the hook makes copies of this one model differ
        check_strategy(Sound(), lambda: model, inputs)
    assert all(torch.equal(ids, inputs["input_ids"]) for ids in seen)


def test_an_unknown_tiny_model_lists_those_there_are():
    with pytest.raises(BackboneError, match="no tiny model named 'huge'") as caught:
        check_strategy(Sound(), "huge")
    assert "decoder, encoder, encoder-decoder" in caught.value.expected


@pytest.mark.parametrize("name", TINY_MODELS)
def test_tiny_models_are_equal_and_leave_the_random_state_alone(name):
    before = torch.get_rng_state()
    first, second = TINY_MODELS[name](), TINY_MODELS[name]()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert sum(parameter.numel() for parameter in first.parameters()) < 100_000


def test_a_refusal_is_passed_on(registered):
    with pytest.raises(LightsftError, match="nowhere"):
        check_strategy(dataclasses.replace(Sound(), targets="nowhere"), "encoder")
