"""What enters the head: fed into the layers behind it, it gives the logits that the model gives."""

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import lightsft
from lightsft import Backbone
from lightsft.comparison.baselines.head_inputs import head_inputs, head_layers
from lightsft.training.evaluate import outcomes_of
from tests.checkpoints import FILLER, LABELS, wordpiece_tokenizer
from tests.tiny_models import tiny

TASK = lightsft.task("classification", labels=LABELS)
ROWS = [{"text": " ".join(FILLER[n : n + 2 + 3 * n % 11]), "label": LABELS[n % 2]} for n in range(9)]
SIZES = {"vocab_size": 100, "initializer_range": 0.2, "pad_token_id": 0, "num_labels": 2}
CAUSAL = {
    "gpt2": lambda: transformers.GPT2ForSequenceClassification(
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **SIZES)
    ),
    "llama": lambda: transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, **SIZES
        )
    ),
}


def expected(backbone, rows):
    """(rows, labels) logits of every row alone, without padding."""
    with torch.no_grad():
        return torch.cat(
            [backbone.model.eval()(**backbone.tokenizer(row["text"], return_tensors="pt")).logits for row in rows]
        )


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", CAUSAL)
def test_of_a_causal_classifier_it_is_the_token_whose_logits_are_chosen(name, side, monkeypatch):
    tokenizer = wordpiece_tokenizer()
    monkeypatch.setattr(tokenizer, "padding_side", side)
    backbone = Backbone(CAUSAL[name](), tokenizer=tokenizer)
    found = head_inputs(backbone, TASK, ROWS, batch_size=4)
    assert found.shape == (9, 32)
    said = torch.tensor(found) @ backbone.model.score.weight.detach().double().T
    chosen = outcomes_of(backbone, TASK, ROWS, batch_size=4)[:, :-1]  # in the same batches: positions count padding
    assert said.softmax(-1).numpy() == pytest.approx(chosen, abs=1e-5)
    if side == "right":
        torch.testing.assert_close(said.float(), expected(backbone, ROWS), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "behind"), [("bert", "classifier"), ("roberta", "classifier")])
def test_of_an_encoder_it_is_what_its_head_is_given(name, behind):
    model = tiny(name, num_labels=2)
    backbone = Backbone(model, tokenizer=wordpiece_tokenizer())
    found = torch.tensor(head_inputs(backbone, TASK, ROWS, batch_size=4)).float()
    head = model.get_submodule(behind)
    with torch.no_grad():
        said = head(found if isinstance(head, nn.Linear) else found[:, None])
    torch.testing.assert_close(said, expected(backbone, ROWS), atol=1e-4, rtol=1e-4)


def test_a_fresh_pooler_belongs_to_the_head(tmp_path):
    model = transformers.BertForMaskedLM(tiny("bert").config)
    model.save_pretrained(tmp_path)
    wordpiece_tokenizer().save_pretrained(tmp_path)
    backbone = Backbone.load(tmp_path, labels=LABELS, dtype="float32", device="cpu")
    assert any("pooler" in name for name in backbone.head)
    found = torch.tensor(head_inputs(backbone, TASK, ROWS, batch_size=4)).float()
    ids = backbone.tokenizer([row["text"] for row in ROWS], padding=True, return_tensors="pt")
    with torch.no_grad():
        first = backbone.model.base_model(**ids).last_hidden_state[:, 0]
    torch.testing.assert_close(found, first, atol=1e-5, rtol=1e-5)


def test_of_sounds_it_is_the_mean_of_the_frames_that_are_no_padding():
    config = transformers.Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, conv_dim=(16, 16),
        conv_kernel=(10, 3), conv_stride=(5, 2), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, classifier_proj_size=8, num_labels=2, feat_extract_norm="layer",
    )  # fmt: skip
    model = transformers.Wav2Vec2ForSequenceClassification(config).eval()
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True)
    task = lightsft.task("audio-classification", labels=LABELS)
    sounds = [np.random.default_rng(n).normal(size=1600 + 900 * n).astype(np.float32) for n in range(3)]
    rows = [{"audio": {"array": sound, "sampling_rate": 16000}, "label": "pos"} for sound in sounds]
    found = torch.tensor(head_inputs(Backbone(model, tokenizer=extractor), task, rows, batch_size=3)).float()
    batch = task.collate(task.encode(rows, extractor), extractor)
    batch.pop("labels")
    with torch.no_grad():
        torch.testing.assert_close(
            model.classifier(model.projector(found)), model(**batch).logits, atol=1e-4, rtol=1e-4
        )


def test_of_images_it_is_what_the_classifier_is_given():
    image = pytest.importorskip("PIL.Image")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=4,
        num_labels=2,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config).eval()
    kind = getattr(transformers, "ViTImageProcessorPil", transformers.ViTImageProcessor)
    processor = kind(size={"height": 16, "width": 16})
    task = lightsft.task("image-classification", labels=LABELS)
    chance = np.random.default_rng(0)
    pictures = [image.fromarray(chance.integers(0, 255, (20, 20, 3), dtype=np.uint8)) for _ in range(3)]
    rows = [{"image": picture, "label": "neg"} for picture in pictures]
    found = torch.tensor(head_inputs(Backbone(model, tokenizer=processor), task, rows, batch_size=2)).float()
    with torch.no_grad():
        logits = model(**processor(pictures, return_tensors="pt")).logits
        torch.testing.assert_close(model.classifier(found), logits, atol=1e-4, rtol=1e-4)


def test_rows_have_theirs_whatever_batch_they_are_in_and_nothing_stays_on_the_model():
    backbone = Backbone(CAUSAL["gpt2"](), tokenizer=wordpiece_tokenizer())
    together = head_inputs(backbone, TASK, ROWS, batch_size=9)
    assert head_inputs(backbone, TASK, ROWS, batch_size=2) == pytest.approx(together, abs=1e-5)
    assert torch.is_grad_enabled()
    assert not any(layer._forward_pre_hooks for layer in head_layers(backbone))
    assert all(parameter.grad is None for parameter in backbone.model.parameters())


def test_a_head_that_says_something_of_every_token_has_no_vector_per_row():
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, **SIZES
    )
    model = transformers.BertForTokenClassification(config)
    assert head_inputs(Backbone(model, tokenizer=wordpiece_tokenizer()), TASK, ROWS, batch_size=4) is None
