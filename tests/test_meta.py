"""A model without weights shows the same as one with them: forward passes follow the same path on shapes alone."""

import pytest
import torch
from torch import nn

from lightsft import Backbone
from lightsft.meta import LARGEST_KNOWN, weightless
from lightsft.seeding import generator
from lightsft_adapters import Adapter, Full, LoRA, Prefix
from tests.tiny_models import batch, tiny
from tests.zoo.models_and_inputs import build, find

READ = ("blocks", "head", "weights", "routers", "expert_counts", "attention", "cross_attention", "idle")

# Plain ones, and those whose code looks at values: experts chosen in loops and by sorting, masks, pooling by padding.
ARCHITECTURES = [
    ("causal-lm", "llama"),
    ("causal-lm", "mixtral"),
    ("causal-lm", "dbrx"),
    ("causal-lm", "deepseek_v3"),
    ("causal-lm", "mamba"),
    ("seq-cls", "gpt_oss"),
    ("seq-cls", "bart"),
    ("masked-lm", "bert"),
    ("qa", "xlnet"),
    ("seq2seq", "t5"),
    ("image-cls", "bit"),
    ("audio-cls", "wav2vec2"),
]


@pytest.mark.parametrize(("task", "model_type"), ARCHITECTURES)
def test_the_anatomy_without_weights_is_that_with_them(task, model_type):
    entry = find(task, model_type)
    real = Backbone(build(entry)).anatomy
    with weightless():
        model = build(entry)
        light = Backbone(model).anatomy
    assert all(parameter.is_meta for parameter in model.parameters())
    assert {name: getattr(light, name) for name in READ} == {name: getattr(real, name) for name in READ}
    assert light.trace.writers == real.trace.writers
    assert light.trace.calls.keys() == real.trace.calls.keys()


@pytest.mark.parametrize("strategy", [LoRA(), Adapter(4), Prefix(4), Full()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_a_strategy_trains_the_same_shapes_without_weights(strategy, name):
    real = strategy.inject(Backbone(tiny(name)))
    with weightless():
        light = strategy.inject(Backbone(tiny(name)))
    assert shapes(light) == shapes(real)
    assert light.coverage == real.coverage
    assert all(parameter.is_meta for parameter in light.model.parameters())


def shapes(injection):
    return {name: tuple(parameter.shape) for name, parameter in injection.named_parameters().items()}


def test_nothing_is_allocated():
    with weightless():
        layer = nn.Linear(1 << 20, 1 << 20)
        nn.init.kaiming_uniform_(layer.weight, generator=generator(0, "weight"))
        assert layer(torch.empty(2, 1 << 20)).shape == (2, 1 << 20)
        assert torch.zeros(LARGEST_KNOWN + 1).is_meta


# ---- values


def test_values_that_depend_on_no_weight_are_known():
    with weightless():
        ids = torch.tensor([[5, 7, 0, 0]])
        mask = (ids != 0).long()
        assert ids.is_meta
        assert int(mask.sum()) == 2
        assert ids[mask.bool()].tolist() == [5, 7]
        assert mask.cumsum(1).tolist() == [[1, 2, 2, 2]]
        assert torch.linspace(0, 1, 3).tolist() == [0, 0.5, 1]
        assert f"row_{ids[0, 1]}" == "row_7"
        assert bool(mask.all()) is False


def test_known_values_follow_writes_and_views():
    with weightless():
        table = torch.zeros(2, 3, dtype=torch.long)
        row = table[1]
        row.fill_(4)
        table[0, 2] = 9
        assert table.tolist() == [[0, 0, 9], [4, 4, 4]]
        assert row.is_meta


def test_values_that_depend_on_weights_are_made_up():
    with weightless():
        hidden = nn.Linear(4, 6)(torch.ones(5, 4))
        assert hidden.sum().item() == 0
        assert not torch.isnan(hidden).any()
        assert (hidden == hidden).all()
        assert hidden[hidden > 0].numel() == hidden.numel()
        chosen = hidden.topk(2).indices
        assert chosen.tolist() == [[0, 1], [2, 3], [4, 5], [0, 1], [2, 3]]
        assert hidden.argmax(-1).tolist() == [0, 1, 2, 3, 4]


def test_equal_operations_on_equal_shapes_give_equal_shapes():
    with weightless():
        x = torch.empty(3, 4, dtype=torch.bfloat16)
        for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
            y = x.to(dtype)
            assert [(y * y).dtype, (y * 2).dtype, (y * y.T.contiguous().T).shape] == [dtype, dtype, (3, 4)]
            assert (y * y)[:2].shape == (2, 4)
        assert x.sum(0).shape == (4,)
        assert x.sum(1).shape == (3,)


def test_gradients_flow_through_shapes():
    with weightless():
        model = tiny("bert")
        model(**batch(model)).loss.backward()
        assert all(p.grad.shape == p.shape for n, p in model.named_parameters() if "pooler" in n)


def test_one_within_another_is_the_same_one():
    with weightless():
        ids = torch.tensor([1, 2])
        with weightless():
            assert ids.tolist() == [1, 2]
        assert ids.tolist() == [1, 2]


def test_outside_nothing_has_changed():
    with weightless():
        pass
    assert not torch.ones(2).is_meta
    assert f"{torch.tensor(3)}" == "3"
    assert "meta" in f"{torch.ones((), device='meta')}"


def test_an_error_in_a_model_stays_an_error():
    with weightless(), pytest.raises(RuntimeError, match="mat1 and mat2"):
        nn.Linear(3, 4)(torch.empty(2, 5))
