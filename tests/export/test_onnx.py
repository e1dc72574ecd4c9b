"""ONNX graphs: the logits of base + strategy for every batch and length, without lightsft, or nothing at all."""

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import transformers

import lightsft
from lightsft import Backbone, registry
from lightsft.errors import ConfigurationError, MergeError
from lightsft.export import export, onnx_graph
from lightsft.export.held_out import HeldOut
from lightsft.export.onnx_check import OnnxModel, answers, compared, random_batches
from lightsft.export.onnx_graph import LIMIT, export_folder
from lightsft.export.onnx_tracing import Traced, trace_to_onnx
from lightsft_adapters import Adapter, LoRA
from tests.checkpoints import LABELS, labelled_rows, save_bert
from tests.cli.test_bad_input import refused
from tests.export.test_merge import TEXTS, adapter_on
from tests.test_docs import ROOT, blocks
from tests.tiny_models import randomise, tiny

NAMES = ("input_ids", "attention_mask")
PLAIN = """
import json, sys
for name in ("lightsft", "lightsft_adapters", "peft", "torch"):
    sys.modules[name] = None
import onnxruntime, transformers
folder, texts = sys.argv[1], sys.argv[2:]
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
session = onnxruntime.InferenceSession(folder + "/model.onnx", providers=["CPUExecutionProvider"])
def logits(texts):
    return session.run(["logits"], dict(tokenizer(texts, padding=True, return_tensors="np")))[0].tolist()
labels = json.load(open(folder + "/config.json"))["id2label"]
print(json.dumps({"alone": [logits([text])[0] for text in texts], "together": logits(texts), "labels": labels}))
"""


