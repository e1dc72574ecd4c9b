"""Adapter folders: strict to load, hard to damage."""

import json
import math

import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import lightsft
from lightsft import Backbone, artifact
from lightsft.errors import ArtifactError, ConfigurationError, LightsftError, OutputError
from lightsft_adapters import Full, LoRA
from tests.tiny_models import logits, randomise, tiny

TENSORS, SETTINGS = "adapter_model.safetensors", "lightsft.json"
QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"


@pytest.fixture
def folder(tmp_path):
    """A LoRA on the tiny BERT, saved."""
    return randomise(LoRA(rank=4).inject(Backbone(tiny("bert")))).save(tmp_path / "adapter")


def edit(folder, change):
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})


def edit_settings(folder, **changes):
    settings = json.loads((folder / SETTINGS).read_text())
    (folder / SETTINGS).write_text(json.dumps(settings | changes))


def refused(folder, error=ArtifactError, base=None):
    """The message with which loading fails; the backbone is as it was."""
    model = tiny("bert") if base is None else base
    before, keys = logits(model), list(model.state_dict())
    with pytest.raises(error) as caught:
        lightsft.load(folder, model)
    assert list(model.state_dict()) == keys
    assert torch.equal(logits(model), before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    return str(caught.value)


# ---- strict


def test_missing_extra_and_misshapen_tensors_are_reported_together(folder):
    def change(tensors):
        del tensors[f"{QUERY}.lora_A.weight"]
        tensors["base_model.model.stranger"] = torch.ones(2)
        tensors[f"{QUERY}.lora_B.weight"] = torch.ones(32, 9)

    edit(folder, change)
    message = refused(folder)
    name = QUERY.removeprefix("base_model.model.")
    assert f"missing {name}.lora_A.weight" in message
    assert "unexpected stranger" in message
    assert f"{name}.lora_B.weight has shape (32, 9), not (32, 4)" in message


def test_a_long_list_of_mismatches_is_cut_and_counted(folder):
    edit(folder, lambda tensors: tensors.clear() or tensors.update(x=torch.ones(1)))
    message = refused(folder)
    assert message.count("missing") == 12
    assert "and 15 more" in message


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_tensors_that_are_not_finite_are_refused_by_name(folder, value):
    edit(folder, lambda tensors: tensors[f"{QUERY}.lora_A.weight"][0, 0].fill_(value))
    assert "query.lora_A.weight" in refused(folder)


# ---- damage


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.999])
def test_a_truncated_file_is_called_damaged(folder, kept):
    path = folder / TENSORS
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    assert f"{path} is damaged" in refused(folder)


def test_a_file_of_other_content_is_called_damaged(folder):
    (folder / TENSORS).write_bytes(b"<html>not found</html>" * 10)
    assert "is damaged" in refused(folder)


@pytest.mark.parametrize(
    "text", ["", "{", '{"format": 1', "[1]", "null", '{"format": 1}', '{"strategy": "lora", "options": 3}']
)
def test_damaged_settings_are_refused_with_the_files_name(folder, text):
    (folder / SETTINGS).write_text(text)
    assert SETTINGS in refused(folder)


def test_settings_that_are_not_text_are_refused(folder):
    (folder / SETTINGS).write_bytes(b"\xff\xfe\x00{")
    assert SETTINGS in refused(folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"peft_type": "LORA"}'])
def test_damaged_peft_settings_are_refused_with_the_files_name(folder, text):
    (folder / SETTINGS).unlink()
    (folder / "adapter_config.json").write_text(text)
    assert "adapter_config.json" in refused(folder)


def test_a_folder_of_a_later_format_is_refused(folder):
    edit_settings(folder, format=artifact.FORMAT + 1)
    assert "format" in refused(folder)


def test_an_option_that_this_version_does_not_know_is_refused(folder):
    edit_settings(folder, options={"rank": 4, "dyslexic": True})
    assert "dyslexic" in refused(folder, ConfigurationError)


def test_a_strategy_that_is_not_installed_is_refused_by_name(folder):
    edit_settings(folder, strategy="lorra")
    message = refused(folder, ConfigurationError)
    assert "lorra" in message
    assert "did you mean 'lora'" in message


def test_a_folder_that_holds_nothing_is_refused(tmp_path):
    assert TENSORS in refused(tmp_path)


def test_a_folder_without_any_settings_is_refused(folder):
    (folder / SETTINGS).unlink()
    (folder / "adapter_config.json").unlink()
    assert "neither" in refused(folder)


# ---- another backbone


def test_other_weights_of_the_same_shape_are_refused_by_name(folder):
    message = refused(folder, base=tiny("bert", seed=1))
    assert "trained on another backbone" in message
    assert "word_embeddings.weight holds other values" in message


@pytest.mark.parametrize("other", ["roberta", "llama", "bart"])
def test_another_architecture_is_refused_by_its_class(folder, other):
    base = tiny(other)
    message = refused(folder, base=base)
    assert type(base).__name__ in message
    assert "BertForSequenceClassification" in message


def test_a_backbone_with_fewer_layers_is_refused(folder):
    assert "no weight named" in refused(folder, base=tiny("bert", num_hidden_layers=1))


def test_the_same_backbone_in_half_precision_is_accepted(folder):
    assert lightsft.load(folder, tiny("bert", dtype=torch.bfloat16)).parameters()


