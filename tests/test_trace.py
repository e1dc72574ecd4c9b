"""What a trace reports of small modules that do one thing each, and that it leaves them as they were."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightsft.errors import InjectionError
from lightsft.trace import meta_copy, nearest_called, trace

BATCH, LENGTH, SIZE, EXPERTS = 2, 5, 8, 3


def given():
    return {"x": torch.randn(BATCH, LENGTH, SIZE, generator=torch.Generator().manual_seed(0))}


def traced(model, blocks=(), **inputs):
    return trace(model, inputs or given(), tuple(blocks))


def linear():
    return nn.Linear(SIZE, SIZE)


class Wrapped(nn.Module):
    """A model of one block, `block`; its output is a tuple, as a model's often is."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, **others):
        return (self.block(x, **others),)


def writers(block):
    return traced(Wrapped(block), ["block"]).writers


# ---- what writes to the residual stream


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = linear(), linear()

    def forward(self, x):
        return self.down(self.up(x).relu())


class Sequential(nn.Module):
    """Two sublayers with norms before them, dropout and a gate after them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = FeedForward(), FeedForward()
        self.norm, self.dropout = nn.LayerNorm(SIZE), nn.Dropout(0.1)
        self.gate = nn.Parameter(torch.ones(SIZE))

    def forward(self, x):
        x = x + self.dropout(self.first(self.norm(x)))
        return self.gate * self.second(self.norm(x)) + x


class NormsAfter(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = FeedForward(), FeedForward()
        self.one, self.two = nn.LayerNorm(SIZE), nn.LayerNorm(SIZE)

    def forward(self, x):
        x = self.one(self.first(x) + x)
        return self.two(x + self.second(x))


class Parallel(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.norm = FeedForward(), FeedForward(), nn.LayerNorm(SIZE)

    def forward(self, x):
        hidden = self.norm(x)
        return x + self.first(hidden) + self.second(hidden)


class Output(nn.Module):
    """A layer that is handed the stream and adds to it inside, as BERT's output layers do."""

    def __init__(self):
        super().__init__()
        self.dense, self.norm = linear(), nn.LayerNorm(SIZE)

    def forward(self, hidden, stream):
        return self.norm(self.dense(hidden) + stream)


class AddedInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.output = linear(), Output()

    def forward(self, x):
        return self.output(self.up(x), x)


