"""Nats per token of neutral text, before and after: against the model's own loss, and which models have it."""

import pytest
import torch

from lightsft import Backbone
from lightsft.comparison.measures.forgetting import forgetting
from lightsft.comparison.measures.neutral_text import neutral_passages
from lightsft_adapters import LoRA, Prefix
from lightsft_adapters.prompt import Prompt
from tests.checkpoints import chat_tokenizer, wordpiece_tokenizer
from tests.tiny_models import randomise, tiny

TEXTS = ["The film was here.", "They said so again and again, with a book.", " ", "It is a day."]


@pytest.fixture
def backbone(llama):
    return Backbone.load(llama, task="chat", dtype="float32", device="cpu")


def nats(model, tokenizer, texts):
    """(summed loss, tokens) of texts that fit into one window, by transformers' own loss."""
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            total += model(input_ids=ids, labels=ids).loss.double().item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return total, count


def test_before_and_after_are_the_loss_without_and_with_the_strategy(backbone):
    spoken = [text for text in TEXTS if text.strip()]
    total, count = nats(backbone.model, backbone.tokenizer, spoken)
    injection = randomise(LoRA(4).inject(backbone))
    found = forgetting(injection, TEXTS)
    tuned, _ = nats(injection.model, backbone.tokenizer, spoken)
    assert found["tokens"] == count
    assert found["before"] == pytest.approx(total / count, rel=1e-5)
    assert found["after"] == pytest.approx(tuned / count, rel=1e-5)
    assert abs(found["after"] - found["before"]) > 1e-3


def test_an_untrained_lora_forgets_nothing(backbone):
    found = forgetting(LoRA(4).inject(backbone), tokens=1000)
    assert found["after"] == found["before"]
    assert 1000 <= found["tokens"] < 5000


@pytest.mark.parametrize("strategy", [Prompt(num_virtual_tokens=5), Prefix(num_virtual_tokens=5)])
def test_windows_leave_room_for_virtual_tokens(strategy):
    tokenizer = chat_tokenizer()
    model = tiny("gpt2", vocab_size=len(tokenizer))  # 64 positions that are looked up
    found = forgetting(strategy.inject(Backbone(model, tokenizer=tokenizer)), ["a text of many letters " * 20])
    assert found["tokens"] == len("a text of many letters " * 20)


def test_models_that_do_not_write_one_token_after_the_other_have_none():
    import transformers

    tokenizer = wordpiece_tokenizer()
    masked = transformers.BertForMaskedLM(tiny("bert", vocab_size=len(tokenizer)).config)
    assert forgetting(LoRA(4).inject(Backbone(masked, tokenizer=tokenizer)), TEXTS) is None
    classifier = tiny("bert", vocab_size=len(tokenizer))
    assert forgetting(LoRA(4).inject(Backbone(classifier, tokenizer=tokenizer)), TEXTS) is None
    both = tiny("t5", vocab_size=len(tokenizer))
    assert forgetting(LoRA(4).inject(Backbone(both, tokenizer=tokenizer)), TEXTS) is None


def test_without_any_text_there_is_nothing_to_say(backbone):
    assert forgetting(LoRA(4).inject(backbone), [" "]) is None


def test_the_neutral_text_is_prose_each_paragraph_once():
    passages = neutral_passages()
    assert sum(map(len, passages)) > 60_000  # 8,000 tokens of about four characters, and some to spare
    paragraphs = [paragraph for passage in passages for paragraph in passage.split("\n\n")]
    assert len(set(paragraphs)) == len(paragraphs)
    for paragraph in paragraphs:
        assert "::=" not in paragraph
        assert "*" not in paragraph
        assert paragraph.endswith(".")
        assert '"' not in paragraph
        assert "  " not in paragraph
    assert neutral_passages() == passages
