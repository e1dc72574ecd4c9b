"""Folders of virtual tokens: ours open in PEFT, PEFT's in lightsft, with the same logits."""

import json

import pytest
import torch
from peft import PeftModel, PromptEncoderConfig, PromptTuningConfig, get_peft_model

import lightsft
from lightsft import Backbone
from lightsft.errors import ArtifactError
from lightsft_adapters.p_tuning import PTuning
from lightsft_adapters.prompt import Prompt
from tests.tiny_models import batch, logits, off, randomise, tiny

COUNT = 5
TASK_TYPES = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}
OURS = {
    "prompt": Prompt(COUNT),
    "mlp": PTuning(COUNT, hidden_size=12),
    "lstm": PTuning(COUNT, "lstm", hidden_size=12, dropout=0.3),
}
ours = pytest.mark.parametrize("strategy", OURS.values(), ids=OURS)
names = pytest.mark.parametrize("name", list(TASK_TYPES))


def callers(model, found):
    """Logits without the virtual tokens, which PEFT leaves in front of a decoder's, at the tokens that are real."""
    given = batch(model, labels=False)
    if "decoder_input_ids" in given:
        return found
    return found[:, found.shape[1] - given["input_ids"].shape[1] :][given["attention_mask"].bool()]


@names
@ours
def test_peft_opens_our_folder_with_the_same_logits(strategy, name, tmp_path):
    injection = randomise(strategy.inject(Backbone(tiny(name), task="chat")), scale=0.3)
    injection.model.train()  # what a network makes is saved without its dropout
    injection.save(tmp_path)
    model = injection.model.eval()
    theirs = PeftModel.from_pretrained(tiny(name), tmp_path)
    assert off(callers(model, logits(theirs)), callers(model, logits(model))) <= 1e-5
    with injection.disabled():
        assert off(callers(model, logits(theirs)), callers(model, logits(model))) > 1e-3


@names
@pytest.mark.parametrize("kind", [PromptTuningConfig, PromptEncoderConfig])
def test_our_load_opens_pefts_folder_with_the_same_logits(kind, name, tmp_path):
    options = {"encoder_hidden_size": 12} if kind is PromptEncoderConfig else {}
    theirs = get_peft_model(tiny(name), kind(task_type=TASK_TYPES[name], num_virtual_tokens=COUNT, **options)).eval()
    theirs.save_pretrained(tmp_path)
    injection = lightsft.load(tmp_path, tiny(name))
    assert injection.strategy == Prompt(COUNT)
    assert off(callers(injection.model, logits(injection.model)), callers(injection.model, logits(theirs))) <= 1e-5


@ours
def test_our_folder_is_ours_first(strategy, tmp_path):
    injection = randomise(strategy.inject(Backbone(tiny("llama"), task="chat")))
    loaded = lightsft.load(injection.save(tmp_path), tiny("llama"))
    assert loaded.strategy == strategy
    assert torch.equal(logits(loaded.model), logits(injection.model))


@pytest.mark.parametrize("name", ["bert", "roberta", "bart"])
@ours
def test_a_classifier_opens_in_lightsft_only(strategy, name, tmp_path, caplog):
    """Its head reads the first token, in whose place PEFT puts a virtual one."""
    injection = randomise(strategy.inject(Backbone(tiny(name), task="classification")))
    injection.save(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    assert "PEFT cannot open" in caplog.text
    assert torch.equal(logits(lightsft.load(tmp_path, tiny(name)).model), logits(injection.model))


@pytest.mark.parametrize(
    ("change", "told"), [({"task_type": "SEQ_CLS"}, "for SEQ_CLS"), ({"num_virtual_tokens": None}, "damaged")]
)
def test_pefts_folders_that_mean_something_else_are_refused(change, told, tmp_path):
    theirs = get_peft_model(tiny("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=COUNT))
    theirs.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | change))
    with pytest.raises(ArtifactError, match=told):
        lightsft.load(tmp_path, tiny("llama"))