class SumOfTwo(nn.Module):
    """What is added is a sum of what two modules returned: neither of them writes it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = linear(), linear()

    def forward(self, x):
        return x + (self.first(x) + self.second(x))


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (Sequential, ("block.first.down", "block.second.down")),
        (NormsAfter, ("block.first.down", "block.second.down")),
        (Parallel, ("block.first.down", "block.second.down")),
        (AddedInside, ("block.output.dense",)),
        (SumOfTwo, ()),
    ],
)
def test_the_layers_whose_output_is_added_to_the_stream_write_it(block, expected):
    assert writers(block()) == expected


def test_sums_outside_of_blocks_are_no_writes():
    assert traced(Wrapped(Sequential())).writers == ()


# ---- which weights are multiplied, and where they are read


class Borrower(nn.Module):
    """Multiplies with the weight of a layer that belongs to its sibling and is never called."""

    def __init__(self):
        super().__init__()
        self.own = linear()

    def forward(self, x, weight):
        return functional.linear(self.own(x), weight.t())


class Lending(nn.Module):
    def __init__(self):
        super().__init__()
        self.lender, self.borrower = linear(), Borrower()

    def forward(self, x):
        return self.borrower(x, self.lender.weight)


def readers(model, name, **inputs):
    return traced(model, **inputs).multiplied.get(name)


def test_a_weight_is_read_by_the_layer_that_is_called():
    assert readers(Wrapped(FeedForward()), "block.up.weight") == {"block.up"}


def test_a_weight_that_another_module_multiplies_with_is_read_there():
    model = Wrapped(Lending())
    assert readers(model, "block.lender.weight") == {"block.borrower"}
    assert readers(model, "block.borrower.own.weight") == {"block.borrower.own"}
    assert "block.lender" not in traced(model).calls


class Products(nn.Module):
    """One parameter for each way of multiplying with it, and two that are not multiplied with."""

    def __init__(self):
        super().__init__()
        names = ("matmul", "operator", "einsum", "indexed", "stacked", "scale", "unused")
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.randn(SIZE, SIZE)))
        self.indexed = nn.Parameter(torch.randn(EXPERTS, SIZE, SIZE))
        self.stacked = nn.Parameter(torch.randn(BATCH, SIZE, SIZE))
        self.direction = nn.Parameter(torch.randn(SIZE))
        self.conv = nn.Conv1d(SIZE, SIZE, 3, padding=1)
        self.table = nn.Embedding(10, SIZE)

    def forward(self, x):
        x = torch.matmul(x, self.matmul.mT) @ self.operator
        x = torch.einsum("bti,oi->bto", x, self.einsum)
        x = x @ self.indexed[1]
        x = torch.bmm(x, self.stacked)
        x = self.conv(x.mT).mT
        return x * self.scale[0] + self.table(torch.arange(LENGTH)) + (x @ self.direction)[..., None]


def test_every_way_of_multiplying_with_a_weight_is_seen():
    model = Wrapped(Products())
    seen = traced(model)
    matrices = {name for name in seen.multiplied if model.get_parameter(name).ndim >= 2}
    direct = {"matmul", "operator", "einsum", "indexed", "stacked"}
    assert matrices == {*(f"block.{name}" for name in direct), "block.conv.weight"}
    assert seen.multiplied.keys() - matrices == {"block.conv.bias", "block.direction"}
    assert all(seen.multiplied[f"block.{name}"] == {"block"} for name in direct)


class ReadInTraining(nn.Module):
    """Multiplies with its second weight in training mode only."""

    def __init__(self):
        super().__init__()
        self.always, self.trained = linear(), nn.Parameter(torch.randn(SIZE, SIZE))

    def forward(self, x):
        x = self.always(x)
        return x @ self.trained if self.training else x


def test_a_weight_that_is_read_in_training_mode_alone_counts():
    seen = traced(Wrapped(ReadInTraining()))
    assert seen.multiplied["block.trained"] == {"block"}
    assert {"block.trained", "block.always.weight"} <= seen.used


class RefusesToTrain(ReadInTraining):
    def forward(self, x):
        assert not self.training
        return super().forward(x)


def test_a_model_that_refuses_the_input_in_training_mode_is_traced_in_the_other():
    seen = traced(Wrapped(RefusesToTrain()))
    assert "block.always.weight" in seen.multiplied
    assert "block.trained" not in seen.multiplied


class Detached(nn.Module):
    """A branch that the output does not depend on, and a tower that never runs."""

    def __init__(self):
        super().__init__()
        self.main, self.side, self.tower = linear(), linear(), FeedForward()

    def forward(self, x):
        return self.main(x) + self.side(x).detach().argmax(-1, keepdim=True)


def test_only_parameters_that_the_output_depends_on_are_used():
    seen = traced(Wrapped(Detached()))
    assert seen.used == {"block.main.weight", "block.main.bias"}
    assert list(seen.calls) == ["block.main", "block.side", "block", ""]
    assert seen.calls["block.side"].input_shape == (BATCH, LENGTH, SIZE)


def test_calls_hold_shapes_of_the_first_tensors():
    model = nn.Sequential(nn.Linear(SIZE, 3), nn.Flatten(0, 1))

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = model

        def forward(self, x):
            return {"states": self.layers(x)}

    calls = traced(Named()).calls
    assert calls["layers.0"].output_shape == (BATCH, LENGTH, 3)
    assert calls["layers.1"].input_shape == (BATCH, LENGTH, 3)
    assert calls["layers.1"].output_shape == (BATCH * LENGTH, 3)
    assert calls[""].input_shape == (BATCH, LENGTH, SIZE)


def test_a_module_that_is_called_again_counts_by_its_last_call():
    class Twice(FeedForward):
        def forward(self, x):
            return self.up(self.down(self.up(x))[:, :2])

    calls = traced(Wrapped(Twice())).calls
    assert list(calls) == ["block.down", "block.up", "block", ""]
    assert calls["block.up"].input_shape == (BATCH, 2, SIZE)


def test_the_nearest_called_module_is_the_innermost_one_that_ran():
    calls = traced(Wrapped(Lending())).calls
    assert nearest_called("block.borrower.own", calls) == "block.borrower.own"
    assert nearest_called("block.lender", calls) == "block"
    assert nearest_called("elsewhere", calls) == ""
    with pytest.raises(InjectionError, match="never called"):
        nearest_called("block", {})


# ---- attention


class Attention(nn.Module):
    """Queries from x, keys and values from `source` or x; `core` computes softmax(Q K^T) V."""

    def __init__(self, core):
        super().__init__()
        self.q, self.k, self.v = linear(), linear(), linear()
        self.core = core

    def forward(self, x, source=None):
        source = x if source is None else source
        return self.core(self.q(x), self.k(source), self.v(source))


class WrittenOut(nn.Module):
    """Attention without a parameter of its own, its scores as in ALiBi, masked and divided."""

    def forward(self, q, k, v):
        scores = torch.baddbmm(torch.zeros(1, 1, k.shape[1]), q, k.mT) / SIZE**0.5
        scores = (scores + torch.arange(k.shape[1])).masked_fill(torch.zeros(1, dtype=torch.bool), -1e9)
        return scores.softmax(-1) @ v


class Fused(nn.Module):
    def forward(self, q, k, v):
        return functional.scaled_dot_product_attention(q, k, v)


class ByEinsum(nn.Module):
    def forward(self, q, k, v):
        weights = torch.einsum("bqd,bkd->bqk", q, k)
        return torch.einsum("bqk,bkd->bqd", nn.Softmax(dim=-1)(weights.float()).to(q.dtype), v)


class WithSink(nn.Module):
    def forward(self, q, k, v):
        scores = q @ k.mT
        scores = torch.cat([scores, torch.zeros(*scores.shape[:-1], 1)], dim=-1)
        return scores.softmax(-1)[..., :-1] @ v


class ByTorch(nn.Module):
    """All of it in one function of torch's, its projections included."""

    def forward(self, q, k, v):
        eye, (q, k, v) = torch.eye(SIZE), (tensor.transpose(0, 1) for tensor in (q, k, v))
        given = (q, k, v, SIZE, 2, eye.repeat(3, 1), None, None, None, False, 0.0, eye, None)
        return functional.multi_head_attention_forward(*given)[0].transpose(0, 1)


