"""Conversions: the best factors there are, losses that are measured, folders that PEFT and lightsft open alike."""

import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lightsft import Backbone, artifact
from lightsft.errors import ArtifactError, BackboneError, ConfigurationError, MergeError, OutputError
from lightsft.export.convert import convert
from lightsft.export.low_rank_fit import WHOLE, best_factors, norm, randomised
from lightsft.export.rounding import changes
from lightsft.export.vllm_check import vllm_problems
from lightsft_adapters import Full, LoRA, Prefix
from lightsft_adapters.bitfit import BitFit
from lightsft_adapters.combined import Combined
from lightsft_adapters.ia3 import IA3
from lightsft_adapters.new_tokens import NewTokens
from lightsft_adapters.norm import NormTuning
from lightsft_adapters.vera import VeRA
from tests.checkpoints import save_bert, save_llama
from tests.tiny_models import off, randomise

WEIGHTS = r".*_proj\.weight"
IDS = torch.tensor([[1, 7, 9, 12, 20, 5, 2]])


def adapter_of(base, strategy, folder, *, task="chat", scale=0.05):
    backbone = Backbone.load(base, task=task, dtype="checkpoint", device="cpu")
    return randomise(strategy.inject(backbone), scale=scale).save(folder)


def loaded(folder):
    return artifact.load(folder, artifact.load_base(folder, None, dtype="float32", device="cpu"))


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def opened_by_peft(base, folder, kind=transformers.AutoModelForCausalLM):
    return peft.PeftModel.from_pretrained(kind.from_pretrained(base), folder)


def with_approximated_deltas(adapter, report):
    """Base + the best approximation of every delta, of the rank that was reported, decomposed by torch."""
    injection = loaded(adapter)
    found = {}
    for name, before, after in changes(injection):
        rank = report["weights"][name.removesuffix(".weight")]["rank"]
        u, s, vt = torch.linalg.svd((after - before).double(), full_matrices=False)
        found[name] = before + ((u[:, :rank] * s[:rank]) @ vt[:rank]).float()
    model = injection.eject().model
    model.load_state_dict(found, strict=False)
    return model


def product(folder):
    """B A of every module in a folder whose scaling is 1."""
    tensors = load_file(folder / "adapter_model.safetensors")
    names = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    return {name: tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"] for name in names}


# ---- factors


def decaying(rows, columns, decay):
    left = torch.linalg.qr(torch.randn(rows, min(rows, columns))).Q
    right = torch.linalg.qr(torch.randn(columns, min(rows, columns))).Q
    return (left * decay ** torch.arange(min(rows, columns))) @ right.T


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (1, 30)])
def test_small_matrices_get_the_factors_of_torchs_svd(shape):
    delta = decaying(*shape, 0.8)
    for rank in (1, 7):
        fit = best_factors(delta, rank)
        u, s, vt = torch.linalg.svd(delta.double(), full_matrices=False)
        assert fit.rank == min(rank, *shape)
        assert off(fit.b @ fit.a, (u[:, :rank] * s[:rank]) @ vt[:rank]) < 1e-5
        assert fit.loss == pytest.approx(float(s[rank:].norm() / s.norm()), abs=1e-6)


