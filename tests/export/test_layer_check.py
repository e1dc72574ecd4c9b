"""Checks a layer at a time: the logits of the models in memory, and an error where a weight is another."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lightsft import Backbone, artifact
from lightsft.errors import ConfigurationError, MergeError
from lightsft.export import layer_check
from lightsft.export.certificate import logits_of
from lightsft.export.checkpoint_files import read_checkpoint
from lightsft.export.merge import merge
from lightsft.export.placing import placed_without_values
from lightsft.export.verify import verify
from lightsft.files import read_json
from lightsft_adapters import Full, LoRA
from lightsft_adapters.combined import Combined
from lightsft_adapters.ia3 import IA3
from lightsft_adapters.new_tokens import NewTokens
from lightsft_adapters.norm import NormTuning
from lightsft_adapters.vera import VeRA
from tests.checkpoints import save_llama
from tests.export.test_from_disk import adapter_of, base_in
from tests.tiny_models import randomise
from tests.zoo.models_and_inputs import build, find

STRATEGIES = {
    "lora": LoRA(4),
    "dora": LoRA(4, dora=True),
    "every weight": Full(),
    "norms": Combined([NormTuning(), LoRA(4, targets="attention")]),
    "ia3": IA3(),
    "vera": VeRA(rank=8),
    "tokens": NewTokens(count=2),
    "embeddings": LoRA(4, targets=["embed_tokens", "lm_head"]),
}


def from_both(adapter, base, compared):
    """(logits of base + adapter and of the base, a layer at a time from disk; the same in memory)."""
    architectures = read_json(base / "config.json")["architectures"]
    placed = placed_without_values(adapter, read_checkpoint(base), architectures)
    backbone = artifact.load_base(adapter, None, dtype="checkpoint", device="cpu")
    loaded = artifact.load(adapter, backbone)
    pairs = []
    with layer_check.weights_from_disk(placed, layer_check._trained(placed)):
        here = logits_of(placed.injection.backbone, compared, layer_check.CPU)
    pairs.append((here, logits_of(backbone, compared)))
    with layer_check.weights_from_disk(placed, {}), placed.injection.disabled(), loaded.disabled():
        pairs.append((logits_of(placed.injection.backbone, compared, layer_check.CPU), logits_of(backbone, compared)))
    assert all(p.is_meta for name, p in placed.injection.model.named_parameters() if "lightsft" not in name)
    return pairs


def tokens(vocabulary=30):
    ids = torch.randint(3, vocabulary, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return [{"input_ids": ids, "attention_mask": mask}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", STRATEGIES)
def test_the_logits_are_those_of_the_model_in_memory(kind, dtype, tmp_path):
    base = base_in(tmp_path, dtype, shards="40KB")
    adapter = adapter_of(base, STRATEGIES[kind], tmp_path / "adapter")
    for (disk,), (memory,) in from_both(adapter, base, tokens()):
        torch.testing.assert_close(disk, memory, rtol=0, atol=0 if dtype == torch.float32 else 2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "mixtral", "gemma2", "mamba", "gpt_oss", "falcon"])
def test_other_architectures_run_a_layer_at_a_time(name, tmp_path):
    torch.manual_seed(0)
    build(find("causal-lm", name)).save_pretrained(tmp_path / "base")
    transformers.AutoTokenizer.from_pretrained(save_llama(tmp_path / "plain")).save_pretrained(tmp_path / "base")
    adapter = adapter_of(tmp_path / "base", LoRA(4), tmp_path / "adapter")
    for (disk,), (memory,) in from_both(adapter, tmp_path / "base", tokens()):
        torch.testing.assert_close(disk, memory, rtol=1e-5, atol=1e-5)


def test_a_new_head_is_run_as_it_was_trained(bert, tmp_path):
    transformers.BertForMaskedLM.from_pretrained(bert).save_pretrained(tmp_path / "base")
    transformers.AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path / "base")
    backbone = Backbone.load(tmp_path / "base", labels=["a", "b", "c"], dtype="checkpoint", device="cpu")
    adapter = randomise(LoRA(4).inject(backbone), scale=0.05).save(tmp_path / "adapter")
    (disk,), (memory,) = from_both(adapter, tmp_path / "base", tokens())[0]
    torch.testing.assert_close(disk, memory, rtol=0, atol=0)


def test_codes_are_run_as_what_they_stand_for(tmp_path):
    base = base_in(tmp_path)
    backbone = Backbone.load(base, task="chat", dtype="checkpoint", device="cpu", quantization="nf4")
    adapter = randomise(LoRA(4).inject(backbone), scale=0.05).save(tmp_path / "adapter")
    for (disk,), (memory,) in from_both(adapter, base, tokens()):
        torch.testing.assert_close(disk, memory, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_merge_is_checked_and_another_weight_is_found(tmp_path):
    base = base_in(tmp_path, torch.bfloat16, shards="40KB")
    adapter = adapter_of(base, LoRA(4), tmp_path / "adapter")
    merge(adapter, out=tmp_path / "merged", check="layers", most_rounding=9.0)
    found = verify(tmp_path / "merged", check="layers")
    assert (found["check"], found["passed"]) == ("layers", True)
    assert found["mean_adapter_effect"] > 4 * found["mean_logit_difference"]
    file = next(f for f in sorted((tmp_path / "merged").glob("*.safetensors")) if "model.norm.weight" in load_file(f))
    save_file({name: tensor * 1.5 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    certificate = tmp_path / "merged" / "certificate.json"
    certificate.write_text(certificate.read_text().replace("checkpoint_sha256", "unknown_sha256"))
    with pytest.raises(MergeError, match=r"differs from base \+ adapter"):
        verify(tmp_path / "merged", check="layers")


def test_what_cannot_be_run_so_is_refused(tmp_path):
    base = base_in(tmp_path, torch.bfloat16)
    backbone = Backbone.load(base, task="chat", dtype="checkpoint", device="cpu", quantization="int8")
    adapter = randomise(LoRA(4).inject(backbone), scale=0.05).save(tmp_path / "adapter")
    with pytest.raises(ConfigurationError, match=r"check='layers'[\s\S]*--check tiles"):
        merge(adapter, out=tmp_path / "merged", check="layers", most_rounding=9.0)
    assert not (tmp_path / "merged").exists()


@pytest.mark.slow
def test_a_classifier_is_loaded_as_one(bert, tmp_path):
    backbone = Backbone.load(bert, labels=["a", "b", "c"], dtype="checkpoint", device="cpu")
    adapter = randomise(LoRA(4).inject(backbone), scale=0.05).save(tmp_path / "adapter")
    merge(adapter, out=tmp_path / "merged", check="layers")
    assert read_json(tmp_path / "merged" / "certificate.json")["passed"]
