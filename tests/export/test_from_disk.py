"""Merges from disk to disk: the bits of the merge in memory, whatever happens on the way."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lightsft import Backbone, artifact
from lightsft.adapter_files import TENSORS
from lightsft.errors import ArtifactError, BackboneError, LightsftError, MergeError, OutputError
from lightsft.export.from_disk import from_disk
from lightsft.export.merge import merge_folder
from lightsft.export.tile_check import check_tiles
from lightsft_adapters import Full, LoRA
from lightsft_adapters.combined import Combined
from lightsft_adapters.ia3 import IA3
from lightsft_adapters.new_tokens import NewTokens
from lightsft_adapters.norm import NormTuning
from lightsft_adapters.vera import VeRA
from tests.checkpoints import save_llama
from tests.cli.test_bad_input import contents
from tests.tiny_models import randomise
from tests.zoo.models_and_inputs import build, find

KINDS = {
    "plain": LoRA(4),
    "rank stabilised": LoRA(4, rank_stabilised=True),
    "dora": LoRA(4, dora=True),
    "patterns": LoRA(4, rank_pattern={"up_proj": 2}, alpha_pattern={"o_proj": 3.0}),
    "pissa": LoRA(2, initialisation="pissa"),
    "some layers": LoRA(4, targets="attention", layers=[1]),
}


def stored(folder):
    """Every tensor of a checkpoint folder."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def base_in(tmp_path, dtype=torch.float32, shards=None):
    """A folder with a tiny Llama, in one file or several."""
    plain = save_llama(tmp_path / "plain")
    model = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=dtype)
    folder = tmp_path / "base"
    model.save_pretrained(folder, **({"max_shard_size": shards} if shards else {}))
    transformers.AutoTokenizer.from_pretrained(plain).save_pretrained(folder)
    return folder


def adapter_of(base, strategy, folder, scale=0.05):
    backbone = Backbone.load(base, task="chat", dtype="checkpoint", device="cpu")
    return randomise(strategy.inject(backbone), scale=scale).save(folder)


def both(adapter, tmp_path, *, dtype=None, **options):
    """(merged from disk, merged in memory), and the first one's certificate."""
    options |= {} if dtype is None else {"dtype": str(dtype).removeprefix("torch.")}
    certificate = merge_folder(adapter, tmp_path / "disk", check="tiles", most_rounding=9.0, **options)
    assert certificate["written"] == "from disk to disk"
    backbone = artifact.load_base(adapter, None, dtype="checkpoint", device="cpu")
    memory = artifact.load(adapter, backbone).merge(dtype).state_dict()
    return stored(tmp_path / "disk"), memory, certificate


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_are_those_of_the_merge_in_memory(kind, dtype, tmp_path):
    base = base_in(tmp_path, dtype)
    adapter = adapter_of(base, KINDS[kind], tmp_path / "adapter")
    disk, memory, certificate = both(adapter, tmp_path)
    assert_same_bits(disk, memory)
    assert any(not torch.equal(tensor, stored(base)[name]) for name, tensor in disk.items())
    assert certificate["passed"]


def test_tiles_of_large_matrices_are_the_same_in_memory(tmp_path):
    """Matrices of several tiles and blocks, whose last one is not whole."""
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=1031, intermediate_size=2777, num_hidden_layers=1, num_attention_heads=1, head_dim=8
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    base = tmp_path / "base"
    transformers.AutoTokenizer.from_pretrained(save_llama(tmp_path / "plain")).save_pretrained(base)
    adapter = adapter_of(base, LoRA(4, dora=True), tmp_path / "adapter")
    disk, memory, _ = both(adapter, tmp_path)
    assert_same_bits(disk, memory)


