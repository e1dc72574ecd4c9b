"""Every task with every strategy and beside every kind of codes: a step whose gradients reach all that is trained."""

import numpy as np
import pytest
import torch
import transformers

from lightsft.backbone import Backbone
from lightsft.errors import TargetError
from lightsft.quantization import Quantization
from lightsft.quantizing import quantizable, quantize
from lightsft.registry import strategy
from lightsft.tasks import TASKS, task_class
from lightsft.training.evaluate import observed, outcomes_of
from tests.checkpoints import chat_tokenizer, wordpiece_tokenizer

STRATEGIES = (
    "full", "lora", "adapter", "prefix", "prompt", "p_tuning", "compacter", "vera", "lora_fa", "reft", "ia3", "bitfit",
    "norm", "mam",
)  # fmt: skip
TEXTS = ["good film", "a really bad day", "the film was good", "bad bad bad", "not a good day", "what a film"]
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}


def images():
    from PIL import Image

    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in TEXTS]


def sounds():
    random = np.random.default_rng(0)
    return [{"array": random.normal(size=3000).astype(np.float32), "sampling_rate": 16000} for _ in TEXTS]


def rows_of(name):
    """Six rows of a task."""
    labels = ["a", "b"] * 3
    made = {
        "classification": {"text": TEXTS, "label": labels},
        "multi-label": {"text": TEXTS, "labels": [["a"], ["b"], ["a", "b"], [], ["c"], ["a", "c"]]},
        "regression": {"text": TEXTS, "score": [0.1, 0.9, 0.4, 0.3, 0.7, 0.5]},
        "token-classification": {
            "tokens": [text.split() for text in TEXTS],
            "tags": [["B-X", "I-X", "O", "O"][: len(text.split())] for text in TEXTS],
        },
        "question-answering": {
            "question": TEXTS,
            "context": TEXTS[::-1],
            "answers": [{"text": [text.split()[0]], "answer_start": [0]} for text in TEXTS[::-1]],
        },
        "multiple-choice": {"question": TEXTS, "choices": [["good", "bad"]] * 6, "label": [0, 1] * 3},
        "chat": {"prompt": TEXTS, "completion": TEXTS[::-1]},
        "language-modeling": {"text": TEXTS},
        "seq2seq": {"source": TEXTS, "target": TEXTS[::-1]},
        "masked-lm": {"text": TEXTS},
        "embedding": {"anchor": TEXTS, "positive": TEXTS[::-1]},
        "image-classification": {"image": images, "label": labels},
        "audio-classification": {"audio": sounds, "label": labels},
    }[name]
    made = {column: values() if callable(values) else values for column, values in made.items()}
    return [dict(zip(made, cells, strict=True)) for cells in zip(*made.values(), strict=True)]


def model_of(name, labels):
    """(model, what reads its rows): BERT, a T5, a Llama, a ViT or a Wav2Vec2 with the task's head."""
    heads = {"num_labels": len(labels)} if labels else {}
    if name in ("chat", "language-modeling"):
        tokenizer = chat_tokenizer()
        sizes = SIZES | {"num_key_value_heads": 2, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)), tokenizer
    if name == "seq2seq":
        tokenizer = wordpiece_tokenizer()
        sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
        ids = {"pad_token_id": tokenizer.pad_token_id, "decoder_start_token_id": tokenizer.pad_token_id}
        config = transformers.T5Config(vocab_size=len(tokenizer), **sizes, **ids)
        return transformers.T5ForConditionalGeneration(config), tokenizer
    if name == "image-classification":
        processor = transformers.ViTImageProcessor(size={"height": 16, "width": 16})
        config = transformers.ViTConfig(image_size=16, patch_size=8, **SIZES, **heads)
        return transformers.ViTForImageClassification(config), processor
    if name == "audio-classification":
        convolutions = {"conv_dim": (32, 32), "conv_stride": (5, 4), "conv_kernel": (10, 8)}
        convolutions |= {"num_feat_extract_layers": 2}
        positions = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
        config = transformers.Wav2Vec2Config(**SIZES, **convolutions, **positions, **heads)
        return transformers.Wav2Vec2ForSequenceClassification(config), transformers.Wav2Vec2FeatureExtractor()
    kinds = {
        "token-classification": transformers.BertForTokenClassification,
        "question-answering": transformers.BertForQuestionAnswering,
        "multiple-choice": transformers.BertForMultipleChoice,
        "masked-lm": transformers.BertForMaskedLM,
        "embedding": transformers.BertModel,
    }
    tokenizer = wordpiece_tokenizer()
    heads = {"num_labels": 1} if name == "regression" else heads
    config = transformers.BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **SIZES, **heads)
    return kinds.get(name, transformers.BertForSequenceClassification)(config), tokenizer


def without_ids(backbone):
    return None if "input_ids" in (backbone.example or {}) else "takes no token ids"


def without_bias(backbone):
    biases = any(name.endswith("bias") for name, _ in backbone.model.named_parameters())
    return None if biases else "no bias in"


REFUSED = {"prompt": without_ids, "p_tuning": without_ids, "bitfit": without_bias}  # where there is nothing to train


def made(name):
    """(task, rows, backbone)."""
    torch.manual_seed(0)
    rows = rows_of(name)
    options = {"max_length": 24} if name in ("classification", "regression", "token-classification") else {}
    task = task_class(name).for_rows(rows, "the rows", **options)
    model, reader = model_of(name, getattr(task, "labels", ()))
    task = task.for_model(reads_both_ways=name == "seq2seq")
    return task, rows, Backbone(model.eval(), tokenizer=reader, task=name)


def takes_a_step(task, rows, backbone, injection):
    task.check(rows, "the rows")
    features = task.encode(rows, backbone.tokenizer)
    batch = task.collate(features, backbone.tokenizer)
    loss, _ = observed(task, injection.model, batch)
    loss.backward()
    gradients = [p.grad.abs().max() for p in injection.parameters() if p.grad is not None]
    assert torch.isfinite(loss)
    assert max(gradients) > 0, "no gradient reached anything that is trained"
    outcomes = outcomes_of(backbone, task, rows, batch_size=4)
    assert len(outcomes) == len(rows)
    assert np.isfinite(task.score(outcomes, task.metric))


@pytest.mark.parametrize("kind", STRATEGIES)
@pytest.mark.parametrize("name", TASKS)
def test_every_strategy_learns_every_task(name, kind):
    task, rows, backbone = made(name)
    missing = REFUSED.get(kind, lambda backbone: None)(backbone)
    if missing:
        with pytest.raises(TargetError, match=missing):
            strategy(kind).inject(backbone)
        return
    takes_a_step(task, rows, backbone, strategy(kind).inject(backbone))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "adapter", "prefix", "ia3"])
@pytest.mark.parametrize("scheme", ["int8", "nf4", "fp4"])
@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_learned_beside_codes(name, scheme, kind):
    task, rows, backbone = made(name)
    quantize(backbone.model, quantizable(backbone.model, backbone.anatomy), Quantization(scheme), torch.float32)
    backbone = Backbone(backbone.model, tokenizer=backbone.tokenizer, task=name)
    takes_a_step(task, rows, backbone, strategy(kind).inject(backbone))
