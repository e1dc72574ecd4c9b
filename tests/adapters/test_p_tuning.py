import copy

import pytest
import torch
from peft import PromptEncoderConfig, TaskType, get_peft_model

import lightsft
from lightsft import Backbone
from lightsft.errors import ConfigurationError, MergeError
from lightsft.primitives.virtual_tokens import PlacedVirtualTokens
from lightsft_adapters.p_tuning import PTuning
from tests.tiny_models import (
    batch,
    furthest,
    gradients,
    gradients_with_and_without_checkpointing,
    logits,
    off,
    randomise,
    tiny,
)

COUNT = 5
TASK_TYPES = {"gpt2": TaskType.CAUSAL_LM, "llama": TaskType.CAUSAL_LM, "t5": TaskType.SEQ_2_SEQ_LM}


def inject(model, seed=0, tokens=COUNT, **options):
    return randomise(PTuning(tokens, **options).inject(Backbone(model), seed=seed), scale=0.1)


def encoder_of(injection):
    return next(primitive.part for primitive in injection.primitives if isinstance(primitive, PlacedVirtualTokens))


@pytest.fixture(params=["mlp", "lstm"])
def encoder(request):
    return request.param


# ---- what it computes


def test_the_mlp_is_three_layers_with_relu_in_fp64():
    network = encoder_of(inject(tiny("llama"), hidden_size=12))
    p = {key: value.detach().double() for key, value in network.named_parameters()}
    assert [tuple(p[f"mlp.{layer}.weight"].shape) for layer in (0, 2, 4)] == [(12, 32), (12, 12), (32, 12)]
    hidden = p["table"]
    for layer in (0, 2):
        hidden = (hidden @ p[f"mlp.{layer}.weight"].T + p[f"mlp.{layer}.bias"]).clamp_min(0)
    assert off(network.embeddings(), hidden @ p["mlp.4.weight"].T + p["mlp.4.bias"]) <= 1e-6