@pytest.mark.parametrize("decay", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("shape", [(WHOLE + 30, 900), (700, WHOLE + 30)])
def test_the_random_range_loses_no_more_than_the_best_factors(decay, shape):
    delta = decaying(*shape, decay)
    assert randomised(delta, 8, 24, norm(delta)) is not None
    fit = best_factors(delta, 8)
    best = float(torch.linalg.svdvals(delta)[8:].double().norm())
    assert fit.error == pytest.approx(best, rel=1e-4)
    assert fit.error == pytest.approx(norm(delta - fit.b @ fit.a), rel=1e-6)


def test_a_matrix_that_never_settles_is_decomposed_whole(monkeypatch):
    monkeypatch.setattr("lightsft.export.low_rank_fit.MOST", 1)
    delta = torch.randn(WHOLE + 10, WHOLE + 20)
    assert randomised(delta, 4, 20, norm(delta)) is None
    assert best_factors(delta, 4).error == pytest.approx(float(torch.linalg.svdvals(delta)[4:].norm()), rel=1e-5)


def test_a_matrix_of_lower_rank_gets_that_rank():
    for size in (60, WHOLE + 60):
        delta = torch.randn(size, 3) @ torch.randn(3, size)
        fit = best_factors(delta, 16)
        assert fit.rank == 3
        assert fit.loss < 1e-5
    assert best_factors(torch.zeros(5, 6), 4).rank == 0


def test_energy_takes_the_smallest_rank_that_keeps_the_share():
    delta = decaying(50, 60, 0.7)
    squares = torch.linalg.svdvals(delta).double() ** 2
    for energy in (0.3, 0.9, 0.999):
        fit = best_factors(delta, 50, energy=energy)
        shares = squares.cumsum(0) / squares.sum()
        assert shares[fit.rank - 1] >= energy
        assert fit.rank == 1 or shares[fit.rank - 2] < energy
        assert 1 - fit.loss**2 >= energy - 1e-6
    assert best_factors(delta, 5, energy=0.999).rank == 5


# ---- adapters


def test_a_lora_of_that_rank_or_a_lower_one_loses_nothing(llama, tmp_path):
    strategy = LoRA(4, alpha=3.0, rank_pattern={"up_proj": 2}, alpha_pattern={"o_proj": 1.0}, rank_stabilised=True)
    adapter = adapter_of(llama, strategy, tmp_path / "adapter")
    report = convert(adapter, to="lora", out=tmp_path / "lora", rank=8)
    assert report["loss"] < 1e-5
    assert max(weight["loss"] for weight in report["weights"].values()) < 1e-5
    assert {w["rank"] for name, w in report["weights"].items() if name.endswith("up_proj")} == {2}
    assert {w["rank"] for name, w in report["weights"].items() if not name.endswith("up_proj")} == {4}
    expected = logits(loaded(adapter).model)
    assert off(logits(loaded(tmp_path / "lora").model), expected) < 1e-5
    assert off(logits(opened_by_peft(llama, tmp_path / "lora")), expected) < 1e-5
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 4)
    assert config["rank_pattern"].keys() == config["alpha_pattern"].keys()


def test_rounding_errors_of_the_weights_are_not_taken_for_directions(llama, tmp_path):
    adapter = adapter_of(llama, LoRA(2), tmp_path / "adapter", scale=1e-4)
    report = convert(adapter, to="lora", out=tmp_path / "lora")
    assert {weight["rank"] for weight in report["weights"].values()} == {2}


def test_full_tuning_loses_the_tail_of_its_singular_values(llama, tmp_path):
    adapter = adapter_of(llama, Full(targets=WEIGHTS), tmp_path / "adapter")
    report = convert(adapter, to="lora", out=tmp_path / "lora", rank=8)
    assert report == json.loads((tmp_path / "lora" / "conversion.json").read_text())
    injection = loaded(adapter)
    tails, wholes = 0.0, 0.0
    for name, before, after in changes(injection):
        s = torch.linalg.svdvals((after - before).double())
        weight = report["weights"][name.removesuffix(".weight")]
        assert weight["loss"] == pytest.approx(float(s[8:].norm() / s.norm()), rel=1e-4)
        tails, wholes = tails + float((s[8:] ** 2).sum()), wholes + float((s**2).sum())
    assert report["loss"] == pytest.approx((tails / wholes) ** 0.5, rel=1e-4)
    assert len(report["weights"]) == 14