def elsewhere(folder, texts=TEXTS):
    """What a process gets from a folder that knows onnxruntime and the tokenizer alone."""
    done = subprocess.run([sys.executable, "-c", PLAIN, folder, *texts], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@dataclass(frozen=True)
class Exported:
    """A bottleneck adapter, which no weight can express, its graph, and its logits on TEXTS."""

    adapter: Path
    folder: Path
    logits: torch.Tensor

    def traced(self, *arguments):
        """The same graph again, without tracing."""
        return Traced(self, ("logits",), 64)

    def save(self, path):
        """As the exporter's program saves."""
        shutil.copyfile(self.folder / "model.onnx", path)


@pytest.fixture(scope="session")
def exported(bert, tmp_path_factory):
    """Nothing may change it."""
    root = tmp_path_factory.mktemp("onnx")
    adapter, tuned = adapter_on(bert, Adapter(), root / "adapter", scale=0.2)
    rows = HeldOut(lightsft.task("classification", labels=LABELS), labelled_rows(40, seed=5))
    export_folder(adapter, root / "graph", rows=rows)
    return Exported(adapter, root / "graph", torch.stack(tuned))


@pytest.fixture
def traced_already(exported, monkeypatch):
    """Exports of `exported.adapter` take its graph."""
    monkeypatch.setattr("lightsft.export.onnx_tracing.trace_to_onnx", exported.traced)
    return exported


# ---- what an exported folder is


def test_a_process_without_lightsft_and_torch_gets_the_same_predictions(exported):
    found = elsewhere(exported.folder)
    for logits in (found["alone"], found["together"]):
        torch.testing.assert_close(torch.tensor(logits), exported.logits, rtol=1e-4, atol=1e-5)
    assert found["labels"] == {"0": "neg", "1": "pos"}


def test_the_documented_session_runs(exported, monkeypatch):
    monkeypatch.chdir(exported.folder.parent)
    (code,) = (block for block in blocks(ROOT / "docs" / "exporting.md", "python") if "onnxruntime" in block)
    names = {}
    exec(code, names)
    assert names["logits"].shape == (2, 2)


def test_the_certificate_says_what_was_compared(bert, exported):
    stored = json.loads((exported.folder / "certificate.json").read_text())
    assert (stored["format"], stored["strategy"], stored["base"]) == ("onnx", "Adapter", str(bert))
    assert (stored["inputs"], stored["outputs"]) == (["input_ids", "attention_mask", "token_type_ids"], ["logits"])
    assert stored["providers"] == ["CPUExecutionProvider"]
    assert stored["fp32"]["relative_difference"] <= stored["limit"] == LIMIT
    assert stored["fp32"]["agreement"] == 1.0
    assert stored["largest_adapter_effect"] > 1000 * stored["fp32"]["largest_difference"]
    assert stored["compared"]["inputs"] == 40 + stored["compared"]["random_inputs"]
    assert {rows for rows, _ in stored["compared"]["sizes"]} >= {1, 2, 3, 5, 8}
    assert stored["compared"]["batches_with_padding"] >= 4
    assert (stored["metric"], stored["examples"]) == ("accuracy", 40)
    assert stored["fp32"]["score"] == stored["score"]
    assert {"onnx", "onnxruntime", "onnxscript", "torch", "transformers"} <= stored["versions"].keys()
    assert stored["opset"] >= 18
    graph = (exported.folder / "model.onnx").read_bytes()
    assert stored["sha256"] == {"model.onnx": hashlib.sha256(graph).hexdigest()}


def test_batch_and_length_have_names_and_logits_are_fp32(exported):
    graph = onnx.load(exported.folder / "model.onnx").graph
    shapes = [[d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] for value in graph.input]
    assert shapes == [["batch", "length"]] * 3
    (logits,) = graph.output
    assert logits.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert [d.dim_param or d.dim_value for d in logits.type.tensor_type.shape.dim] == ["batch", 2]


def test_the_folder_holds_the_configuration_and_a_tokenizer_that_knows_the_limit(exported):
    config = transformers.AutoConfig.from_pretrained(exported.folder)
    assert config.architectures == ["BertForSequenceClassification"]
    assert config.id2label == {0: "neg", 1: "pos"}
    assert transformers.AutoTokenizer.from_pretrained(exported.folder).model_max_length == 64
    assert {path.name for path in exported.folder.iterdir()} == {
        "model.onnx", "config.json", "tokenizer.json", "tokenizer_config.json", "certificate.json",
    }  # fmt: skip


# ---- strategies


def difference(model, tmp_path):
    """Of the model from its graph, on every size, over the largest logit."""
    backbone = Backbone(model)
    traced = trace_to_onnx(model, random_batches(backbone, NAMES, None, 20)[5])
    traced.program.save(str(tmp_path / "model.onnx"))
    given = random_batches(backbone, NAMES, traced.longest, 20)
    graph = OnnxModel(tmp_path / "model.onnx")
    found = compared(given, answers(model, given, traced.outputs), answers(graph, given, traced.outputs))
    assert found["largest_value"] > 0.1
    return found["relative_difference"]


def carrying(model, label):
    """The injection of a strategy with random weights."""
    name, _, options = label.partition(":")
    injection = registry.strategy(name, **json.loads(options or "{}")).inject(Backbone(model))
    return randomise(injection)


STRATEGIES = [
    "lora", "ia3", "norm", "lora_fa", "adapter", "prefix:{\"reparameterisation\": true}", "prompt",
    "p_tuning", "p_tuning:{\"encoder\": \"lstm\"}", "full", "compacter", "vera", "bitfit", "mam",
]  # fmt: skip


def test_a_prefix_is_in_the_graph_and_the_model_as_it_was(tmp_path):
    model = tiny("bert")
    carrying(model, "prefix")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    assert difference(model, tmp_path) <= LIMIT
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.slow
def test_what_depends_on_no_input_is_computed_beforehand(tmp_path):
    """LoReFT's rotation is the Q of a decomposition, for which ONNX has no operation."""
    model = tiny("bert")
    carrying(model, "reft")
    assert difference(model, tmp_path) <= LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("label", STRATEGIES)
def test_every_strategy_is_in_the_graph_of_an_encoder(tmp_path, label):
    model = tiny("bert")
    carrying(model, label)
    assert difference(model, tmp_path) <= LIMIT


@pytest.mark.slow
def test_dora_is_refused_with_the_way_out():
    """torch.export loses sight of the row norms of the weights; DoRA merges."""
    model = tiny("bert")
    carrying(model, 'lora:{"dora": true}')
    with pytest.raises(MergeError, match=r"(?s)cannot be traced into one graph.*lightsft merge"):
        trace_to_onnx(model, random_batches(Backbone(model), NAMES, None)[5])


def classifier(name):
    """A tiny decoder, or encoder-decoder, that classifies."""
    kinds = {
        "llama": transformers.LlamaForSequenceClassification,
        "gpt2": transformers.GPT2ForSequenceClassification,
        "t5": transformers.T5ForSequenceClassification,
    }
    if name not in kinds:
        return tiny(name)
    config = tiny(name).config
    config.num_labels = 3
    torch.manual_seed(0)
    return kinds[name](config).eval()


@pytest.mark.slow
@pytest.mark.parametrize("label", ["lora", "adapter", "prefix", "prompt", "reft"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "roberta", "t5", "bart"])
def test_strategies_are_in_the_graph_of_other_architectures(tmp_path, name, label):
    model = classifier(name)
    carrying(model, label)
    assert difference(model, tmp_path) <= LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["BertForTokenClassification", "BertForQuestionAnswering", "BertModel"])