@pytest.mark.parametrize("shards", [None, "40KB"])
@pytest.mark.parametrize("size", [None, 30_000])
def test_files_are_the_base_s_own_or_of_another_size(shards, size, tmp_path):
    base = base_in(tmp_path, torch.bfloat16, shards)
    adapter = adapter_of(base, LoRA(4), tmp_path / "adapter")
    disk, memory, _ = both(adapter, tmp_path, max_shard_size=size)
    assert_same_bits(disk, memory)
    names = sorted(file.name for file in (tmp_path / "disk").glob("*.safetensors"))
    if size is None:
        assert names == sorted(file.name for file in base.glob("*.safetensors"))
    else:
        assert all(file.stat().st_size < 2 * size for file in (tmp_path / "disk").glob("*.safetensors"))
        index = json.loads((tmp_path / "disk" / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(disk)
        assert index["metadata"]["total_size"] == sum(t.numel() * t.itemsize for t in disk.values())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "disk", dtype="auto").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in disk.items())


def test_in_full_precision_nothing_is_rounded(tmp_path):
    base = base_in(tmp_path, torch.bfloat16)
    adapter = adapter_of(base, LoRA(4), tmp_path / "adapter")
    disk, memory, certificate = both(adapter, tmp_path, dtype=torch.float32)
    assert_same_bits(disk, memory)
    assert certificate["rounding"]["error"] == 0
    assert json.loads((tmp_path / "disk" / "config.json").read_text())["dtype"] == "float32"


def test_a_folder_that_peft_wrote_is_merged_as_peft_merges_it(tmp_path):
    base = base_in(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(
        r=4, lora_alpha=7, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=True,
        rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.*down_proj": 3},
    )  # fmt: skip
    wrapped = peft.get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, 1.0 if "magnitude" in name else 0.0, 0.1)
    wrapped.save_pretrained(tmp_path / "adapter")
    certificate = merge_folder(tmp_path / "adapter", tmp_path / "disk", base=str(base), check="load")
    assert certificate["written"] == "from disk to disk"
    assert certificate["check"] == "load"
    expected = wrapped.merge_and_unload().state_dict()
    for name, tensor in stored(tmp_path / "disk").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


def test_the_report_is_what_the_norms_say(tmp_path):
    base = base_in(tmp_path, torch.bfloat16)
    adapter = adapter_of(base, LoRA(4), tmp_path / "adapter")
    certificate = merge_folder(adapter, tmp_path / "disk", check="none", most_rounding=9.0)
    merge_folder(adapter, tmp_path / "wide", dtype="float32", check="none")
    before, rounded, exact = stored(base), stored(tmp_path / "disk"), stored(tmp_path / "wide")
    for row in certificate["rounding_by_weight"]:
        name = row["name"]
        assert row["delta"] == pytest.approx(float((exact[name] - before[name].float()).norm()), rel=1e-5)
        assert row["error"] == pytest.approx(float((exact[name] - rounded[name].float()).norm()), rel=1e-5)
    assert certificate["passed"] is None
    with pytest.raises(MergeError, match="loses"):
        merge_folder(adapter, tmp_path / "refused", most_rounding=1e-4)
    assert not (tmp_path / "refused").exists()


def test_the_base_is_only_read_and_all_its_other_files_travel(tmp_path):
    base = base_in(tmp_path)
    (base / "LICENSE").write_text("as is")
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text("{}")
    (base / "original").mkdir()
    (base / "original" / "consolidated.00.pth").write_bytes(b"the base's weights in another form")
    adapter = adapter_of(base, LoRA(4), tmp_path / "adapter")
    before, times = contents(base), {file: file.stat().st_mtime_ns for file in base.iterdir()}
    for file in base.glob("*.*"):
        file.chmod(0o444)
    base.chmod(0o555)
    try:
        merge_folder(adapter, tmp_path / "disk", check="tiles")
    finally:
        base.chmod(0o755)
    assert contents(base) == before
    assert {file: file.stat().st_mtime_ns for file in base.iterdir()} == times
    after = contents(tmp_path / "disk")
    changed = {name for name in before if after.get(name) != before[name]}
    assert changed == {"model.safetensors", "original/consolidated.00.pth"}
    assert not (tmp_path / "disk" / "original").exists()
    card = (tmp_path / "disk" / "README.md").read_text()
    assert "| trained | lora (" in card
    assert "rank=4" in card
    assert "from disk, in fp64" in card


