"""LoRA that starts near the weights that the codes were made of: LoftQ and QPiSSA."""

import copy
import json
import shutil

import pytest
import torch
import transformers
from torch import nn

import lightsft
from lightsft import Backbone
from lightsft.codes import Codes, Difference
from lightsft.errors import ArtifactError, ConfigurationError, MergeError
from lightsft.export.merge import merge_folder
from lightsft.plain_layers import plain_copy
from lightsft.quantization import dequantized, describe, matrix, quantized_layers
from lightsft.quantizing import quantize, quantized_layer
from lightsft_adapters import LoRA
from lightsft_adapters.combined import Combined
from lightsft_adapters.lora_fa import LoRAFA
from lightsft_adapters.vera import VeRA
from tests.quantization.test_quantization import WAYS, each_way, quantized
from tests.tiny_models import batch, gradients, logits, randomise, tiny

RANK, ALPHA = 4, 12.0  # a scaling of 3, which the factors must make up for
STARTS = {
    "loftq": LoRA(RANK, ALPHA, initialisation="loftq"),
    "loftq, 3 steps": LoRA(RANK, ALPHA, initialisation="loftq", loftq_steps=3),
    "qpissa": LoRA(RANK, ALPHA, initialisation="qpissa"),
}
pytestmark = pytest.mark.slow


each_start = pytest.mark.parametrize("strategy", STARTS.values(), ids=STARTS)


def wide(name, **options):
    """A tiny model whose rows fill whole blocks of 64 weights: bitsandbytes loses more of others on CPUs."""
    width = "n_embd" if name == "gpt2" else "hidden_size"
    return tiny(name, **{width: 64}, **options)


@pytest.fixture(scope="module", params=["llama", "bert", "gpt2"])
def family(request, tmp_path_factory):
    """The folder of a tiny checkpoint."""
    folder = tmp_path_factory.mktemp(request.param)
    wide(request.param).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a tiny Llama."""
    folder = tmp_path_factory.mktemp("llama")
    wide("llama").save_pretrained(folder)
    return folder


def load(folder, how=WAYS["nf4"], dtype="float32"):
    """The backbone of a tiny checkpoint, in codes."""
    return Backbone.load(
        folder, task=None, kind=kind_of(folder), dtype=dtype, quantization=how.scheme, double_quantization=how.double
    )


def plain(folder):
    """The same, in floating point."""
    return Backbone.load(folder, task=None, kind=kind_of(folder), dtype="float32")


def kind_of(folder):
    """The class of the model in a folder."""
    return getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])


def after(injection):
    """The weights that training starts with, in fp64 (out, in)."""
    found = {}
    for name, layer in quantized_layers(injection.model).items():
        delta = injection.model.get_submodule(name).lightsft_side.matrix_delta()
        found[name] = (dequantized(layer) + delta).detach().double()
    assert found
    return found


def tail(matrix, rank=RANK):
    """The norm of what the best matrix of this rank leaves of another."""
    return torch.linalg.svdvals(matrix.double())[rank:].norm()


# ---- the formulas


@each_way
def test_loftq_starts_at_the_codes_and_the_best_matrix_of_its_rank_beside_them(how, family):
    backbone, exact = load(family, how), plain(family)
    injection = STARTS["loftq"].inject(backbone)
    for name, start in after(injection).items():
        weight, codes = matrix(exact.module(name)).double(), dequantized(backbone.module(name)).double()
        torch.testing.assert_close((weight - start).norm(), tail(weight - codes), rtol=1e-4, atol=1e-6)
        assert (weight - start).norm() < 0.95 * (weight - codes).norm()


def test_the_first_step_of_loftq_is_pefts(folder):
    peft = pytest.importorskip("peft.utils.loftq_utils")
    backbone, exact = load(folder), plain(folder)
    STARTS["loftq"].inject(backbone)
    for name, layer in quantized_layers(backbone.model).items():
        theirs = peft._low_rank_decomposition(matrix(exact.module(name)) - dequantized(layer), RANK)
        delta = layer.lightsft_side.matrix_delta()
        torch.testing.assert_close(delta, theirs["L"] @ theirs["R"], rtol=1e-4, atol=1e-5)


@each_way
def test_qpissa_starts_at_the_principal_part_and_codes_of_the_rest(how, family):
    backbone, exact = load(family, how), plain(family)
    injection = STARTS["qpissa"].inject(backbone)
    for name, start in after(injection).items():
        weight, side = matrix(exact.module(name)), backbone.module(name).lightsft_side
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
        main = u[:, :RANK] * s[:RANK] @ vt[:RANK]
        factors = side.scaling * side.lora_B.weight @ side.lora_A.weight
        torch.testing.assert_close(factors, main, rtol=1e-4, atol=1e-5)
        rest = weight - factors.detach()
        lost = rest - dequantized(in_codes(rest, how))
        torch.testing.assert_close((weight - start).norm(), lost.double().norm(), rtol=2e-2, atol=1e-6)
        assert (weight - start).norm() < (weight - dequantized(backbone.module(name))).norm()


def in_codes(weight, how):
    """A layer with this weight, quantized by itself."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    return quantized_layer(layer, how, torch.float32, weight=weight)