def test_another_head_is_no_other_backbone(folder):
    """The head is in the file."""
    base = tiny("bert")
    torch.nn.init.normal_(base.classifier.weight)
    assert torch.equal(logits(lightsft.load(folder, base).model), logits(lightsft.load(folder, tiny("bert")).model))


def test_a_full_injection_knows_its_backbone_although_it_changes_it(tmp_path):
    folder = randomise(Full().inject(Backbone(tiny("bert")))).save(tmp_path)
    assert lightsft.load(folder, tiny("bert")).parameters()
    assert "another backbone" in refused(folder, base=tiny("bert", seed=1))


# ---- finding the backbone


def test_without_a_backbone_the_one_it_was_trained_on_is_loaded(tmp_path, monkeypatch):
    base = tiny("bert")
    backbone = Backbone(base, task="classification", source="somewhere")
    injection = randomise(LoRA().inject(backbone))
    folder = injection.save(tmp_path)
    asked = {}

    def load(source, **options):
        asked.update(source=source, **options)
        return Backbone(tiny("bert"))

    monkeypatch.setattr(Backbone, "load", load)
    assert torch.equal(logits(lightsft.load(folder).model), logits(injection.model))
    assert asked == {"source": "somewhere", "task": "classification", "labels": ["LABEL_0", "LABEL_1", "LABEL_2"]}


def test_a_folder_that_names_no_backbone_asks_for_one(folder):
    with pytest.raises(ArtifactError, match="does not say which model"):
        lightsft.load(folder)


@pytest.mark.parametrize("kind", ["BertForQuestionAnswering", "BertForTokenClassification", "BertForMaskedLM"])
def test_a_model_for_another_task_is_loaded_as_the_class_that_it_was(kind, tmp_path):
    config = tiny("bert", num_labels=2).config
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, kind)(config).eval()
    model.save_pretrained(tmp_path / "base")
    base = getattr(transformers, kind).from_pretrained(tmp_path / "base").eval()
    injection = randomise(LoRA(rank=2).inject(Backbone(base)))
    folder = injection.save(tmp_path / "adapter")
    again = lightsft.load(folder, artifact.load_base(folder, dtype="float32", device="cpu"))
    assert type(lightsft.load(folder).model) is type(again.model) is type(model)
    inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
    with torch.no_grad():
        pairs = zip(again.model.eval()(**inputs).values(), injection.model.eval()(**inputs).values(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def test_a_class_that_transformers_does_not_have_asks_for_the_model(folder):
    settings = json.loads((folder / SETTINGS).read_text())
    edit_settings(folder, task=None, base=settings["base"] | {"class": "SecretForPoetry", "source": "somewhere"})
    with pytest.raises(ArtifactError, match="SecretForPoetry, which lightsft does not load"):
        lightsft.load(folder)


def test_a_backbone_that_is_gone_is_named(tmp_path):
    injection = LoRA().inject(Backbone(tiny("bert"), task="classification", source="/nowhere/at/all"))
    folder = injection.save(tmp_path)
    with pytest.raises(ArtifactError, match=r"(?s)/nowhere/at/all.*--base MODEL"):
        lightsft.load(folder)


# ---- writing


def disk_full(tensors, path, metadata=None):
    path.write_bytes(b"half a file")
    raise OSError(28, "No space left on device")


def safetensors_disk_full(tensors, path, metadata=None):
    path.write_bytes(b"half a file")
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("failing", [disk_full, safetensors_disk_full])
def test_a_full_disk_is_an_output_error_and_keeps_the_files_that_were_there(folder, monkeypatch, failing):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    monkeypatch.setattr(artifact, "save_file", failing)
    with pytest.raises(OutputError, match="No space left on device"):
        LoRA(rank=2).inject(Backbone(tiny("bert"))).save(folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_another_error_while_writing_is_not_called_a_full_disk(folder, monkeypatch):
    def failing(tensors, path, metadata=None):
        raise SafetensorError("something else")

    monkeypatch.setattr(artifact, "save_file", failing)
    with pytest.raises(SafetensorError, match="something else"):
        LoRA(rank=2).inject(Backbone(tiny("bert"))).save(folder)


def test_a_path_through_a_file_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LightsftError, match="file"):
        LoRA().inject(Backbone(tiny("bert"))).save(tmp_path / "file" / "adapter")


def test_saving_over_a_folder_keeps_the_files_of_others(folder):
    (folder / "notes.txt").write_text("mine")
    injection = randomise(LoRA(rank=2).inject(Backbone(tiny("bert"))), seed=5)
    injection.save(folder)
    assert (folder / "notes.txt").read_text() == "mine"
    assert torch.equal(logits(lightsft.load(folder, tiny("bert")).model), logits(injection.model))


def test_saving_another_strategy_over_a_folder_leaves_no_settings_of_the_first(folder):
    injection = randomise(Full(targets="head").inject(Backbone(tiny("bert"))))
    injection.save(folder)
    assert not (folder / "adapter_config.json").exists()
    assert torch.equal(logits(lightsft.load(folder, tiny("bert")).model), logits(injection.model))


def test_settings_say_what_it_is_and_hold_neither_time_nor_place(folder):
    settings = json.loads((folder / SETTINGS).read_text())
    assert settings["strategy"] == "lora"
    assert settings["options"]["rank"] == 4
    assert settings["base"]["class"] == "BertForSequenceClassification"
    assert set(settings) == {"format", "strategy", "options", "seed", "task", "base"}