def test_a_base_of_the_hub_is_read_from_the_cache(tmp_path, monkeypatch):
    """Its files are links to blobs, and it is named by its id."""
    base = base_in(tmp_path)
    adapter = adapter_of(base, LoRA(4), tmp_path / "adapter")
    place = tmp_path / "hub" / "models--some--model"
    (place / "blobs").mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0123")
    (place / "snapshots" / "0123").mkdir(parents=True)
    for file in base.iterdir():
        shutil.copyfile(file, place / "blobs" / file.name)
        (place / "snapshots" / "0123" / file.name).symlink_to(place / "blobs" / file.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    merge_folder(adapter, tmp_path / "here", check="none")
    certificate = merge_folder(adapter, tmp_path / "hub merged", base="some/model", check="tiles")
    assert certificate["written"] == "from disk to disk"
    assert_same_bits(stored(tmp_path / "here"), stored(tmp_path / "hub merged"))


# ---- what takes the model


THROUGH_SHAPES = {
    "full": Full(),
    "ia3": IA3(),
    "vera": VeRA(rank=8),
    "norm and lora": Combined([NormTuning(), LoRA(4, targets="attention")]),
    "head": LoRA(4, targets=["lm_head", "q_proj"]),
    "embedding": LoRA(4, targets=["embed_tokens"]),
    "saved whole": LoRA(4, modules_to_save=["lm_head"]),
    "rows of tokens": NewTokens(rows=[3, 7]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", THROUGH_SHAPES)
def test_what_names_alone_do_not_say_is_found_on_a_model_without_values(kind, dtype, tmp_path):
    base = base_in(tmp_path, dtype)
    adapter = adapter_of(base, THROUGH_SHAPES[kind], tmp_path / "adapter")
    disk, memory, _ = both(adapter, tmp_path)
    assert_same_bits(disk, memory)
    assert any(not torch.equal(tensor, stored(base)[name]) for name, tensor in disk.items())


FAMILIES = {
    "conv1d": ("gpt2", [LoRA(4), IA3(), Full()]),
    "experts": ("mixtral", [LoRA(4), LoRA(4, dora=True), VeRA(rank=8)]),
    "experts in one tensor": ("gpt_oss", [LoRA(4), LoRA(4, targets=[r".*experts\..*"])]),
    "tied": ("gemma2", [LoRA(4), Full()]),
    "convolutions": ("mamba", [LoRA(4), IA3()]),
}


@pytest.mark.parametrize(
    ("kind", "number"), [(kind, n) for kind, (_, all_) in FAMILIES.items() for n in range(len(all_))]
)
def test_architectures_that_store_otherwise(kind, number, tmp_path):
    name, strategies = FAMILIES[kind]
    torch.manual_seed(0)
    model = build(find("causal-lm", name)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    transformers.AutoTokenizer.from_pretrained(save_llama(tmp_path / "plain")).save_pretrained(tmp_path / "base")
    adapter = adapter_of(tmp_path / "base", strategies[number], tmp_path / "adapter")
    disk, _, _ = both(adapter, tmp_path)
    backbone = artifact.load_base(adapter, None, dtype="checkpoint", device="cpu")
    artifact.load(adapter, backbone).merge().save_pretrained(tmp_path / "memory")
    assert_same_bits(disk, stored(tmp_path / "memory"))


def by_the_other_way(adapter, tmp_path):
    """Merged in memory, saved by transformers: the tensors, and the configuration."""
    backbone = artifact.load_base(adapter, None, dtype="checkpoint", device="cpu")
    artifact.load(adapter, backbone).merge().save_pretrained(tmp_path / "memory")
    return stored(tmp_path / "memory"), json.loads((tmp_path / "memory" / "config.json").read_text())


OF_ANOTHER_SHAPE = {
    "untied": (LoRA(4, targets=["lm_head"], tied="untie"), True),
    "grown and tied": (NewTokens(tokens=["<one>", "<two>"]), True),
    "grown": (NewTokens(count=3), False),
    "grown beside a lora": (Combined([LoRA(4), NewTokens(tokens=["<one>"])]), False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", OF_ANOTHER_SHAPE)
def test_tensors_that_the_base_does_not_have_are_written_too(kind, dtype, tmp_path):
    strategy, tied = OF_ANOTHER_SHAPE[kind]
    model = transformers.AutoModelForCausalLM.from_pretrained(save_llama(tmp_path / "plain", tie_word_embeddings=tied))
    model.to(dtype).save_pretrained(tmp_path / "base", max_shard_size="40KB")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "plain").save_pretrained(tmp_path / "base")
    adapter = adapter_of(tmp_path / "base", strategy, tmp_path / "adapter")
    certificate = merge_folder(adapter, tmp_path / "disk", check="tiles", most_rounding=9.0)
    assert (certificate["written"], certificate["passed"]) == ("from disk to disk", True)
    merged, config = by_the_other_way(adapter, tmp_path)
    assert_same_bits(stored(tmp_path / "disk"), merged)
    assert json.loads((tmp_path / "disk" / "config.json").read_text()) == config
    if kind in ("grown and tied", "grown beside a lora"):
        before = transformers.AutoTokenizer.from_pretrained(tmp_path / "plain")
        after = transformers.AutoTokenizer.from_pretrained(tmp_path / "disk")
        assert after("<one>", add_special_tokens=False).input_ids == [len(before)]
        assert len(before("<one>", add_special_tokens=False).input_ids) > 1


HEADLESS = {
    "bert": transformers.BertForMaskedLM,
    "the encoder alone": transformers.BertModel,
    "another number of labels": transformers.BertForSequenceClassification,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", HEADLESS)
def test_a_new_head_is_written_with_its_labels(kind, dtype, bert, tmp_path):
    model = HEADLESS[kind].from_pretrained(bert, dtype=dtype)
    model.save_pretrained(tmp_path / "base")
    transformers.AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path / "base")
    labels = ["bad", "so so", "good", "best"]
    backbone = Backbone.load(tmp_path / "base", labels=labels, dtype="checkpoint", device="cpu")
    adapter = randomise(LoRA(4).inject(backbone), scale=0.05).save(tmp_path / "adapter")
    settings = json.loads((adapter / "lightsft.json").read_text())
    settings["task"]["max_length"] = 17
    (adapter / "lightsft.json").write_text(json.dumps(settings))
    certificate = merge_folder(adapter, tmp_path / "disk", check="tiles", most_rounding=9.0)
    assert (certificate["written"], certificate["passed"]) == ("from disk to disk", True)
    merged, config = by_the_other_way(adapter, tmp_path)
    assert_same_bits(stored(tmp_path / "disk"), merged)
    found = json.loads((tmp_path / "disk" / "config.json").read_text())
    assert found == config | {key: found[key] for key in found.keys() - config.keys()}
    assert list(found["id2label"].values()) == labels
    assert found["architectures"] == ["BertForSequenceClassification"]
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "disk").model_max_length == 17


BESIDE_CODES = {
    "lora beside nf4": (LoRA(4), "nf4", False),
    "dora beside nf4": (LoRA(4, dora=True), "nf4", False),
    "some layers beside nf4": (LoRA(4, targets="attention", layers=[1]), "nf4", False),
    "norms beside nf4, double": (Combined([NormTuning(), LoRA(4)]), "nf4", True),
    "ia3 beside int8": (IA3(), "int8", False),
    "vera beside fp4": (VeRA(rank=8), "fp4", False),
}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", BESIDE_CODES)
def test_what_was_trained_beside_codes_is_merged_into_what_they_stand_for(kind, family, tmp_path):
    strategy, scheme, double = BESIDE_CODES[kind]
    plain = save_llama(tmp_path / "plain", hidden_size=64, intermediate_size=192)
    torch.manual_seed(0)
    model = (
        build(find("causal-lm", family)) if family == "gpt2" else transformers.LlamaForCausalLM.from_pretrained(plain)
    )
    model.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    transformers.AutoTokenizer.from_pretrained(plain).save_pretrained(tmp_path / "base")
    backbone = Backbone.load(
        tmp_path / "base", task="chat", dtype="bfloat16", device="cpu", quantization=scheme, double_quantization=double
    )
    adapter = randomise(strategy.inject(backbone), scale=0.05).save(tmp_path / "adapter")
    if family == "gpt2" and isinstance(strategy, LoRA) and strategy.dora:
        assert from_disk(adapter, None) is None
        return
    disk, memory, certificate = both(adapter, tmp_path)
    assert certificate["passed"]
    assert_same_bits(disk, {name: tensor for name, tensor in memory.items() if name in disk})
    assert {name.removesuffix("lm_head.weight") for name in memory.keys() - disk.keys()} <= {""}  # tied
    changed = {name for name, tensor in disk.items() if not torch.equal(tensor, stored(tmp_path / "base")[name])}
    assert len(changed) >= len(backbone.anatomy.linear)
    assert all(row["ratio"] < 0.5 for row in certificate["rounding_by_weight"])


def test_codes_of_another_type_than_the_stored_one_are_made_in_memory(tmp_path):
    base = base_in(tmp_path, torch.float32)
    backbone = Backbone.load(base, task="chat", dtype="bfloat16", device="cpu", quantization="nf4")
    assert from_disk(LoRA(4).inject(backbone).save(tmp_path / "adapter"), None) is None


def test_a_base_with_other_values_than_the_codes_were_made_of_is_refused(tmp_path):
    base = base_in(tmp_path, torch.bfloat16)
    backbone = Backbone.load(base, task="chat", dtype="bfloat16", device="cpu", quantization="nf4")
    adapter = LoRA(4).inject(backbone).save(tmp_path / "adapter")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for weight in model.model.layers.parameters():
            weight.mul_(-1)
    model.save_pretrained(base)
    with pytest.raises(ArtifactError, match=r"layers\.0\..*proj\.weight holds other values"):
        from_disk(adapter, None)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tokens", "head"])
def test_what_the_base_does_not_have_is_loaded_by_plain_transformers(kind, bert, tmp_path):
    """The base has no logits of new tokens, so what the adapter does is counted on the others."""
    if kind == "tokens":
        adapter = adapter_of(save_llama(tmp_path / "base"), NewTokens(tokens=["<one>"]), tmp_path / "adapter")
    else:
        transformers.BertForMaskedLM.from_pretrained(bert).save_pretrained(tmp_path / "base")
        transformers.AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path / "base")
        backbone = Backbone.load(tmp_path / "base", labels=["a", "b", "c"], dtype="checkpoint", device="cpu")
        adapter = randomise(LoRA(4).inject(backbone), scale=0.05).save(tmp_path / "adapter")
    for way, streaming in (("from disk to disk", True), ("from memory", False)):
        found = merge_folder(adapter, tmp_path / way, check="load", streaming=streaming)
        assert (found["written"], found["check"], found["passed"]) == (way, "load", True)


def test_a_classifier_made_of_a_model_without_padding_takes_batches(tmp_path):
    plain = save_llama(tmp_path / "plain")
    model = transformers.AutoModelForCausalLM.from_pretrained(plain)
    model.config.pad_token_id = None
    model.save_pretrained(tmp_path / "base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(plain)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "base")
    backbone = Backbone.load(tmp_path / "base", labels=["a", "b", "c"], dtype="checkpoint", device="cpu")
    adapter = randomise(LoRA(4).inject(backbone), scale=0.05).save(tmp_path / "adapter")
    certificate = merge_folder(adapter, tmp_path / "disk", check="tiles")
    assert certificate["written"] == "from disk to disk"
    reloaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "disk")
    batch = reloaded(["a good film", "bad"], padding=True, return_tensors="pt")
    found = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "disk").eval()(**batch).logits
    expected = backbone.model.eval()(**batch).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_head_that_no_file_holds_is_not_invented(bert, tmp_path):
    """What transformers draws on loading, and the folder does not save, is no part of what was trained."""
    base = tmp_path / "base"
    transformers.BertForMaskedLM.from_pretrained(bert).save_pretrained(base)
    backbone = Backbone.load(base, labels=["a", "b"], dtype="checkpoint", device="cpu")
    adapter = LoRA(4).inject(backbone).save(tmp_path / "adapter")
    tensors = load_file(adapter / TENSORS)
    kept = {name: tensor for name, tensor in tensors.items() if "pooler" not in name}
    assert len(kept) == len(tensors) - 2
    save_file(kept, adapter / TENSORS)
    assert from_disk(adapter, None) is None


@pytest.mark.slow
def test_streaming_and_the_whole_way_through_memory_write_the_same_folder(tmp_path):
    base = base_in(tmp_path, torch.bfloat16)
    adapter = adapter_of(base, LoRA(4), tmp_path / "adapter")
    ways = {"from disk to disk": {}, "from memory": {"streaming": False}}
    for way, options in ways.items():
        found = merge_folder(adapter, tmp_path / way, most_rounding=9.0, **options)
        assert (found["written"], found["check"], found["passed"]) == (way, "load", True)
    assert_same_bits(*(stored(tmp_path / way) for way in ways))
    one, other = (json.loads((tmp_path / way / "config.json").read_text()) for way in ways)
    assert one == other


def test_no_conversion_of_transformers_keeps_the_name_of_a_matrix_and_changes_its_values():
    """What `plain_lora` relies on: a layer's weight under its own name is stored as the layer has it."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import Transpose, WeightConverter

    for kind, transforms in conversion_mapping._build_checkpoint_conversion_mapping().items():
        for transform in transforms:
            if isinstance(transform, WeightConverter):
                kept = set(transform.source_patterns) & set(transform.target_patterns)
                matrices = [name for name in kept if name.endswith("weight")]
                assert not matrices, (kind, transform)
                assert not kept or all(isinstance(op, Transpose) for op in transform.operations), (kind, transform)


# ---- bad input


def test_all_weights_that_do_not_fit_are_named_at_once(tmp_path):
    base = base_in(tmp_path)
    adapter = adapter_of(base, LoRA(4), tmp_path / "adapter")
    tensors = load_file(adapter / TENSORS)
    for name in list(tensors):
        if name.endswith(("q_proj.lora_B.weight", "up_proj.lora_B.weight")):
            tensors[name] = torch.cat([tensors[name], tensors[name]])
    save_file(tensors, adapter / TENSORS)
    with pytest.raises(ArtifactError) as raised:
        merge_folder(adapter, tmp_path / "merged")
    layers = len([name for name in tensors if name.endswith("q_proj.lora_B.weight")])
    assert raised.value.found.count("in the adapter") == 2 * layers
    assert not (tmp_path / "merged").exists()


def test_a_base_with_other_values_is_refused(tmp_path):
    base = base_in(tmp_path)
    adapter = adapter_of(base, LoRA(4), tmp_path / "adapter")
    other = shutil.copytree(base, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match="another model"):
        merge_folder(adapter, tmp_path / "merged", base=str(other))


@pytest.mark.parametrize("place", ["base", "base/merged", "."])
def test_a_folder_in_or_around_the_base_is_refused(place, tmp_path):
    inner = tmp_path / "inner"
    inner.mkdir()
    base = base_in(inner)
    adapter = adapter_of(base, LoRA(4), tmp_path / "adapter")
    before = contents(inner)
    with pytest.raises(OutputError):
        merge_folder(adapter, inner / place)
    assert contents(inner) == before


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    base = base_in(tmp_path)
    adapter = adapter_of(base, LoRA(4), tmp_path / "adapter")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OutputError, match="GB left"):
        merge_folder(adapter, tmp_path / "merged")
    assert not any("merged" in path.name for path in tmp_path.iterdir())


def test_an_error_while_writing_leaves_nothing(tmp_path, monkeypatch):
    base = base_in(tmp_path)
    adapter = adapter_of(base, LoRA(4), tmp_path / "adapter")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(OutputError, match="No space left"):
        merge_folder(adapter, tmp_path / "merged")
    assert not any("merged" in path.name for path in tmp_path.iterdir())


def test_a_damaged_base_is_refused(tmp_path):
    base = base_in(tmp_path, shards="40KB")
    adapter = adapter_of(base, LoRA(4), tmp_path / "adapter")
    shard = sorted(base.glob("*.safetensors"))[0]
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    with pytest.raises(BackboneError, match="truncated"):
        merge_folder(adapter, tmp_path / "merged")
    shard.unlink()
    with pytest.raises(BackboneError, match=shard.name):
        merge_folder(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"check": "hash"}, "check='hash'"), ({"max_shard_size": 0}, "max_shard_size=0")],
    ids=["check", "size"],
)
def test_options_that_mean_nothing_are_refused(options, message, tmp_path):
    with pytest.raises(LightsftError, match=message):
        merge_folder(tmp_path / "adapter", tmp_path / "merged", **options)


# ---- checks that can fail


def test_one_wrong_number_is_found(tmp_path):
    """Of a changed weight (whose rows are all compared, as small as it is), and of one that was copied."""
    base = base_in(tmp_path, torch.bfloat16)
    adapter = adapter_of(base, LoRA(4), tmp_path / "adapter")
    merge_folder(adapter, tmp_path / "disk", check="tiles", most_rounding=9.0)
    plan, good = from_disk(adapter, None), stored(tmp_path / "disk")
    assert check_tiles(plan, tmp_path / "disk")["passed"]
    for name in ("model.layers.0.self_attn.k_proj.weight", "model.norm.weight"):
        tensors = {key: tensor.clone() for key, tensor in good.items()}
        tensors[name].view(torch.int16)[..., :] += 1  # the neighbouring number
        save_file(tensors, tmp_path / "disk" / "model.safetensors", {"format": "pt"})
        found = check_tiles(plan, tmp_path / "disk")
        assert not found["passed"]
        assert name in found["problems"][0]


def test_a_missing_tensor_is_found(tmp_path):
    base = base_in(tmp_path)
    adapter = adapter_of(base, LoRA(4), tmp_path / "adapter")
    merge_folder(adapter, tmp_path / "disk", check="tiles")
    tensors = stored(tmp_path / "disk")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "disk" / "model.safetensors", {"format": "pt"})
    assert "missing" in check_tiles(from_disk(adapter, None), tmp_path / "disk")["problems"][0]


# ---- interruption


@pytest.mark.slow
def test_killed_at_any_moment_the_folder_is_absent_or_whole(tmp_path):
    base = base_in(tmp_path, torch.bfloat16, "60KB")
    adapter = adapter_of(base, LoRA(4), tmp_path / "adapter")
    out = tmp_path / "merged"
    script = (
        "import time, os\n"
        "from pathlib import Path\n"
        "from lightsft.export import streaming\n"
        "from lightsft.export.merge import merge_folder\n"
        "plain = os.pwrite\n"
        "def slow(*args):\n    time.sleep(0.02)\n    return plain(*args)\n"
        "os.pwrite = slow\n"
        "print('ready', flush=True)\n"
        f"merge_folder(Path({str(adapter)!r}), Path({str(out)!r}), check='none', most_rounding=9.0)\n"
    )
    expected, drawn, whole, whole_time = None, random.Random(0), 0, 0.0
    for attempt in range(14):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=dict(os.environ))
        process.stdout.readline()
        began = time.perf_counter()
        if attempt:
            time.sleep(drawn.uniform(0, whole_time))
            process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if attempt == 0:
            assert process.returncode == 0
            whole_time = time.perf_counter() - began
        if out.exists():
            found = stored(out)
            expected = expected or found
            assert_same_bits(found, expected)
            assert (out / "certificate.json").is_file()
            transformers.AutoModelForCausalLM.from_pretrained(out)
            shutil.rmtree(out)
            whole += 1
    assert 1 <= whole < 14


def test_what_an_interruption_left_is_replaced(tmp_path):
    base = base_in(tmp_path)
    adapter = adapter_of(base, LoRA(4), tmp_path / "adapter")
    left = tmp_path / ".merged.partial"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    merge_folder(adapter, tmp_path / "merged", check="tiles")
    assert not left.exists()