def run_lstm(p, x, layer, direction):
    """h_t = o tanh(c_t), c_t = f c_(t-1) + i g, for one direction of one layer: (length, size) -> (length, hidden)."""
    suffix = f"l{layer}{direction}"
    hidden = p[f"lstm.weight_hh_{suffix}"].shape[1]
    h, c, states = torch.zeros(hidden).double(), torch.zeros(hidden).double(), []
    for row in reversed(x) if direction else x:
        gates = (
            p[f"lstm.weight_ih_{suffix}"] @ row
            + p[f"lstm.bias_ih_{suffix}"]
            + p[f"lstm.weight_hh_{suffix}"] @ h
            + p[f"lstm.bias_hh_{suffix}"]
        )
        i, f, g, o = gates.chunk(4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        states.append(h)
    return torch.stack(states[::-1] if direction else states)


def test_the_lstm_reads_the_table_both_ways_in_fp64():
    network = encoder_of(inject(tiny("llama"), encoder="lstm", hidden_size=12))
    p = {key: value.detach().double() for key, value in network.named_parameters()}
    x = p["table"]
    for layer in (0, 1):
        x = torch.cat([run_lstm(p, list(x), layer, ""), run_lstm(p, list(x), layer, "_reverse")], dim=1)
    hidden = (x @ p["mlp.0.weight"].T + p["mlp.0.bias"]).clamp_min(0)
    assert hidden.shape == (COUNT, 24)
    assert off(network.embeddings(), hidden @ p["mlp.2.weight"].T + p["mlp.2.bias"]) <= 1e-6


def in_peft(injection, name, plain, encoder):
    """PEFT's p-tuning on a copy of the plain model, with the same table and network."""
    config = PromptEncoderConfig(
        task_type=TASK_TYPES[name],
        num_virtual_tokens=COUNT,
        token_dim=32,
        num_transformer_submodules=1,
        encoder_reparameterization_type=encoder.upper(),
        encoder_hidden_size=16,
    )
    peft = get_peft_model(copy.deepcopy(plain), config).eval()
    own = {"embedding.weight" if key == "table" else key: p for key, p in encoder_of(injection).named_parameters()}
    renamed = {key.replace("lstm.", "lstm_head.").replace("mlp.", "mlp_head."): p.detach() for key, p in own.items()}
    peft.prompt_encoder["default"].load_state_dict(renamed)
    return peft


@pytest.mark.parametrize("name", list(TASK_TYPES))
def test_logits_and_gradients_equal_pefts_p_tuning(name, encoder):
    plain = tiny(name)
    injection = inject(copy.deepcopy(plain), encoder=encoder, hidden_size=16)
    model, inputs = injection.model, batch(plain)
    if name != "t5":  # PEFT counts how the last virtual token predicts the first real one; here it has no label
        inputs["labels"][:, 0] = -100
    peft = in_peft(injection, name, plain, encoder)
    ours, theirs = model(**inputs), peft(**inputs)
    tokens, seen = (0, slice(None)) if name == "t5" else (COUNT, inputs["attention_mask"].bool())
    assert torch.allclose(ours.logits[seen], theirs.logits[:, tokens:][seen], atol=1e-5)
    ours.loss.backward()
    theirs.loss.backward()
    own = {key: p.grad for key, p in encoder_of(injection).named_parameters()}
    network = peft.prompt_encoder["default"]
    there = {
        key.replace("_head", "").replace("embedding.weight", "table"): p.grad for key, p in network.named_parameters()
    }
    assert furthest(own, there) <= 1e-4


def test_every_tensor_of_the_network_is_trained(name, encoder):
    model = tiny(name)
    before = logits(model)
    injection = inject(model, encoder=encoder)
    assert logits(model).shape == before.shape
    for key, gradient in gradients(model, injection.named_parameters()).items():
        assert gradient is not None, key
        assert gradient.abs().max() > 0, key
    with injection.disabled():
        assert torch.equal(logits(model), before)
    injection.eject()
    assert torch.equal(logits(model), before)


def test_generation_with_a_cache_equals_generation_without(encoder):
    model = tiny("llama")
    inject(model, encoder=encoder)
    options = {"max_new_tokens": 8, "do_sample": False, "input_ids": torch.tensor([[5, 6, 7, 8]])}
    assert torch.equal(model.generate(**options), model.generate(**options, use_cache=False))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(encoder, use_reentrant):
    injection = inject(tiny("llama"), encoder=encoder, dropout=0.5)
    plain, checkpointed = gradients_with_and_without_checkpointing(injection, use_reentrant=use_reentrant)
    assert furthest(checkpointed, plain) == 0


def test_dropout_acts_between_the_lstms_layers_in_training_only():
    model = tiny("llama")
    inject(model, encoder="lstm", dropout=0.5)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


# ---- how it starts, and what is saved


def test_the_start_depends_on_the_seed_alone(encoder):
    starts = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(starts))
        injection = PTuning(encoder=encoder).inject(Backbone(tiny("llama")), seed=seed)
        starts.append(injection.tensors())
    assert all(torch.equal(value, starts[1][key]) for key, value in starts[0].items())
    assert not any(torch.equal(value, starts[2][key]) for key, value in starts[0].items())


def test_the_network_starts_like_torchs_own_layers(encoder):
    network = encoder_of(PTuning(encoder=encoder, hidden_size=64).inject(Backbone(tiny("llama"))))
    for module in network.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.LSTM):
            width = module.in_features if isinstance(module, torch.nn.Linear) else module.hidden_size
            for parameter in module.parameters(recurse=False):
                assert 0.8 * width**-0.5 < parameter.abs().max() <= width**-0.5


def step(injection):
    """One step of plain gradient descent in evaluation mode."""
    injection.model.zero_grad()
    injection.model(**batch(injection.model)).loss.backward()
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.add_(parameter.grad, alpha=-0.1)


def test_a_loaded_network_is_the_same_bits_and_trains_on_the_same(tmp_path, encoder):
    injection = inject(tiny("llama"), encoder=encoder)
    step(injection)
    injection.save(tmp_path)
    loaded = lightsft.load(tmp_path, tiny("llama"))
    assert loaded.strategy == injection.strategy
    assert torch.equal(logits(loaded.model), logits(injection.model))
    for trained in (injection, loaded):
        step(trained)
    assert all(torch.equal(value, loaded.tensors()[key]) for key, value in injection.tensors().items())


def test_it_cannot_be_merged(encoder):
    with pytest.raises(MergeError, match="PTuning"):
        inject(tiny("llama"), encoder=encoder).merge()


@pytest.mark.parametrize(
    "options",
    [{"num_virtual_tokens": 0}, {"encoder": "gru"}, {"hidden_size": 0}, {"num_layers": 0}, {"dropout": 1.0}],
)
def test_an_option_out_of_range_is_refused(options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        PTuning(**options)
