"""Merged checkpoints: plain transformers folders with the same predictions, or nothing at all."""

import hashlib
import json
import subprocess
import sys
from importlib.metadata import version

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import lightsft
from lightsft import Backbone, adapter_files
from lightsft.errors import BackboneError, LightsftError, MergeError, OutputError
from lightsft.export import certificate as certifying
from lightsft.export.held_out import HeldOut
from lightsft.export.merge import merge, merge_folder
from lightsft.low_rank import LowRank
from lightsft.primitives.side import PlacedSide
from lightsft_adapters import Adapter, Full, LoRA, Prefix
from tests.checkpoints import LABELS, chat_rows, labelled_rows, save_bert, save_llama
from tests.cli.test_bad_input import contents, refused
from tests.tiny_models import randomise, tiny

TEXTS = ["the good film", "the room was really quite awful today and we said so", "lovely"]
PLAIN = """
import json, sys
sys.modules["lightsft"] = sys.modules["lightsft_adapters"] = sys.modules["peft"] = None
import torch, transformers
folder, kind, texts = sys.argv[1], sys.argv[2], sys.argv[3:]
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
model = getattr(transformers, kind).from_pretrained(folder).eval()
with torch.no_grad():
    logits = [model(**tokenizer(text, return_tensors="pt")).logits[0].float().flatten().tolist() for text in texts]
print(json.dumps({"logits": logits, "labels": model.config.id2label, "type": str(model.dtype)}))
"""


def elsewhere(folder, kind="AutoModelForSequenceClassification", texts=TEXTS):
    """What a process that knows transformers alone gets from a folder."""
    done = subprocess.run([sys.executable, "-c", PLAIN, folder, kind, *texts], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def logits(backbone, texts=TEXTS):
    """One row of logits for each text."""
    model, tokenizer = backbone.model.eval(), backbone.tokenizer
    with torch.no_grad():
        return [model(**tokenizer(text, return_tensors="pt")).logits[0].float().flatten() for text in texts]


def adapter_on(base, strategy, folder, *, scale=0.05, **options):
    """(folder of a saved adapter with random weights, its logits)."""
    options = {"task": "classification", "labels": LABELS, **options}
    backbone = Backbone.load(base, dtype="checkpoint", device="cpu", **options)
    injection = randomise(strategy.inject(backbone), scale=scale)
    return injection.save(folder), logits(backbone)


@pytest.fixture
def adapter(bert, tmp_path):
    """The folder of a LoRA with random weights on the tiny BERT."""
    return adapter_on(bert, LoRA(rank=4), tmp_path / "adapter")[0]


@pytest.fixture
def no_process(monkeypatch):
    """The reloaded checkpoint's logits are computed in this process: seconds less."""

    def here(checkpoint, task, batches):
        kind = certifying.auto_class(task, str(checkpoint))
        return certifying.logits_of(Backbone(kind.from_pretrained(checkpoint, dtype="auto")), batches)

    monkeypatch.setattr("lightsft.export.in_memory.plain_logits", here)
    monkeypatch.setattr("lightsft.export.loading_check.plain_logits", here)


# ---- what a merged folder is


@pytest.mark.parametrize("strategy", [LoRA(rank=4), Full()], ids=["lora", "full"])
def test_a_process_without_lightsft_gets_the_same_predictions(bert, tmp_path, strategy, no_process):
    adapter, tuned = adapter_on(bert, strategy, tmp_path / "adapter")
    before = contents(bert)
    found = elsewhere(merge(adapter, out=tmp_path / "merged"))
    torch.testing.assert_close(torch.tensor(found["logits"]), torch.stack(tuned), rtol=1e-5, atol=1e-5)
    assert found["labels"] == {"0": "neg", "1": "pos"}
    assert contents(bert) == before


def test_the_certificate_says_what_was_compared(bert, adapter, tmp_path, no_process):
    task = lightsft.task("classification", labels=LABELS)
    rows = labelled_rows(50, seed=5)
    returned = merge_folder(adapter, tmp_path / "merged", rows=HeldOut(task, rows))
    stored = json.loads((tmp_path / "merged" / "certificate.json").read_text())
    assert stored == returned
    assert stored["passed"]
    assert (stored["inputs"], stored["positions"], stored["examples"]) == (50, 50, 50)
    assert stored["largest_logit_difference"] <= stored["limit"] <= 1e-2
    assert stored["mean_logit_difference"] <= stored["largest_logit_difference"]
    assert stored["largest_adapter_effect"] > 100 * stored["limit"]
    assert stored["same_top_prediction"] == 1.0
    assert stored["metric"] == "accuracy"
    assert stored["score_before"] == stored["score_after"]
    assert stored["base"] == str(bert)
    assert stored["versions"]["transformers"] == version("transformers")


def test_the_certificate_holds_the_hashes_of_the_files(adapter, tmp_path, no_process):
    merged = merge(adapter, out=tmp_path / "merged")
    stored = json.loads((merged / "certificate.json").read_text())
    assert stored["adapter_sha256"] == hashlib.sha256((adapter / adapter_files.TENSORS).read_bytes()).hexdigest()
    weights = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in merged.glob("*.safetensors")}
    assert stored["checkpoint_sha256"] == weights
    assert weights


