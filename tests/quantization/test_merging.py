"""Merges of what was trained beside codes: onto the dequantized weights, the original ones, and codes again."""

import shutil

import pytest
import torch
import transformers

import lightsft
from lightsft import Backbone
from lightsft.errors import ConfigurationError, MergeError
from lightsft.export.merge import merge_folder
from lightsft.export.rounding import Rounding, changes, in_type, require_little, roundings, total
from lightsft.quantization import describe, quantized_layers
from lightsft_adapters import Adapter, Full, LoRA
from lightsft_adapters.bitfit import BitFit
from lightsft_adapters.combined import Combined
from tests.checkpoints import LABELS
from tests.quantization.test_quantization import WAYS, quantized
from tests.tiny_models import logits, randomise, tiny


def trained(base, folder, strategy=None, how="nf4", scale=0.02, **options):
    """A strategy that was trained (its tensors moved) beside codes, saved."""
    options = {"task": "chat", "dtype": "float32", **options}
    backbone = Backbone.load(base, quantization=how, **options)
    injection = (strategy or LoRA(4)).inject(backbone)
    randomise(injection, scale=scale)
    injection.save(folder)
    return injection


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", ["nf4", pytest.param("fp4", marks=pytest.mark.slow), pytest.param("int8", marks=pytest.mark.slow)]
)
def test_the_default_keeps_what_was_trained(how, llama, tmp_path):
    injection = trained(llama, tmp_path / "adapter", how=how)
    ids = torch.arange(10)[None]
    tuned = injection.model(ids).logits
    certificate = merge_folder(tmp_path / "adapter", tmp_path / "merged")
    assert certificate["onto"] == "base"
    assert certificate["rounding"]["ratio"] == 0.0
    merged = Backbone.load(tmp_path / "merged", task="chat", dtype="float32")
    assert merged.quantization is None
    difference = (merged.model(ids).logits - tuned).abs().max()
    assert difference < 1e-4


def test_the_report_is_the_norm_of_what_rounding_loses_over_the_norm_of_what_was_trained():
    model = tiny("llama")
    before = {name: weight.detach().double() for name, weight in model.named_parameters()}
    injection = LoRA(4).inject(Backbone(model))
    randomise(injection, scale=0.02)
    rows = {row.name: row for row in roundings(injection, in_type(torch.bfloat16))}
    everything = total(rows.values())
    after = {change.name: change.after for change in changes(injection)}
    merged = injection.merge()
    assert rows.keys() == {
        name for name, weight in merged.named_parameters() if not torch.equal(weight.double(), before[name])
    }
    for name, row in rows.items():
        weight = merged.get_parameter(name).detach()
        assert torch.equal(after[name], weight)
        error = (weight.bfloat16().double() - weight.double()).norm()
        delta = (weight.double() - before[name]).norm()
        assert row.ratio == pytest.approx(float(error / delta), rel=1e-4)
    assert everything.error == pytest.approx(sum(row.error**2 for row in rows.values()) ** 0.5)


def test_nothing_trained_and_nothing_lost_is_no_loss():
    assert Rounding("a", 0.0, 0.0).ratio == 0.0
    assert Rounding("a", 0.0, 1.0).ratio == float("inf")
    assert Rounding("a", 0.0, 1.0).as_json()["ratio"] is None


@pytest.mark.slow
def test_the_original_weights_are_refused_and_the_better_option_is_named(llama, tmp_path):
    trained(llama, tmp_path / "adapter")
    with pytest.raises(MergeError, match=r"(?s)loses .* times as much as was trained.*--onto base"):
        merge_folder(tmp_path / "adapter", tmp_path / "merged", onto="original")
    assert not (tmp_path / "merged").exists()
    certificate = merge_folder(tmp_path / "adapter", tmp_path / "merged", onto="original", most_rounding=float("inf"))
    assert certificate["onto"] == "original"
    assert certificate["rounding"]["ratio"] > 0.5
    merged, base = (
        Backbone.load(folder, task="chat", dtype="float32").model for folder in (tmp_path / "merged", llama)
    )
    injection = lightsft.load(tmp_path / "adapter", Backbone(base), other_quantization=True)
    torch.testing.assert_close(logits(merged), logits(injection.model), rtol=1e-4, atol=1e-4)