@pytest.mark.parametrize("strategy", [LoRA(4, dora=True), IA3(), VeRA(8), Full(targets=WEIGHTS)], ids=repr)
def test_peft_computes_base_and_the_approximated_delta(strategy, llama, tmp_path):
    adapter = adapter_of(llama, strategy, tmp_path / "adapter", scale=0.3)
    report = convert(adapter, to="lora", out=tmp_path / "lora", rank=6)
    assert 0.001 < report["loss"] < 1 or isinstance(strategy, VeRA)
    expected = logits(with_approximated_deltas(adapter, report))
    assert off(logits(opened_by_peft(llama, tmp_path / "lora")), expected) < 2e-4
    assert off(expected, logits(transformers.AutoModelForCausalLM.from_pretrained(llama))) > 1e-3


def test_a_pefts_folder_of_a_higher_rank_is_made_smaller(llama, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    config = peft.LoraConfig(r=16, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    wrapped.save_pretrained(tmp_path / "peft")
    report = convert(tmp_path / "peft", to="lora", out=tmp_path / "lora", rank=3)
    assert {weight["rank"] for weight in report["weights"].values()} == {3}
    assert 0.1 < report["loss"] < 1
    found = product(tmp_path / "lora")
    for name, module in wrapped.named_modules():
        if name + ".lora_A.weight" in load_file(tmp_path / "lora" / "adapter_model.safetensors"):
            u, s, vt = torch.linalg.svd(module.get_delta_weight("default"))
            assert off(found[name], (u[:, :3] * s[:3]) @ vt[:3]) < 1e-4
    assert report["vllm"] == []


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True")  # PEFT has one setting for both kinds
def test_layers_that_store_the_transpose_and_embeddings_keep_their_layout(tmp_path):
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64, tie_word_embeddings=False
    )
    base = tmp_path / "base"
    transformers.GPT2LMHeadModel(config).save_pretrained(base)
    transformers.AutoTokenizer.from_pretrained(save_llama(tmp_path / "plain")).save_pretrained(base)
    adapter = adapter_of(base, Full(targets=r".*(c_attn|c_fc|c_proj|wte|lm_head)\.weight"), tmp_path / "adapter")
    report = convert(adapter, to="lora", out=tmp_path / "lora", rank=64)
    assert report["loss"] < 1e-5
    assert report["weights"]["transformer.h.0.attn.c_attn"]["shape"] == [96, 32]
    assert len(report["narrower_than_rank"]) == len(report["weights"]) == 10
    expected = logits(loaded(adapter).model)
    assert off(logits(loaded(tmp_path / "lora").model), expected) < 1e-4
    assert off(logits(opened_by_peft(base, tmp_path / "lora")), expected) < 1e-4


def test_a_classifiers_head_is_kept_whole(bert, tmp_path):
    strategy = Full(targets=[r".*(query|value)\.weight", "classifier"])
    adapter = adapter_of(bert, strategy, tmp_path / "adapter", task="classification")
    report = convert(adapter, to="lora", out=tmp_path / "lora", rank=32)
    assert report["kept_whole"] == ["classifier.bias", "classifier.weight"]
    kind = transformers.AutoModelForSequenceClassification
    expected = logits(loaded(adapter).model)
    assert off(logits(opened_by_peft(bert, tmp_path / "lora", kind)), expected) < 1e-4
    assert off(logits(loaded(tmp_path / "lora").model), expected) < 1e-4
    assert any("modules_to_save" in problem for problem in report["vllm"])


def test_modules_to_save_are_kept_whole(llama, tmp_path):
    adapter = adapter_of(llama, LoRA(4, targets=["q_proj"], modules_to_save=["model.norm"]), tmp_path / "adapter")
    report = convert(adapter, to="lora", out=tmp_path / "lora", rank=2)
    assert report["kept_whole"] == ["model.norm.weight"]
    stored = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    before = load_file(adapter / "adapter_model.safetensors")
    assert torch.equal(stored["base_model.model.model.norm.weight"], before["base_model.model.model.norm.weight"])
    logits(opened_by_peft(llama, tmp_path / "lora"))


def test_energy_gives_each_weight_its_rank(llama, tmp_path):
    adapter = adapter_of(llama, Full(targets=WEIGHTS), tmp_path / "adapter")
    report = convert(adapter, to="lora", out=tmp_path / "lora", rank=32, energy=0.8)
    ranks = {weight["rank"] for weight in report["weights"].values()}
    assert len(ranks) > 1
    assert report["loss"] ** 2 <= 0.2 + 1e-6
    assert max(weight["loss"] ** 2 for weight in report["weights"].values()) <= 0.2 + 1e-6
    expected = logits(with_approximated_deltas(adapter, report))
    assert off(logits(opened_by_peft(llama, tmp_path / "lora")), expected) < 1e-4
    assert any("rank_pattern and alpha_pattern" in problem for problem in report["vllm"])


def test_weights_that_did_not_change_get_no_factors(llama, tmp_path):
    adapter = adapter_of(llama, LoRA(4), tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    still = [name for name in tensors if "q_proj.lora_B" in name]
    save_file({n: t * 0 if n in still else t for n, t in tensors.items()}, adapter / "adapter_model.safetensors")
    report = convert(adapter, to="lora", out=tmp_path / "lora", rank=4)
    assert report["unchanged"] == len(still) == 2
    assert not any(name.endswith("q_proj") for name in report["weights"])
    assert off(logits(opened_by_peft(llama, tmp_path / "lora")), logits(loaded(adapter).model)) < 1e-5


# ---- what a LoRA cannot express


def test_what_a_lora_cannot_express_is_refused_and_dropped_when_asked_to(llama, tmp_path):
    adapter = adapter_of(llama, Full(), tmp_path / "adapter")
    with pytest.raises(MergeError) as raised:
        convert(adapter, to="lora", out=tmp_path / "lora")
    assert "model.norm.weight: it is a vector" in raised.value.found
    assert "--drop-rest" in raised.value.todo
    assert not (tmp_path / "lora").exists()
    report = convert(adapter, to="lora", out=tmp_path / "lora", drop_rest=True)
    assert set(report["dropped"]) == {name for name, _, _ in changes(loaded(adapter)) if "norm" in name}
    squares = {name: float((after - before).norm()) ** 2 for name, before, after in changes(loaded(adapter))}
    expected = sum(squares[name] for name in report["dropped"]) / sum(squares.values())
    assert report["dropped_share"] == pytest.approx(expected, rel=1e-4)


def test_tied_embeddings_are_left(tmp_path):
    base = save_llama(tmp_path / "base", tie_word_embeddings=True)
    adapter = adapter_of(base, Full(targets=["embed_tokens", "q_proj"]), tmp_path / "adapter")
    with pytest.raises(MergeError, match=r"it is shared with lm_head.weight"):
        convert(adapter, to="lora", out=tmp_path / "lora")
    report = convert(adapter, to="lora", out=tmp_path / "lora", drop_rest=True)
    assert list(report["dropped"]) == ["model.embed_tokens.weight"]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # PEFT's, for whoever merges
def test_a_copy_of_a_tied_weight_is_converted(tmp_path):
    base = save_llama(tmp_path / "base", tie_word_embeddings=True)
    adapter = adapter_of(base, LoRA(4, targets=["lm_head", "q_proj"], tied="untie"), tmp_path / "adapter")
    report = convert(adapter, to="lora", out=tmp_path / "lora", rank=4)
    assert "lm_head" in report["weights"]
    assert off(logits(opened_by_peft(base, tmp_path / "lora")), logits(loaded(adapter).model)) < 1e-5


def test_new_rows_are_left(llama, tmp_path):
    both = Combined((LoRA(4), NewTokens(count=2)))
    adapter = adapter_of(llama, both, tmp_path / "adapter")
    with pytest.raises(MergeError, match="no change of the base's own weights"):
        convert(adapter, to="lora", out=tmp_path / "lora")
    report = convert(adapter, to="lora", out=tmp_path / "lora", rank=4, drop_rest=True)
    assert {one["share"] for one in report["dropped"].values()} == {None}
    assert report["loss"] < 1e-5


def test_what_is_not_linear_and_what_has_no_matrix_is_refused(bert, llama, tmp_path):
    prefix = adapter_of(llama, Prefix(4), tmp_path / "prefix")
    with pytest.raises(MergeError, match="no weight can express"):
        convert(prefix, to="lora", out=tmp_path / "lora")
    biases = adapter_of(bert, BitFit(), tmp_path / "biases", task="classification")
    with pytest.raises(MergeError, match="changes no linear layer"):
        convert(biases, to="lora", out=tmp_path / "lora", drop_rest=True)
    assert not (tmp_path / "lora").exists()


# ---- checkpoints that were tuned whole


def merged_of(adapter, folder):
    """A checkpoint that was tuned whole, as far as anybody can tell."""
    backbone = artifact.load_base(adapter, None, dtype="checkpoint", device="cpu")
    tokenizer = backbone.tokenizer
    artifact.load(adapter, backbone).merge().save_pretrained(folder, max_shard_size="40KB")
    tokenizer.save_pretrained(folder)
    return folder


def test_a_tuned_checkpoint_gives_the_factors_of_the_conversion_in_memory(llama, tmp_path):
    adapter = adapter_of(llama, Full(), tmp_path / "adapter")
    tuned = merged_of(adapter, tmp_path / "tuned")
    in_memory = convert(adapter, to="lora", out=tmp_path / "one", rank=5, drop_rest=True)
    from_disk = convert(tuned, to="lora", out=tmp_path / "two", base=llama, rank=5, drop_rest=True)
    assert in_memory["weights"] == from_disk["weights"]
    assert in_memory["dropped"] == from_disk["dropped"]
    one, two = product(tmp_path / "one"), product(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(off(two[name], one[name]) < 1e-5 for name in one)
    for name in ("adapter_config.json", "lightsft.json"):
        first, second = (json.loads((tmp_path / folder / name).read_text()) for folder in ("one", "two"))
        for settings in (first, second):  # the order in which weights were met
            for key in ("targets", "target_modules"):
                if key in settings.get("options", settings):
                    settings.get("options", settings)[key].sort()
        assert first == second
    assert off(logits(loaded(tmp_path / "two").model), logits(opened_by_peft(llama, tmp_path / "one"))) < 1e-5


def test_a_tuned_classifier_gets_the_prefix_of_its_base_and_keeps_its_head(bert, tmp_path):
    strategy = Full(targets=[r".*(query|value)\.weight", "classifier"])
    adapter = adapter_of(bert, strategy, tmp_path / "adapter", task="classification")
    tuned = merged_of(adapter, tmp_path / "tuned")
    report = convert(tuned, to="lora", out=tmp_path / "lora", base=str(bert), rank=32)
    assert report["kept_whole"] == ["classifier.bias", "classifier.weight"]
    assert len(report["weights"]) == 4
    expected = logits(transformers.AutoModelForSequenceClassification.from_pretrained(tuned))
    kind = transformers.AutoModelForSequenceClassification
    assert off(logits(opened_by_peft(bert, tmp_path / "lora", kind)), expected) < 1e-4
    assert off(logits(loaded(tmp_path / "lora").model), expected) < 1e-4


def test_a_tuned_checkpoint_of_half_precision_and_transposed_layers(tmp_path):
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    model = transformers.GPT2LMHeadModel(config).to(torch.bfloat16)
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    model.save_pretrained(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("c_fc.weight", "c_attn.weight")):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(tuned)
    report = convert(tuned, to="lora", out=tmp_path / "lora", base=base, rank=32)
    assert set(report["weights"]) == {"transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_fc"}
    assert report["loss"] < 1e-5
    found, before = product(tmp_path / "lora"), load_file(base / "model.safetensors")
    for name, after in load_file(tuned / "model.safetensors").items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if key in found:
            assert off(found[key].T, after.float() - before[name].float()) < 1e-5


def test_checkpoints_that_do_not_match_are_refused_with_every_name(llama, tmp_path):
    other = save_llama(tmp_path / "other", num_hidden_layers=3)
    with pytest.raises(ArtifactError) as raised:
        convert(other, to="lora", out=tmp_path / "lora", base=llama)
    assert raised.value.found.count("model.layers.2.") == 9
    wider = save_llama(tmp_path / "wider", intermediate_size=128)
    with pytest.raises(ArtifactError, match=r"128 x 32 in .*wider, 64 x 32 in"):
        convert(wider, to="lora", out=tmp_path / "lora", base=llama)


def test_a_vocabulary_that_grew_is_left(llama, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    model.resize_token_embeddings(model.config.vocab_size + 3)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(0.1)
    model.save_pretrained(tmp_path / "tuned")
    with pytest.raises(MergeError, match=r"model.embed_tokens.weight: it has"):
        convert(tmp_path / "tuned", to="lora", out=tmp_path / "lora", base=llama)
    report = convert(tmp_path / "tuned", to="lora", out=tmp_path / "lora", base=llama, drop_rest=True)
    assert set(report["dropped"]) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert list(report["weights"]) == ["model.layers.0.mlp.up_proj"]
    logits(loaded(tmp_path / "lora").model)


# ---- lightsft and PEFT


def test_a_folder_of_peft_becomes_one_of_lightsft_and_back(llama, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=True)
    wrapped = peft.get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    wrapped.save_pretrained(tmp_path / "peft")
    report = convert(tmp_path / "peft", to="lightsft", out=tmp_path / "ours")
    assert report["strategy"] == "LoRA"
    assert (tmp_path / "ours" / "lightsft.json").is_file()
    assert off(logits(loaded(tmp_path / "ours").model), logits(wrapped)) < 1e-5
    report = convert(tmp_path / "ours", to="peft", out=tmp_path / "theirs")
    assert "it is a DoRA (use_dora)" in report["vllm"]
    assert off(logits(opened_by_peft(llama, tmp_path / "theirs")), logits(wrapped)) < 1e-5


@pytest.mark.parametrize(
    ("strategy", "reason"),
    [(Full(targets=["q_proj"]), "no method like Full"), (Combined((LoRA(4), NormTuning())), "together")],
    ids=["full", "combined"],
)
def test_what_peft_cannot_open_is_refused_with_the_reason(strategy, reason, llama, tmp_path):
    adapter = adapter_of(llama, strategy, tmp_path / "adapter")
    with pytest.raises(ArtifactError, match=reason) as raised:
        convert(adapter, to="peft", out=tmp_path / "peft")
    assert "--to lora" in raised.value.todo
    assert not any("peft" in path.name for path in tmp_path.iterdir())


# ---- vLLM


def test_what_keeps_vllm_from_a_folder_is_named(llama, tmp_path):
    plain = adapter_of(llama, LoRA(4), tmp_path / "plain")
    assert vllm_problems(plain) == []
    path = plain / "adapter_config.json"
    config = json.loads(path.read_text())
    for change, problem in [
        ({"r": 1024}, "above 512"),
        ({"lora_alpha": None}, "does not say lora_alpha"),
        ({"bias": "all"}, "trains biases"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save holds lm_head"),
        ({"use_dora": True}, "DoRA"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"r": 8}, "rank 4, not r=8"),
        ({"peft_type": "IA3"}, "vLLM serves LoRA"),
    ]:
        path.write_text(json.dumps(config | change))
        assert any(problem in found for found in vllm_problems(plain)), change
    path.write_text(json.dumps(config))
    tensors = load_file(plain / "adapter_model.safetensors")
    save_file(
        {name.replace("q_proj", "wq"): tensor for name, tensor in tensors.items()} | {"x.bias": torch.ones(1)},
        plain / "adapter_model.safetensors",
    )
    assert [p for p in vllm_problems(plain) if "wq" in p]
    assert [p for p in vllm_problems(plain) if "x.bias" in p]
    path.unlink()
    assert vllm_problems(plain) == ["there is no adapter_config.json"]


# ---- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "onnx"}, "to='onnx'"),
        ({"rank": 0}, "rank=0"),
        ({"energy": 0.0}, "energy=0.0"),
        ({"energy": 1.5}, "energy=1.5"),
        ({"energy": float("nan")}, "energy=nan"),
    ],
    ids=str,
)
def test_values_that_mean_nothing_are_refused(options, message, tmp_path):
    with pytest.raises(ConfigurationError, match=message):
        convert(tmp_path, **{"to": "lora", "out": tmp_path / "out"} | options)


def test_folders_that_cannot_be_converted_are_refused(llama, tmp_path):
    with pytest.raises(ArtifactError, match="neither an adapter nor a checkpoint"):
        convert(tmp_path / "nothing", to="lora", out=tmp_path / "out")
    with pytest.raises(ArtifactError, match="not an adapter"):
        convert(llama, to="lightsft", out=tmp_path / "out")
    with pytest.raises(ConfigurationError, match="does not say what it was tuned from"):
        convert(llama, to="lora", out=tmp_path / "out")
    with pytest.raises(BackboneError, match="no checkpoint folder"):
        convert(llama, to="lora", out=tmp_path / "out", base=tmp_path / "nothing")
    with pytest.raises(MergeError, match="changes no linear layer"):
        convert(llama, to="lora", out=tmp_path / "out", base=llama)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(OutputError, match="not empty"):
        convert(llama, to="lora", out=tmp_path / "full", base=llama)
    assert not (tmp_path / "out").exists()


# ---- the command


def test_the_command_says_what_it_lost_and_whether_vllm_serves_it(command, llama, tmp_path):
    adapter = adapter_of(llama, LoRA(8, dora=True), tmp_path / "adapter")
    ended = command("convert", adapter, "--to", "lora", "--out", tmp_path / "lora", "--rank", "4")
    assert ended.code == 0, ended.error
    assert "weights   14, of rank 4\n" in ended.out
    assert "should serve it as it is: --enable-lora --max-lora-rank 8 (not tried)" in ended.out
    total = json.loads((tmp_path / "lora" / "conversion.json").read_text())["loss"]
    assert f"loss      {100 * total:.3g} % of the change" in ended.out
    again = command("convert", adapter, "--to", "lora", "--out", tmp_path / "lora")
    assert again.code == 2
    assert again.says("already exists and is not empty")


def test_the_command_lists_what_is_dropped(command, tmp_path):
    base = save_bert(tmp_path / "bert")
    adapter = adapter_of(base, Full(), tmp_path / "adapter", task="classification")
    refused = command("convert", adapter, "--to", "lora", "--out", tmp_path / "lora")
    assert refused.code == 2
    assert refused.says("a LoRA cannot express", "--drop-rest")
    flags = ("--drop-rest", "--energy", "0.9", "--rank", "32", "--base", base)
    ended = command("convert", adapter, "--to", "lora", "--out", tmp_path / "lora", *flags)
    assert ended.code == 0, ended.error
    for fragment in ("dropped   ", "kept      classifier.bias, classifier.weight", "does not serve it as it is"):
        assert fragment in ended.out
    ended = command("convert", tmp_path / "lora", "--to", "peft", "--out", tmp_path / "peft")
    assert (ended.code, ended.out.splitlines()[0]) == (0, f"converted {tmp_path / 'peft'}")