def test_without_rows_random_tokens_are_compared(adapter, tmp_path, no_process):
    stored = merge_folder(adapter, tmp_path / "merged")
    assert stored["inputs"] == 32
    assert "score_before" not in stored


def test_configuration_and_tokenizer_travel(bert, adapter, tmp_path, no_process):
    merged = merge(adapter, out=tmp_path / "merged")
    one, other = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (bert, merged))
    assert [one(text)["input_ids"] for text in TEXTS] == [other(text)["input_ids"] for text in TEXTS]
    config = transformers.AutoConfig.from_pretrained(merged)
    assert config.architectures == ["BertForSequenceClassification"]
    assert (config.id2label, config.label2id) == ({0: "neg", 1: "pos"}, {"neg": 0, "pos": 1})
    assert config.hidden_size == 32


def test_the_merged_weights_carry_the_base_s_names_and_nothing_else(bert, adapter, tmp_path, no_process):
    merged = load_file(merge(adapter, out=tmp_path / "merged") / "model.safetensors")
    assert {f"bert.{name}" for name in load_file(bert / "model.safetensors")} < set(merged)
    assert not [name for name in merged if "lora" in name or "lightsft" in name or "parametriz" in name]


@pytest.mark.slow
def test_a_chat_model_is_merged_with_its_template(llama, tmp_path):
    adapter, tuned = adapter_on(llama, LoRA(rank=4), tmp_path / "adapter", task="chat", labels=None)
    task = lightsft.task("chat")
    stored = merge_folder(adapter, tmp_path / "merged", rows=HeldOut(task, chat_rows(20)))
    assert stored["passed"]
    assert stored["metric"] == "loss"
    assert stored["score_after"] == pytest.approx(stored["score_before"], rel=1e-5)
    tokens = [
        len(feature["input_ids"]) for feature in task.encode(chat_rows(20), Backbone.load(llama, task="chat").tokenizer)
    ]
    assert stored["positions"] == sum(tokens)
    found = elsewhere(tmp_path / "merged", "AutoModelForCausalLM")
    for one, other in zip(found["logits"], tuned, strict=True):
        torch.testing.assert_close(torch.tensor(one), other, rtol=1e-4, atol=1e-4)
    one, other = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (llama, tmp_path / "merged"))
    assert one.chat_template == other.chat_template


@pytest.mark.slow
def test_a_bfloat16_base_stays_bfloat16_and_its_certificate_allows_one_rounding(tmp_path, no_process):
    base = save_bert(tmp_path / "base", dtype=torch.bfloat16)
    adapter, _ = adapter_on(base, LoRA(rank=4), tmp_path / "adapter", scale=0.1)
    stored = merge_folder(adapter, tmp_path / "merged")
    assert stored["passed"]
    assert stored["limit_applies_to"] == "mean logit difference"
    assert stored["mean_logit_difference"] < 0.25 * stored["mean_adapter_effect"]
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert elsewhere(tmp_path / "merged")["type"] == "torch.bfloat16"