def test_more_steps_of_loftq_follow_the_algorithm_and_come_nearer(folder):
    exact = plain(folder)
    one, three = (after(STARTS[name].inject(load(folder))) for name in ("loftq", "loftq, 3 steps"))
    errors = []
    for name, start in three.items():
        weight = matrix(exact.module(name))
        low = torch.zeros_like(weight)
        for _ in range(3):
            codes = dequantized(in_codes(weight - low, WAYS["nf4"]))
            u, s, vt = torch.linalg.svd(weight - codes, full_matrices=False)
            low = u[:, :RANK] * s[:RANK] @ vt[:RANK]
        torch.testing.assert_close(start.float(), codes + low, rtol=1e-3, atol=1e-3)
        errors.append([float((weight - w[name]).norm()) for w in (one, three)])
    first, last = torch.tensor(errors).sum(0)
    assert last < first


@each_start
def test_the_model_starts_nearer_to_the_plain_one_than_its_codes_are(strategy, folder):
    backbone = load(folder)
    wanted, held = logits(plain(folder).model), logits(backbone.model)
    strategy.inject(backbone)
    assert (logits(backbone.model) - wanted).norm() < 0.95 * (held - wanted).norm()


def test_rank_stabilisation_changes_the_factors_and_not_the_start(folder):
    one = after(STARTS["loftq"].inject(load(folder)))
    other = after(LoRA(RANK, 5.0, rank_stabilised=True, initialisation="loftq").inject(load(folder)))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)


# ---- codes apart from their layer


@each_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_apart_mean_what_they_mean_in_their_layer(how, dtype):
    for layer in quantized_layers(quantized("llama", how, dtype)).values():
        assert torch.equal(Codes(layer).weight(), dequantized(layer))
        if how.scheme == "int8" or not how.double:
            assert Codes(layer).codes.data_ptr() == layer.weight.data_ptr()


def test_the_difference_of_codes_has_the_gradient_of_a_product():
    one, other = [Codes(layer) for layer in quantized_layers(quantized("llama", WAYS["nf4"])).values()][:4:3]
    assert one.shape == other.shape
    x, y = (torch.randn(2, 3, one.shape[1], requires_grad=True) for _ in range(2))
    y.data.copy_(x.data)
    ours = Difference.apply(x, one, other)
    theirs = y @ (one.weight() - other.weight()).T
    torch.testing.assert_close(ours, theirs)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


