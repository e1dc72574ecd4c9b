"""Junctions against the values of a forward pass: the sum is where x + h is, and the stream goes on as it says."""

from contextlib import nullcontext

import pytest
import torch
import transformers

from lightsft import Backbone
from lightsft.dry_run import tensors_in
from lightsft.junctions import find_junctions
from lightsft.meta import weightless
from lightsft.sublayers import find_sublayers
from lightsft.trace import meta_copy
from lightsft_adapters import Adapter, LoRA
from tests.tiny_models import NAMES, batch, tiny

POST_NORM = {"bert", "bart", "roberta", "distilbert", "albert"}
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 100,
}
OTHERS = {
    "distilbert": lambda: transformers.DistilBertModel(
        transformers.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=100)
    ),
    "albert": lambda: transformers.AlbertModel(transformers.AlbertConfig(**SIZES, embedding_size=16)),
    "opt": lambda: transformers.OPTModel(
        transformers.OPTConfig(hidden_size=32, num_hidden_layers=2, ffn_dim=64, num_attention_heads=4, vocab_size=100)
    ),
}


def model_of(name):
    return tiny(name) if name in NAMES else OTHERS[name]().eval()


def first(value):
    return next(tensors_in((value,)), None)


@pytest.mark.parametrize("name", [*NAMES, *OTHERS])
def test_the_stream_and_the_output_add_up_to_what_goes_on(name):
    model = model_of(name)
    backbone = Backbone(model)
    junctions = find_junctions(backbone)
    assert set(junctions) == {one.writes for one in find_sublayers(backbone)}
    assert all((one.norm is not None) == (name in POST_NORM) for one in junctions.values())
    inputs, outputs, sums = {}, {}, []
    for path, module in model.named_modules():
        module.register_forward_pre_hook(
            lambda _, args, kwargs, path=path: inputs.update({path: first((args, kwargs))}), with_kwargs=True
        )
        module.register_forward_hook(lambda _, args, output, path=path: outputs.update({path: first(output)}))
        if path in junctions:
            one = junctions[path]
            module.register_forward_hook(
                lambda _, args, output, one=one: sums.append((one, inputs[one.reads] + output))
            )
    with torch.no_grad():
        computed = model(**batch(model, labels=False)) if name in NAMES else model(**backbone.example)
    assert computed is not None
    last = {one.writes: (one, total) for one, total in sums}
    for one, total in last.values():
        if one.norm is not None:
            assert torch.equal(inputs[one.norm], total)
        else:  # some module reads it, or it is what the block returns
            own = [value for value in (*inputs.values(), *outputs.values()) if value is not None]
            assert any(v.numel() == total.numel() and torch.equal(v.reshape(total.shape), total) for v in own)


def test_a_copy_without_values_has_the_same_junctions(monkeypatch):
    """As the plain copy of a large quantized model is watched."""
    backbone = Backbone(tiny("bert"))
    plain = find_junctions(backbone)
    example = {n: v.to("meta") if isinstance(v, torch.Tensor) else v for n, v in backbone.example.items()}
    monkeypatch.setattr(backbone, "watchable", lambda _: nullcontext((meta_copy(backbone.model), example)))
    with weightless():
        assert find_junctions(backbone) == plain != {}


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [("GPTNeoX", {}), ("Granite", {"residual_multiplier": 0.5}), ("Phi", {})],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_stream_that_is_joined_by_something_else_has_none(kind, sizes):
    """Attention and feed-forward at once, or an output that is scaled on its way."""
    config = getattr(transformers, f"{kind}Config")(**SIZES, **sizes, pad_token_id=0)
    assert find_junctions(Backbone(getattr(transformers, f"{kind}ForCausalLM")(config).eval())) == {}


def test_a_stream_that_only_the_block_around_is_given_has_none():
    """Reformer computes its sublayers again one by one, without the block."""
    config = transformers.ReformerConfig(
        hidden_size=64,
        feed_forward_size=96,
        num_attention_heads=4,
        attention_head_size=16,
        attn_layers=["local"],
        local_attn_chunk_length=4,
        axial_pos_shape=[4, 4],
        axial_pos_embds_dim=[16, 48],
        vocab_size=100,
        is_decoder=False,
    )
    found = find_junctions(Backbone(transformers.ReformerForMaskedLM(config).eval()))
    assert "reformer.encoder.layers.0.attention.output.dense" not in found


def test_a_norm_that_returns_more_than_a_tensor_gives_none():
    config = transformers.IBertConfig(**SIZES)
    assert find_junctions(Backbone(transformers.IBertForMaskedLM(config).eval())) == {}


def test_sides_of_others_do_not_move_a_junction():
    plain = find_junctions(Backbone(tiny("llama")))
    for strategy in (LoRA(2), Adapter(4, reads="residual")):
        backbone = Backbone(tiny("llama"))
        strategy.inject(backbone)
        assert find_junctions(backbone) == plain