def test_models_with_other_answers_are_exported(bert, tmp_path, kind):
    backbone = Backbone.load(bert, task=None, kind=getattr(transformers, kind), dtype="float32", device="cpu")
    randomise(Adapter().inject(backbone), scale=0.2).save(tmp_path / "adapter")
    stored = export_folder(tmp_path / "adapter", tmp_path / "graph")
    outputs = {"BertForTokenClassification": ["logits"], "BertForQuestionAnswering": ["start_logits", "end_logits"]}
    assert stored["outputs"] == outputs.get(kind, ["last_hidden_state", "pooler_output"])
    assert stored["fp32"]["relative_difference"] <= LIMIT
    assert stored["largest_adapter_effect"] > 0.01


@pytest.mark.slow
def test_a_merged_checkpoint_is_exported(bert, tmp_path):
    folder, tuned = adapter_on(bert, LoRA(rank=4), tmp_path / "adapter", scale=0.2)
    lightsft.merge(folder, out=tmp_path / "merged", check="none")
    export(tmp_path / "merged", out=tmp_path / "graph", to="onnx")
    found = elsewhere(tmp_path / "graph")
    torch.testing.assert_close(torch.tensor(found["together"]), torch.stack(tuned), rtol=1e-4, atol=1e-5)


# ---- int8


def test_int8_is_smaller_and_reported_beside_fp32(command, traced_already, tmp_path):
    ended = command(
        "export", traced_already.adapter, "--to", "onnx", "--out", tmp_path / "graph", "--quantize", "int8",
    )  # fmt: skip
    assert ended.code == 0, ended.error
    stored = json.loads((tmp_path / "graph" / "certificate.json").read_text())
    assert "% of the size" in ended.out
    assert stored["int8"]["integer_products"] > 10
    assert stored["int8"]["bytes"] < stored["int8"]["bytes_of_fp32"]
    assert stored["fp32"]["largest_difference"] < stored["int8"]["largest_difference"] < 0.5
    assert stored["int8"]["agreement"] >= stored["int8"]["limit"]
    assert {path.name for path in (tmp_path / "graph").glob("*.onnx*")} == {"model.onnx"}
    assert np.abs(np.array(elsewhere(tmp_path / "graph")["together"]) - traced_already.logits.numpy()).max() < 0.5


