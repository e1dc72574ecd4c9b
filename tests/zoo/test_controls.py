"""The checks catch what they are for: small damage at every stage makes the step fail that looks at it."""

from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file, save_file

import lightsft
from lightsft.primitives import Side
from lightsft.targets import select_modules
from tests.zoo.checks import ADAPTER, check
from tests.zoo.models_and_inputs import find

LLAMA, EXPERTS, NORMALISED = ("causal-lm", "llama"), ("causal-lm", "mixtral"), ("image-cls", "regnet")


def damaged(architecture, strategy, stage, damage):
    """The outcome when `damage(subject)` is done at `stage`; without it, all of it passes."""
    done = []

    def tamper(reached, subject):
        if reached == stage:
            done.append(damage(subject))

    outcome = check(find(*architecture), strategy, tamper=tamper)
    assert done, "the damage was never done"
    return outcome


def edit_saved(change):
    """Damage that rewrites the tensors of the saved folder."""

    def damage(subject):
        (path,) = (subject.folder / ADAPTER).glob("*.safetensors")
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return damage


def first(names, part):
    return next(name for name in sorted(names) if part in name)


@pytest.mark.parametrize(
    ("architecture", "strategy"),
    [(LLAMA, "full"), (LLAMA, "lora"), (EXPERTS, "full"), (EXPERTS, "lora"), (NORMALISED, "full")],
    ids=lambda value: value if isinstance(value, str) else value[1],
)
def test_what_is_not_damaged_passes(architecture, strategy):
    outcome = check(find(*architecture), strategy)
    assert outcome["status"] == "passed", outcome


def test_a_thousandth_more_of_one_saved_b_is_caught():
    def change(tensors):
        tensors[first(tensors, "lora_B")] *= 1.001

    outcome = damaged(LLAMA, "lora", "saved", edit_saved(change))
    assert (outcome["status"], outcome["step"]) == ("failed", "save and load")


def test_a_thousandth_more_of_one_b_in_the_merge_is_caught():
    def damage(subject):
        with torch.no_grad():
            trained = subject.loaded.named_parameters()
            trained[first(trained, "lora_B")].mul_(1.001)

    outcome = damaged(LLAMA, "lora", "loaded", damage)
    assert (outcome["status"], outcome["step"]) == ("failed", "merge")
    assert outcome["merge_error"] < 1e-3  # far below what an eye on absolute differences sees


@pytest.mark.parametrize("strategy", ["full", "lora"])
def test_two_experts_swapped_in_the_saved_file_are_caught(strategy):
    def change(tensors):
        for name in experts_in(tensors):
            tensors[name][:2] = tensors[name][:2].flip(0)

    outcome = damaged(EXPERTS, strategy, "saved", edit_saved(change))
    assert (outcome["status"], outcome["step"]) == ("failed", "save and load")


@pytest.mark.parametrize("strategy", ["full", "lora"])
def test_the_updates_of_two_experts_swapped_in_the_merge_are_caught(strategy):
    def damage(subject):
        state = subject.merged.state_dict()
        for name in experts_in(state):
            update = state[name] - subject.state[name]
            state[name].copy_(subject.state[name])
            state[name][:2] += update[:2].flip(0)
            state[name][2:] += update[2:]

    outcome = damaged(EXPERTS, strategy, "merged", damage)
    assert (outcome["status"], outcome["step"]) == ("failed", "merge")


def experts_in(tensors):
    """Names of the tensors that hold one matrix per expert, (experts, ., .)."""
    names = [name for name, tensor in tensors.items() if "experts" in name and tensor.ndim == 3]
    assert names, "no tensor holds experts"
    return names


def test_a_dropped_buffer_is_caught():
    def change(tensors):
        del tensors[first(tensors, "running_mean")]

    outcome = damaged(NORMALISED, "full", "saved", edit_saved(change))
    assert (outcome["status"], outcome["step"]) == ("failed", "save and load")
    assert "running_mean" in outcome["reason"]


def test_a_key_left_in_the_merged_model_is_caught():
    def damage(subject):
        subject.merged.register_buffer("left_over", torch.zeros(1))

    outcome = damaged(LLAMA, "lora", "merged", damage)
    assert (outcome["status"], outcome["step"]) == ("failed", "merge")
    assert "left_over" in outcome["reason"]


def test_a_hook_left_on_the_merged_model_is_caught():
    def damage(subject):
        subject.merged.get_input_embeddings().register_forward_hook(lambda *arguments: None)

    outcome = damaged(LLAMA, "lora", "merged", damage)
    assert (outcome["status"], outcome["step"]) == ("failed", "merge")


class _OnlyWhenEvaluating(Side):
    """y + b in eval mode: in train mode b is idle, which the probe, in eval mode, cannot see."""

    def __init__(self, size):
        super().__init__()
        self.shift = torch.nn.Parameter(torch.zeros(size))

    def forward(self, served, inputs, output):
        return output if self.training else output + self.shift


@dataclass(frozen=True)
class _Idle:
    def inject(self, backbone, *, seed=0):
        with lightsft.injecting(self, backbone, seed) as injection:
            for name in select_modules(backbone, "attention"):
                injection.add_side(name, _OnlyWhenEvaluating(backbone.module(name).out_features))
            injection.unfreeze(["model.norm.weight"])
        return injection


def test_a_trainable_tensor_without_a_gradient_is_caught():
    outcome = check(find(*LLAMA), _Idle())
    assert (outcome["status"], outcome["step"]) == ("failed", "train")
    assert "no gradient reaches" in outcome["reason"]