@each_start
def test_what_is_trained_gets_the_gradient_that_it_has_beside_plain_weights(strategy, folder):
    injection = strategy.inject(load(folder))
    merged = copy.deepcopy(injection.model)
    ours = gradients(injection.model, injection.named_parameters())
    for name, start in after(injection).items():
        layer = merged.get_submodule(name)
        side = layer.lightsft_side
        rest = start.float() - side.scaling * (side.lora_B.weight @ side.lora_A.weight).detach()
        made = nn.Linear(rest.shape[1], rest.shape[0], bias=False)
        made.weight.data = rest
        made.requires_grad_(False)
        merged.set_submodule(name, made)
    twin = LoRA(RANK, ALPHA).inject(Backbone(merged))
    twin.load_tensors({name: t for name, t in injection.tensors().items() if ".lora_" in name})
    theirs = gradients(merged, twin.named_parameters())
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-2, atol=1e-3)


# ---- the contracts


@each_start
@each_way
def test_disabled_and_eject_give_the_codes_back_bit_for_bit(strategy, how, folder):
    backbone = load(folder, how)
    model = backbone.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    held = logits(model)
    injection = strategy.inject(backbone)
    assert backbone.quantization == describe(model) == str(how)
    assert not torch.equal(logits(model), held)
    with injection.disabled():
        assert torch.equal(logits(model), held)
    randomise(injection)
    injection.eject()
    assert torch.equal(logits(model), held)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@each_start
@each_way
def test_a_folder_needs_the_codes_and_not_what_they_were_made_of(strategy, how, folder, tmp_path):
    base = shutil.copytree(folder, tmp_path / "base")
    backbone = load(base, how)
    injection = strategy.inject(backbone)
    randomise(injection)
    tuned = logits(backbone.model)
    injection.save(tmp_path / "adapter")
    again = load(base, how)
    shutil.rmtree(base)
    loaded = lightsft.load(tmp_path / "adapter", again)
    assert torch.equal(logits(again.model), tuned)
    loaded.save(tmp_path / "second")
    name = "adapter_model.safetensors"
    assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()
    assert (tmp_path / "adapter" / "adapter_config.json").exists() == (not strategy.makes_codes)


@each_start
def test_a_merge_computes_what_was_trained(strategy, family):
    injection = strategy.inject(load(family))
    randomise(injection, scale=0.02)
    tuned = logits(injection.model)
    merged = injection.merge()
    assert describe(merged) is None
    torch.testing.assert_close(logits(merged), tuned, rtol=1e-4, atol=1e-4)


@each_start
def test_int8_merges_into_what_it_computes_in_training(strategy, folder):
    injection = strategy.inject(load(folder, WAYS["int8"]))
    wanted = after(injection)
    merged = plain_copy(injection.merge())
    for name, weight in wanted.items():
        torch.testing.assert_close(matrix(merged.get_submodule(name)).double(), weight, rtol=1e-5, atol=1e-6)


@each_start
def test_two_on_one_layer_add_up(strategy, folder):
    injection = Combined([VeRA(rank=16), strategy]).inject(load(folder))
    randomise(injection, scale=0.02)
    tuned = logits(injection.model)
    torch.testing.assert_close(logits(injection.merge()), tuned, rtol=1e-4, atol=1e-4)


@each_start
def test_the_same_backbone_and_seed_give_the_same_tensors(strategy, folder):
    one, other = (strategy.inject(load(folder)).tensors() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@each_start
def test_half_precision_trains(strategy, dtype, folder):
    injection = strategy.inject(load(folder, dtype=dtype))
    model = injection.model.train()
    model(**batch(model)).loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in injection.parameters())


def test_lora_fa_keeps_the_a_that_it_starts_with(folder):
    injection = LoRAFA(RANK, ALPHA, initialisation="qpissa").inject(load(folder))
    assert not [name for name in injection.named_parameters() if "lora_A" in name]
    wanted = STARTS["qpissa"].inject(load(folder)).tensors()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in injection.tensors().items())