def test_int8_that_often_chooses_another_label_is_refused_unless_forced(traced_already, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_graph, "LEAST_AGREEMENT", 1.01)
    with pytest.raises(MergeError, match=r"agrees with fp32 on 100\.0 %"):
        export(traced_already.adapter, out=tmp_path / "graph", to="onnx", quantize="int8")
    assert not (tmp_path / "graph").exists()
    export(traced_already.adapter, out=tmp_path / "graph", to="onnx", quantize="int8", force=True)
    assert json.loads((tmp_path / "graph" / "certificate.json").read_text())["int8"]["forced"]


# ---- what is refused


def test_a_graph_that_computes_something_else_is_refused(bert, traced_already, tmp_path):
    other, _ = adapter_on(bert, Adapter(), tmp_path / "adapter", scale=0.19)
    with pytest.raises(MergeError, match="the graph differs from the model by"):
        export(other, out=tmp_path / "graph", to="onnx")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


def test_a_model_that_cannot_be_traced_is_refused_with_the_reason(exported, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("data-dependent control flow") from ValueError("if x.sum() > 0")

    monkeypatch.setattr(torch.export, "export", fail)
    with pytest.raises(MergeError, match=r"cannot be traced into one graph: if x.sum\(\) > 0"):
        export(exported.adapter, out=tmp_path / "graph", to="onnx")
    assert not list(tmp_path.iterdir())


def test_an_unknown_format_is_refused_with_the_known_ones(command, exported, tmp_path):
    refused(command("export", exported.adapter, "--to", "coreml", "--out", tmp_path / "graph"), "coreml", "one of onnx")
    with pytest.raises(ConfigurationError, match="one of int8"):
        export(exported.adapter, out=tmp_path / "graph", to="onnx", quantize="int3")


def test_an_occupied_folder_is_refused_and_untouched(command, exported, tmp_path):
    (tmp_path / "thesis.txt").write_text("three years of work")
    refused(command("export", exported.adapter, "--to", "onnx", "--out", tmp_path), "already exists and is not empty")
    assert (tmp_path / "thesis.txt").read_text() == "three years of work"


def test_missing_packages_are_named_with_the_command(exported, tmp_path, monkeypatch):
    monkeypatch.setattr("lightsft.export.onnx_source.find_spec", lambda name: None if name != "onnx" else name)
    with pytest.raises(ConfigurationError, match=r"(?s)onnxscript, onnxruntime are.*pip install lightsft\[onnx\]"):
        export(exported.adapter, out=tmp_path / "graph", to="onnx")


def test_a_chat_model_is_refused_with_the_way_out(llama, tmp_path):
    adapter, _ = adapter_on(llama, LoRA(rank=2), tmp_path / "adapter", task="chat", labels=None)
    for folder in (adapter, llama):
        with pytest.raises(ConfigurationError, match=r"(?s)generates text.*lightsft merge"):
            export(folder, out=tmp_path / "graph", to="onnx")


def test_another_base_is_refused(exported, tmp_path):
    with pytest.raises(lightsft.LightsftError, match="another backbone"):
        export(exported.adapter, base=save_bert(tmp_path / "other", seed=3), out=tmp_path / "graph", to="onnx")


@pytest.mark.slow
def test_a_base_in_codes_is_refused_or_taken_as_what_the_codes_stand_for(bert, tmp_path):
    labels = {"task": "classification", "labels": LABELS}
    backbone = Backbone.load(bert, dtype="float32", device="cpu", quantization="nf4", **labels)
    randomise(Adapter().inject(backbone), scale=0.2).save(tmp_path / "adapter")
    with pytest.raises(ConfigurationError, match=r"(?s)kept in codes \(nf4.*merge first.*--dequantize"):
        export(tmp_path / "adapter", out=tmp_path / "graph", to="onnx")
    export(tmp_path / "adapter", out=tmp_path / "graph", to="onnx", dequantize=True)
    inputs = backbone.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = backbone.model.eval()(**inputs).logits
    found = torch.tensor(elsewhere(tmp_path / "graph")["together"])
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