def test_a_peft_folder_is_merged(bert, tmp_path, no_process):
    base = transformers.AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"], init_lora_weights=False)
    model = peft.get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path / "peft")
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    merged = merge(tmp_path / "peft", base=bert, out=tmp_path / "merged")
    reloaded = transformers.AutoModelForSequenceClassification.from_pretrained(merged).eval()
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(reloaded(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_merged_checkpoint_is_a_base_again(bert, adapter, tmp_path, no_process):
    merged = merge(adapter, out=tmp_path / "merged")
    again, _ = adapter_on(merged, LoRA(rank=2), tmp_path / "again", labels=None)
    assert merge(again, out=tmp_path / "twice").is_dir()


# ---- what is refused


@pytest.mark.parametrize("strategy", [Adapter(), Prefix(num_virtual_tokens=2)], ids=["adapter", "prefix"])
def test_what_no_weight_can_express_is_refused_with_the_way_out(command, bert, tmp_path, strategy):
    folder, _ = adapter_on(bert, strategy, tmp_path / "adapter")
    ended = command("merge", folder, "--base", bert, "--out", tmp_path / "merged")
    refused(
        ended, f"holds {type(strategy).__name__}", "a strategy that changes weights", "ship the adapter folder itself"
    )
    assert "lightsft predict" in ended.error
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


def test_an_occupied_folder_is_refused_and_untouched(command, adapter, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "thesis.txt").write_text("three years of work")
    refused(command("merge", adapter, "--out", tmp_path / "merged"), "already exists and is not empty")
    assert (tmp_path / "merged" / "thesis.txt").read_text() == "three years of work"
    assert len(list((tmp_path / "merged").iterdir())) == 1


def test_a_file_in_the_way_is_refused(adapter, tmp_path):
    (tmp_path / "merged").write_text("three years of work")
    with pytest.raises(OutputError, match="already exists"):
        merge(adapter, out=tmp_path / "merged")


def test_an_empty_folder_is_taken(adapter, tmp_path, no_process):
    (tmp_path / "merged").mkdir()
    assert (merge(adapter, out=tmp_path / "merged") / "model.safetensors").is_file()


STAGES = {
    "from disk to disk": ["from_disk.write", "loading_check.certify", "loading_check.plain_logits", "merge.write_json"],
    "in memory": [f"in_memory.{stage}" for stage in ("certify", "provenance", "write_json", "plain_logits")],
}


@pytest.mark.parametrize(("way", "stage"), [(way, stage) for way, stages in STAGES.items() for stage in stages])
def test_a_failure_half_way_leaves_nothing(adapter, tmp_path, no_process, monkeypatch, way, stage):
    def fail(*arguments, **options):
        raise RuntimeError("half way")

    before = contents(adapter)
    monkeypatch.setattr(f"lightsft.export.{stage}", fail)
    with pytest.raises(RuntimeError, match="half way"):
        merge(adapter, out=tmp_path / "merged", streaming=way != "in memory")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}
    assert contents(adapter) == before


def caught(adapter, out, **options):
    with pytest.raises(MergeError, match=r"differs from base \+ adapter by"):
        merge(adapter, out=out, **options)
    assert {path.name for path in out.parent.iterdir()} <= {"adapter", "base"}


def test_a_merge_that_computes_something_else_is_caught(adapter, tmp_path, no_process, monkeypatch):
    honest = PlacedSide.merge

    def tampered(self):
        honest(self)
        if self.name.endswith("layer.0.attention.self.value"):
            self.served.weight.data[0, 0] += 1e-2

    monkeypatch.setattr(PlacedSide, "merge", tampered)
    caught(adapter, tmp_path / "merged", streaming=False)


def test_a_merge_from_disk_that_computes_something_else_is_caught(adapter, tmp_path, no_process, monkeypatch):
    honest = LowRank.change
    monkeypatch.setattr(LowRank, "change", lambda self, weight, rows: honest(self, weight, rows) * 1.01)
    caught(adapter, tmp_path / "merged")


def test_a_merge_that_forgets_the_adapter_is_caught_in_half_precision_too(tmp_path, no_process, monkeypatch):
    base = save_bert(tmp_path / "base", dtype=torch.bfloat16)
    adapter, _ = adapter_on(base, LoRA(rank=4), tmp_path / "adapter", scale=0.1)
    monkeypatch.setattr(PlacedSide, "merge", PlacedSide.remove)
    caught(adapter, tmp_path / "merged", streaming=False)


@pytest.mark.slow
def test_a_checkpoint_that_does_not_load_elsewhere_is_refused(adapter, tmp_path, monkeypatch):
    honest = transformers.PreTrainedModel.save_pretrained

    def truncated(self, folder, **options):
        honest(self, folder, **options)
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", truncated)
    with pytest.raises(MergeError, match="does not load with plain transformers"):
        merge(adapter, out=tmp_path / "merged", streaming=False)
    assert not (tmp_path / "merged").exists()


def test_another_base_is_refused(adapter, tmp_path):
    with pytest.raises(LightsftError, match=r"another (backbone|model)"):
        merge(adapter, base=save_bert(tmp_path / "other", seed=3), out=tmp_path / "merged")
    with pytest.raises(BackboneError, match="no folder"):
        merge(adapter, base="./nowhere", out=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_chat_model_with_a_small_vocabulary_is_no_base_of_a_classifier(adapter, tmp_path):
    other = save_llama(tmp_path / "other")
    with pytest.raises(LightsftError):
        merge(adapter, base=other, out=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.slow
def test_a_classifier_that_reads_the_state_at_the_end_token_merges(bert, tmp_path):
    """BART's classifier wants the same number of end tokens in each row, also of random inputs."""
    tiny("bart").save_pretrained(tmp_path / "base")
    transformers.AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path / "base")
    folder, _ = adapter_on(tmp_path / "base", LoRA(rank=2), tmp_path / "adapter")
    assert merge_folder(folder, tmp_path / "merged")["passed"]


@pytest.mark.slow
def test_an_effect_below_the_rounding_of_16_bit_is_refused_and_merges_in_float32(bert, tmp_path):
    base = tmp_path / "base"
    transformers.AutoModelForSequenceClassification.from_pretrained(bert, dtype=torch.bfloat16).save_pretrained(base)
    transformers.AutoTokenizer.from_pretrained(bert).save_pretrained(base)
    folder, _ = adapter_on(base, LoRA(rank=2), tmp_path / "adapter", scale=1e-3)
    with pytest.raises(MergeError, match="--dtype float32"):
        merge_folder(folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert merge_folder(folder, tmp_path / "merged", dtype="float32")["passed"]