@pytest.mark.parametrize(("start", "known"), [("loftq", "default"), ("qpissa", "pissa")])
def test_beside_a_weight_in_floating_point_nothing_is_lost(start, known, folder):
    targets = ["q_proj", "lm_head"]
    injection = LoRA(RANK, targets=targets, initialisation=start).inject(load(folder))
    other = LoRA(RANK, targets=targets, initialisation=known).inject(load(folder))
    ours, theirs = injection.tensors(), other.tensors()
    assert [name for name in ours if name.startswith("lm_head")]
    for name in ours:
        if name.startswith("lm_head"):
            assert torch.equal(ours[name], theirs[name])


# ---- what cannot be


@each_start
def test_a_plain_backbone_is_pointed_to_other_starts(strategy):
    with pytest.raises(ConfigurationError, match=r"(?s)not quantized.*'pissa' or 'olora'"):
        strategy.inject(Backbone(tiny("llama")))


@each_start
def test_a_backbone_that_does_not_know_its_source_says_how_to_load_one(strategy):
    backbone = Backbone(quantized("llama", WAYS["nf4"]))
    with pytest.raises(ConfigurationError, match=r"(?s)does not know its source.*Backbone.load\(path"):
        strategy.inject(backbone)
    assert LoRA(RANK).inject(backbone)


def test_a_source_that_is_gone_quantized_or_another_is_refused(folder, tmp_path):
    base = shutil.copytree(folder, tmp_path / "base")
    backbone = load(base)
    shutil.rmtree(base)
    with pytest.raises(ConfigurationError, match=r"(?s)cannot be loaded: no folder.*Backbone.load\(path"):
        STARTS["loftq"].inject(backbone)
    wide("llama", seed=1).save_pretrained(base)
    with pytest.raises(ConfigurationError, match=r"were not made of what .* holds there"):
        STARTS["loftq"].inject(backbone)
    backbone.model.save_pretrained(base)
    with pytest.raises(ConfigurationError, match=r"is quantized itself"):
        STARTS["loftq"].inject(backbone)
    assert backbone.carries is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initialisation": "loftq", "dora": True}, "dora=True together"),
        ({"initialisation": "qpissa", "dora": True}, "dora=True together"),
        ({"initialisation": "qpissa", "loftq_steps": 2}, "loftq_steps=2 with"),
        ({"initialisation": "loftq", "loftq_steps": 0}, "loftq_steps"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        LoRA(RANK, **options)


@each_start
def test_a_rank_above_the_matrix_is_refused(strategy, folder):
    with pytest.raises(ConfigurationError, match="a rank of at most 32"):
        LoRA(33, initialisation=strategy.initialisation, loftq_steps=strategy.loftq_steps).inject(load(folder))


def test_folders_of_codes_do_not_fit_other_schemes_or_plain_weights(folder, tmp_path):
    STARTS["qpissa"].inject(load(folder)).save(tmp_path)
    with pytest.raises(ArtifactError, match="trained beside weights in nf4"):
        lightsft.load(tmp_path, load(folder, WAYS["int8"]))
    with pytest.raises(ConfigurationError, match="not quantized"):
        lightsft.load(tmp_path, plain(folder), other_quantization=True)


def test_a_gguf_like_model_quantized_in_memory_finds_its_source(folder):
    model = plain(folder).model
    names = list(quantized_layers(load(folder).model))
    quantize(model, names, WAYS["nf4"], torch.float32)
    injection = STARTS["loftq"].inject(Backbone(model, source=str(folder)))
    wanted = STARTS["loftq"].inject(load(folder)).tensors()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in injection.tensors().items())


@each_start
def test_a_merge_onto_the_original_weights_is_refused(strategy, llama, tmp_path):
    backbone = Backbone.load(llama, task="chat", dtype="float32", quantization="nf4")
    strategy.inject(backbone).save(tmp_path / "adapter")
    assert merge_folder(tmp_path / "adapter", tmp_path / "merged")["rounding"]["ratio"] == 0.0
    with pytest.raises((MergeError, ConfigurationError)):
        merge_folder(tmp_path / "adapter", tmp_path / "other", onto="original")