CORES = [WrittenOut, Fused, ByEinsum, WithSink, ByTorch]


@pytest.mark.parametrize("core", CORES)
def test_an_attention_is_the_innermost_module_with_parameters_around_the_softmax(core):
    (site,) = traced(Wrapped(Attention(core()))).attentions
    assert site.name == "block"
    assert not site.cross


@pytest.mark.parametrize("core", CORES)
def test_an_attention_whose_keys_are_of_another_length_reads_another_sequence(core):
    inputs = given() | {"source": torch.randn(BATCH, LENGTH + 2, SIZE)}
    (site,) = traced(Wrapped(Attention(core())), **inputs).attentions
    assert site.cross


class SelfAttention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x)[0]


def test_torchs_own_attention_module_is_one_and_reads_all_its_weights():
    found = traced(Wrapped(SelfAttention(SIZE, 2, batch_first=True)))
    assert [site.name for site in found.attentions] == ["block"]
    assert {name: found.multiplied[name] for name in ("block.in_proj_weight", "block.out_proj.weight")} == {
        "block.in_proj_weight": {"block"},
        "block.out_proj.weight": {"block"},
    }


class Gated(nn.Module):
    """A softmax of a product with a weight: a router's, or a classifier's."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(SIZE, EXPERTS)

    def forward(self, x):
        return self.router(x).softmax(-1) @ torch.ones(EXPERTS, SIZE)


def test_a_softmax_of_a_product_with_a_weight_is_no_attention():
    assert traced(Wrapped(Gated())).attentions == ()


# ---- what selects experts


class Experts(nn.Module):
    """Expert i is chosen by `choose` from the router's logits."""

    def __init__(self, choose, router):
        super().__init__()
        self.choose, self.router = choose, router
        self.up = nn.Parameter(torch.randn(EXPERTS, SIZE, SIZE))

    def forward(self, x):
        chosen = self.choose(self.router(x))
        return torch.einsum("bti,btio->bto", x, self.up[chosen])