@pytest.fixture
def wide(llama, tmp_path):
    """A base whose rows fill whole blocks: plain bitsandbytes evaluates no others on some CPUs."""
    folder = shutil.copytree(llama, tmp_path / "wide")
    config = transformers.AutoConfig.from_pretrained(llama)
    config.update({"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4, "num_attention_heads": 4})
    config.head_dim = 16
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_codes_again_lose_what_was_trained_and_a_correction_brings_it_back(wide, tmp_path):
    trained(wide, tmp_path / "adapter")
    with pytest.raises(MergeError, match=r"(?s)loses.*--correction-rank"):
        merge_folder(tmp_path / "adapter", tmp_path / "merged", onto="nf4")
    ratios = []
    for rank in (0, 8, 24):
        folder = tmp_path / f"merged{rank}"
        found = merge_folder(tmp_path / "adapter", folder, onto="nf4", most_rounding=float("inf"), correction_rank=rank)
        ratios.append(found["rounding"]["ratio"])
        stored = Backbone.load(folder, task="chat", dtype="float32")
        assert stored.quantization == "nf4"
        if rank:
            assert found["rounding_without_correction"]["ratio"] == pytest.approx(ratios[0], rel=1e-3)
            assert lightsft.load(folder / "correction", stored).strategy.rank == rank
    assert ratios[0] > 0.5
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[2] < 0.7 * ratios[0]


@pytest.mark.slow
def test_eight_bits_keep_most_of_it(llama, tmp_path):
    trained(llama, tmp_path / "adapter")
    certificate = merge_folder(tmp_path / "adapter", tmp_path / "merged", onto="int8", most_rounding=2.0)
    assert describe(Backbone.load(tmp_path / "merged", task="chat", dtype="float32").model) == "int8"
    assert certificate["rounding"]["ratio"] < 1.0


def test_what_cannot_be_is_refused(llama, tmp_path):
    trained(llama, tmp_path / "adapter")
    with pytest.raises(ConfigurationError, match="base, original, int8"):
        merge_folder(tmp_path / "adapter", tmp_path / "merged", onto="int4")
    trained(llama, tmp_path / "bottleneck", Adapter(4))
    with pytest.raises(MergeError, match="no weight can express"):
        merge_folder(tmp_path / "bottleneck", tmp_path / "merged")
    LoRA(4).inject(Backbone.load(llama, task="chat", dtype="float32")).save(tmp_path / "plain")
    with pytest.raises(MergeError, match="trained on these very weights"):
        merge_folder(tmp_path / "plain", tmp_path / "merged", onto="original")
    assert not (tmp_path / "merged").exists()


# ---- types, sources and options


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy",
    [
        LoRA(4),
        pytest.param(BitFit(), marks=pytest.mark.slow),
        pytest.param(Full(quantized="dequantize", targets="query"), marks=pytest.mark.slow),
    ],
    ids=["lora", "bitfit", "full"],
)
def test_full_precision_keeps_what_half_precision_would_lose(strategy, bert, tmp_path):
    options = {"task": "classification", "labels": LABELS, "dtype": "bfloat16"}
    injection = trained(bert, tmp_path / "adapter", strategy, scale=2e-4, **options)
    values = {name: value.clone() for name, value in injection.tensors().items()}
    with pytest.raises(MergeError, match=r"(?s)loses.*--dtype float32"):
        merge_folder(tmp_path / "adapter", tmp_path / "merged", most_rounding=0.01)
    certificate = merge_folder(tmp_path / "adapter", tmp_path / "merged", dtype="float32", most_rounding=0.01)
    assert certificate["limit_applies_to"] == "largest logit difference"
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert {value.dtype for value in merged.state_dict().values()} == {torch.float32}
    for name, value in values.items():
        if "lora" not in name:
            assert torch.equal(merged.state_dict()[name], value), name


def test_a_model_in_memory_is_merged_into_one_type():
    backbone = Backbone(quantized("llama", WAYS["nf4"], torch.bfloat16))
    merged = randomise(LoRA(4).inject(backbone)).merge(torch.float32)
    assert {value.dtype for value in merged.state_dict().values()} == {torch.float32}
    assert torch.isfinite(logits(merged)).all()
    assert backbone.quantization is None
    assert backbone.stored_dtype == torch.float32


@pytest.mark.slow
def test_what_was_trained_on_a_folder_of_codes_is_loaded_and_merged(wide, tmp_path):
    codes = Backbone.load(wide, task="chat", dtype="float32", quantization="nf4")
    codes.model.save_pretrained(tmp_path / "codes")
    codes.tokenizer.save_pretrained(tmp_path / "codes")
    injection = trained(tmp_path / "codes", tmp_path / "adapter", how=None)
    assert injection.backbone.quantization == "nf4"
    tuned = logits(injection.model)
    again = lightsft.load(tmp_path / "adapter")
    assert again.backbone.quantization == "nf4"
    assert torch.equal(logits(again.model), tuned)
    assert merge_folder(tmp_path / "adapter", tmp_path / "merged")["passed"]
    with pytest.raises(MergeError, match=r"(?s)holds the codes themselves \(nf4\)"):
        merge_folder(tmp_path / "adapter", tmp_path / "other", onto="original")


@pytest.mark.slow
def test_a_correction_knows_what_it_corrects(wide, tmp_path):
    trained(wide, tmp_path / "adapter")
    merge_folder(tmp_path / "adapter", tmp_path / "merged", onto="nf4", most_rounding=9.0, correction_rank=8)
    correction = lightsft.load(tmp_path / "merged" / "correction")
    assert correction.backbone.source == str(tmp_path / "merged")
    wanted = lightsft.load(tmp_path / "adapter").model
    corrected = (logits(correction.model) - logits(wanted)).norm()
    with correction.disabled():
        assert corrected < (logits(correction.model) - logits(wanted)).norm()


@pytest.mark.slow
def test_each_row_is_of_its_own_weight(bert, tmp_path):
    strategy = Combined([LoRA(4), BitFit()])
    options = {"task": "classification", "labels": LABELS}
    injection = trained(bert, tmp_path / "adapter", strategy, how="nf4", **options)
    deltas = {row.name: row.delta for row in roundings(injection, lambda change: change.after)}
    found = merge_folder(tmp_path / "adapter", tmp_path / "merged", onto="int8", most_rounding=9.0)
    rows = {row["name"]: row for row in found["rounding_by_weight"]}
    assert rows.keys() >= deltas.keys()
    for name, delta in deltas.items():
        assert rows[name]["delta"] == pytest.approx(delta, rel=1e-4), name


@pytest.mark.slow
def test_layers_made_plain_for_training_are_stored_in_codes(wide, tmp_path):
    trained(wide, tmp_path / "adapter", Full(quantized="dequantize", targets="q_proj"))
    found = merge_folder(tmp_path / "adapter", tmp_path / "merged", onto="nf4", most_rounding=99.0)
    assert found["rounding"]["delta"] > 0
    assert len(quantized_layers(Backbone.load(tmp_path / "merged", task="chat").model)) == 14


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"onto": "base", "correction_rank": 4}, "rank 4 onto base"),
        ({"onto": "nf4", "dtype": "float32"}, "dtype='float32' onto nf4"),
        ({"onto": "nf4", "correction_rank": 999}, "at most"),
        ({"onto": "moon"}, "onto='moon'"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message, llama, tmp_path):
    trained(llama, tmp_path / "adapter")
    with pytest.raises(ConfigurationError, match=rf"(?s){message}"):
        merge_folder(tmp_path / "adapter", tmp_path / "merged", **options)
    assert not (tmp_path / "merged").exists()


def test_a_limit_that_is_no_number_lets_nothing_pass():
    with pytest.raises(MergeError):
        require_little([Rounding("a", 1.0, 0.1)], float("nan"), "")
