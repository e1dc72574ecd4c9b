"""What a piece of code changed on a model is taken back and made again."""

import copy

import pytest
import torch
from torch import nn

from lightsft_adapters.edits import watching


def model():
    torch.manual_seed(0)
    return nn.ModuleDict({"first": nn.Linear(3, 3), "second": nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))})


def changes():
    """Ways to change a model, by what each does."""
    return {
        "a child replaced": lambda m: m.__setitem__("first", nn.Identity()),
        "a child added": lambda m: m["second"].add_module("third", nn.Linear(2, 2)),
        "a child removed": lambda m: m.__delitem__("first"),
        "a parameter replaced": lambda m: setattr(m["first"], "weight", nn.Parameter(torch.zeros(3, 3))),
        "a hook": lambda m: m["first"].register_forward_hook(lambda module, args, output: output + 1),
        "an attribute": lambda m: setattr(m, "peft_config", {}),
        "values assigned": lambda m: setattr(m["first"].weight, "data", torch.ones(3, 3)),
        "values written": lambda m: m["first"].weight.data.add_(1),
        "values copied from elsewhere": lambda m: m["first"].bias.data.copy_(torch.ones(3)),
        "a row written": lambda m: m["first"].weight.data[1].mul_(2),
        "a buffer written": lambda m: m["second"][1].running_mean.add_(1),
    }


def state(m):
    """Everything that can be seen of a model: the tree by identity, values by bits, hooks and attributes."""
    modules = [(name, id(module), len(module._forward_hooks)) for name, module in m.named_modules()]
    return modules, {name: tensor.tolist() for name, tensor in m.state_dict().items()}, hasattr(m, "peft_config")


@pytest.mark.parametrize("change", changes())
def test_undone_the_model_is_as_it_was_and_redone_as_it_was_changed(change):
    m = model()
    before, parameters = state(m), dict(m.named_parameters())
    with watching(m) as edits:
        changes()[change](m)
    changed = state(m)
    assert changed != before
    for _ in range(2):
        edits.undo()
        assert state(m) == before
        assert all(parameter is parameters[name] for name, parameter in m.named_parameters())
        edits.redo()
        assert state(m) == changed


def test_an_error_leaves_no_trace():
    m = model()
    before = state(m)

    def fail():
        with watching(m):
            m["first"].weight.data.zero_()
            m["second"] = nn.Identity()
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail()
    assert state(m) == before


def test_only_what_is_written_is_copied():
    m = model()
    with watching(m) as edits:
        m["first"].weight.data.add_(1)
        _ = m["second"][0].weight + 1
    assert [value.tensor is m["first"].weight for value in edits.values] == [True]


def test_replaced_modules_are_told_by_name_and_can_be_put_back_one_by_one():
    m = model()
    former = m["first"], m["second"][0]
    with watching(m) as edits:
        m["first"], m["second"][0] = nn.Identity(), nn.Identity()
    assert {name: before for name, (before, _) in edits.replaced.items()} == dict(
        zip(["first", "second.0"], former, strict=True)
    )
    edits.drop("second.0")
    assert (type(m["first"]), m["second"][0]) == (nn.Identity, former[1])
    assert list(edits.replaced) == ["first"]
    edits.undo()
    assert m["first"] is former[0]


def test_a_kept_tensor_gets_its_former_values_back_and_its_trained_ones_again():
    m = model()
    with watching(m) as edits:
        pass
    bias = m["first"].bias
    former = bias.tolist()
    edits.keep(bias)
    bias.data.add_(1)
    trained = bias.tolist()
    edits.undo()
    assert bias.tolist() == former
    edits.redo()
    assert bias.tolist() == trained != former


def test_what_others_place_afterwards_stays():
    m = model()
    with watching(m) as edits:
        m["first"].register_forward_hook(lambda module, args, output: output + 1)
    m["first"].register_forward_hook(lambda module, args, output: output * 2)
    edits.undo()
    assert len(m["first"]._forward_hooks) == 1
    assert torch.equal(m["first"](torch.zeros(3)), 2 * m["first"].bias)


@pytest.mark.parametrize("change", changes())
def test_a_deep_copy_is_put_back_by_itself(change):
    m = model()
    before = state(copy.deepcopy(m))[1:]
    with watching(m) as edits:
        changes()[change](m)
    changed = state(m)
    twin, its_edits = copy.deepcopy((m, edits))
    its_edits.undo()
    assert state(twin)[1:] == before
    assert vars(twin).keys() == vars(model()).keys()
    assert len(twin["first"]._forward_hooks if "first" in twin else ()) == 0
    assert state(m) == changed