class DirectRouter(nn.Module):
    """A parameter that is read directly, over flattened tokens."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, SIZE))

    def forward(self, x):
        return functional.linear(x.reshape(-1, SIZE), self.weight).view(*x.shape[:-1], EXPERTS)


CHOICES = {
    "topk of probabilities": lambda logits: logits.softmax(-1).topk(1).indices[..., 0],
    "topk of biased scores": lambda logits: (logits.sigmoid() + torch.arange(EXPERTS)).topk(2)[1][..., 0],
    "argmax": lambda logits: logits.argmax(-1),
    "max": lambda logits: logits.float().max(dim=-1).indices,
    "sort": lambda logits: logits.sort(descending=True).indices[..., 0],
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize(
    "router", [lambda: nn.Linear(SIZE, EXPERTS, bias=False), DirectRouter], ids=["layer", "direct"]
)
def test_a_router_is_what_experts_are_selected_by(choice, router):
    seen = traced(Wrapped(Experts(CHOICES[choice], router())))
    assert seen.selectors == {"block.router.weight": EXPERTS}


class Pooled(nn.Module):
    """The largest of a layer's outputs over positions: nothing is selected among as many as the layer has rows."""

    def __init__(self):
        super().__init__()
        self.dense = linear()

    def forward(self, x):
        return self.dense(x).mT.max(dim=-1).values


def test_a_maximum_over_positions_selects_no_experts():
    assert traced(Wrapped(Pooled())).selectors == {}


# ---- what it leaves behind: nothing


class Restless(nn.Module):
    """Everything that a pass could leave behind: dropout, running statistics, random numbers, mixed modes."""

    def __init__(self):
        super().__init__()
        self.norm, self.dropout, self.out = nn.BatchNorm1d(SIZE), nn.Dropout(0.5), linear()
        self.fails = False

    def forward(self, x):
        if self.fails:
            raise RuntimeError("stop")
        x = self.norm((x + torch.rand(())).mT).mT
        return self.out(self.dropout(x))


def restless():
    model = Wrapped(Restless())
    model.train()
    model.block.norm.eval()
    model.block.out.weight.requires_grad_(False)
    model.block.out.register_forward_hook(lambda module, args, output: output * 2)
    return model


def state(model):
    return {
        "trained": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "gradients": {name: parameter.grad for name, parameter in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "hooks": [
            len(table)
            for module in model.modules()
            for table in (module._forward_hooks, module._forward_pre_hooks, module._forward_hooks_always_called)
        ],
        "keys": [sorted(vars(module)) for module in model.modules()],
    }


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_and_the_random_state_are_left_as_they_were(fails):
    model = restless()
    model.block.fails = fails
    before, random = state(model), torch.get_rng_state()
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if fails:
        with pytest.raises(RuntimeError, match="stop"):
            traced(model, ["block"])
    else:
        traced(model, ["block"])
    assert state(model) == before
    assert torch.equal(torch.get_rng_state(), random)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name


def test_no_mode_is_left_open():
    model = restless()
    model.block.fails = True
    with pytest.raises(RuntimeError, match="stop"):
        traced(model)
    assert torch.overrides._get_current_function_mode_stack() == []


def test_a_copy_without_weights_is_traced_alike():
    model = Wrapped(Attention(WrittenOut()))
    copy = meta_copy(model)
    assert {parameter.device.type for parameter in copy.parameters()} == {"meta"}
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    with torch.device("meta"):
        on_meta = trace(copy, {"x": torch.empty(BATCH, LENGTH, SIZE)}, ("block",))
    assert on_meta == traced(model, ["block"])


def test_a_copy_without_weights_keeps_what_is_tied_and_what_is_trained():
    model = nn.Sequential(linear(), linear())
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    copy = meta_copy(model)
    assert copy[1].weight is copy[0].weight
    assert not copy[0].bias.requires_grad
    assert copy[1].bias.requires_grad


class PastHooks(Wrapped):
    """Calls `forward` of its block, so the block's hooks do not run."""

    def forward(self, x):
        return (self.block.forward(x),)


def test_a_block_whose_forward_is_called_past_its_hooks_is_noticed():
    model = PastHooks(Attention(WrittenOut()))
    seen = traced(model, ["block"])
    assert seen == traced(Wrapped(model.block), ["block"])
    assert "block" in seen.calls
    assert "forward" not in vars(model.block)
