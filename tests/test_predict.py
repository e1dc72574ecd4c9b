"""Predictions of every task from a backbone, an adapter folder and a checkpoint: what is said, and in which words."""

import json

import numpy as np
import pytest
import torch
import transformers

import lightsft
from lightsft import Backbone, artifact, registry
from lightsft.errors import ConfigurationError, DataError
from lightsft.predict import Predictor
from lightsft.tasks import TASKS, task_class
from tests.checkpoints import chat_tokenizer
from tests.run_fixtures import command  # noqa: F401  a fixture
from tests.tasks.kinds_of_tokenizers import tokenizer_of

SIZES = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "initializer_range": 0.5,
}  # fmt: skip
TEXT = "Ana met Bob in New York, unbelievable"
CONTEXT = "Ana met Bob in New York and paid 3 euros for unbelievable pancakes"
TAGS = ("B-LOC", "B-PER", "I-LOC", "I-PER", "O")


def bert(kind, **options):
    torch.manual_seed(0)
    tokenizer = tokenizer_of("unigram")
    config = transformers.BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **SIZES, **options)
    return kind(config), tokenizer


def llama():
    torch.manual_seed(0)
    tokenizer = chat_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2, **SIZES
    )
    return transformers.LlamaForCausalLM(config), tokenizer


def t5():
    torch.manual_seed(0)
    tokenizer = tokenizer_of("unigram")
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "decoder_start_token_id": 0}
    config = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, **ids
    )
    return transformers.T5ForConditionalGeneration(config), tokenizer


def vit():
    torch.manual_seed(0)
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_labels=2, **SIZES)
    return transformers.ViTForImageClassification(config), transformers.ViTImageProcessor(
        size={"height": 8, "width": 8}
    )


def wav2vec():
    torch.manual_seed(0)
    layers = {"conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2}
    config = transformers.Wav2Vec2Config(
        **SIZES, **layers, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, num_labels=2
    )
    return transformers.Wav2Vec2ForSequenceClassification(config), transformers.Wav2Vec2FeatureExtractor()


def names(labels):
    return {"id2label": dict(enumerate(labels)), "label2id": {label: n for n, label in enumerate(labels)}}


def made(name):
    """(model, tokenizer, settings of the task) of every task; the ones of its checkpoint follow from the model."""
    sequence = transformers.BertForSequenceClassification
    both = {"labels": ("a", "b")}
    return {
        "classification": lambda: (*bert(sequence, **names("ab")), both),
        "multi-label": lambda: (
            *bert(sequence, problem_type="multi_label_classification", **names("ab")), {**both, "threshold": 0.3},
        ),
        "regression": lambda: (*bert(sequence, problem_type="regression", num_labels=1), {}),
        "token-classification": lambda: (
            *bert(transformers.BertForTokenClassification, **names(TAGS)), {"labels": TAGS},
        ),
        "question-answering": lambda: (*bert(transformers.BertForQuestionAnswering), {"unanswerable": True}),
        "multiple-choice": lambda: (*bert(transformers.BertForMultipleChoice), {}),
        "chat": lambda: (*llama(), {}),
        "language-modeling": lambda: (*llama(), {}),
        "seq2seq": lambda: (*t5(), {"num_beams": 2}),
        "masked-lm": lambda: (*bert(transformers.BertForMaskedLM), {}),
        "embedding": lambda: (*bert(transformers.BertModel), {"text": "text", "label": "x", "loss_function": "labels"}),
        "image-classification": lambda: (*vit(), both),
        "audio-classification": lambda: (*wav2vec(), both),
    }[name]()  # fmt: skip


def predictor(name, **options):
    model, tokenizer, settings = made(name)
    limit = {"max_length": 64} if "max_length" in lightsft.tasks.options_of(task_class(name)) else {}
    described = lightsft.task(name, **{**limit, **settings, **options}).describe()
    return Predictor.of(Backbone(model.eval(), tokenizer=tokenizer, task=name), described)


@pytest.fixture
def files(tmp_path):
    """Two images and two recordings, by their path."""
    from PIL import Image

    soundfile, chance = pytest.importorskip("soundfile"), np.random.default_rng(0)
    for number in range(2):
        Image.fromarray(chance.integers(0, 255, (9, 9, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
        soundfile.write(tmp_path / f"{number}.wav", chance.normal(size=4000 + 900 * number) / 9, 16000)
    return tmp_path


def rows_of(name, files):
    """Three rows to predict, of different lengths."""
    texts = [TEXT, "who met Bob ?", "pancakes"]
    asked = [{"question": f"{text} ?", "context": CONTEXT} for text in texts]
    return {
        "question-answering": [*asked[1:], {"question": "who", "context": CONTEXT * 3}],
        "multiple-choice": [{"question": text, "choices": ["Ana", "New York", "euros"][: 2 + n % 2]}
                            for n, text in enumerate(texts)],
        "masked-lm": [f"{text} <mask>" for text in texts] + ["<mask> met <mask>"],
        "image-classification": [str(files / f"{n}.png") for n in (0, 1, 0)],
        "audio-classification": [str(files / f"{n}.wav") for n in (0, 1, 0)],
    }.get(name, texts)  # fmt: skip


KEYS = {
    "classification": {"text", "label", "probabilities"},
    "multi-label": {"text", "labels", "probabilities"},
    "regression": {"text", "value"},
    "token-classification": {"text", "words", "tags", "scores", "entities"},
    "question-answering": {"question", "context", "answer", "start", "end", "score", "no_answer_margin"},
    "multiple-choice": {"question", "choices", "choice", "index", "probabilities"},
    "chat": {"prompt", "answer"},
    "language-modeling": {"text", "generated"},
    "seq2seq": {"text", "generated"},
    "masked-lm": {"text", "masks"},
    "embedding": {"text", "embedding"},
    "image-classification": {"text", "label", "probabilities"},
    "audio-classification": {"text", "label", "probabilities"},
}


def test_every_task_is_here():
    assert tuple(KEYS) == TASKS


@pytest.mark.parametrize("name", TASKS)
def test_a_prediction_is_plain_and_does_not_depend_on_its_company(name, files):
    asked, rows = predictor(name), rows_of(name, files)
    together = asked.predict(rows, max_new_tokens=6)
    assert [set(found) for found in together] == [KEYS[name]] * len(rows)
    for row, found in zip(rows, together, strict=True):
        close(asked.predict([row], max_new_tokens=6)[0], found)
    turned = asked.predict(rows[::-1], batch_size=2, max_new_tokens=6)[::-1]
    for one, other in zip(turned, together, strict=True):
        close(one, other)
    assert json.loads(json.dumps(together)) == together


def close(one, other):
    """Equal, with numbers to 1e-4."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            close(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            close(*pair)
    else:
        assert one == (pytest.approx(other, abs=1e-4) if isinstance(one, float) else other)


@pytest.mark.parametrize("name", sorted(set(TASKS) - {"language-modeling"}))
def test_a_checkpoint_says_the_same_from_its_configuration_alone(name, files, tmp_path):
    plain = {
        "multi-label": {"threshold": 0.5},
        "question-answering": {"unanswerable": False},
        "seq2seq": {"num_beams": 1},
    }
    asked = predictor(name, **plain.get(name, {}))
    folder = tmp_path / "checkpoint"
    asked.backbone.model.save_pretrained(folder)
    asked.backbone.tokenizer.save_pretrained(folder)
    found = Predictor(folder, device="cpu")
    assert found.task == name
    rows = rows_of(name, files)
    if name.endswith("-classification") and name.partition("-")[0] in ("image", "audio"):
        labels = [{"label": one["label"]} for one in found.predict(rows)]
        assert {one["label"] for one in labels} <= {"LABEL_0", "LABEL_1"}
        return
    for one, other in zip(found.predict(rows, max_new_tokens=6), asked.predict(rows, max_new_tokens=6), strict=True):
        close(one, other)


@pytest.mark.parametrize("name", ["token-classification", "question-answering", "multi-label", "regression", "seq2seq"])
def test_an_adapter_folder_says_what_it_was_saved_with(name, files, tmp_path):
    asked = predictor(name)
    base, folder = tmp_path / "base", tmp_path / "adapter"
    model = asked.backbone.model
    (getattr(model, "bert", model)).save_pretrained(base)  # without the head, which is the adapter's
    asked.backbone.tokenizer.save_pretrained(base)
    injection = registry.strategy("lora", rank=2).inject(asked.backbone)
    for tensor in injection.parameters():
        torch.nn.init.normal_(tensor, std=0.3)
    artifact.save(injection, folder, task=asked.settings)
    found = Predictor(folder, base=str(base), device="cpu")
    assert found.chosen == asked.chosen
    rows = rows_of(name, files)
    for one, other in zip(found.predict(rows, max_new_tokens=6), asked.predict(rows, max_new_tokens=6), strict=True):
        close(one, other)


# ---- what is said


def test_a_label_is_the_likeliest_as_classify_has_it():
    asked = predictor("classification")
    assert asked.predict([TEXT]) == asked.classify([TEXT])
    assert sum(asked.predict([TEXT])[0]["probabilities"].values()) == pytest.approx(1)


@pytest.mark.parametrize("threshold", [0.01, 0.5, 0.99])
def test_labels_are_those_above_the_threshold(threshold):
    (found,) = predictor("multi-label", threshold=threshold).predict([TEXT])
    assert found["labels"] == [label for label, p in found["probabilities"].items() if p >= threshold]


def test_a_value_is_the_model_s_output():
    asked = predictor("regression")
    with torch.no_grad():
        logits = asked.backbone.model(**asked.backbone.tokenizer(TEXT, return_tensors="pt")).logits
    assert asked.predict([TEXT])[0]["value"] == pytest.approx(logits.item(), abs=1e-5)


@pytest.mark.parametrize("max_length", [64, 6])
def test_words_have_their_characters_and_entities_are_spelled_by_tags(max_length):
    asked = predictor("token-classification", max_length=max_length)
    torch.nn.init.normal_(asked.backbone.model.classifier.weight, std=3.0)  # tags of all kinds
    (found,) = asked.predict([TEXT])
    assert found["words"] == ["Ana", "met", "Bob", "in", "New", "York", ",", "unbelievable"]
    assert all(0 < score <= 1 for score in found["scores"])
    for entity in found["entities"]:
        assert TEXT[entity["start"] : entity["end"]] == entity["text"]
        assert entity["type"] in ("LOC", "PER")
    inside = sum(tag != "O" for tag in found["tags"])
    assert sum(len(entity["text"].replace(",", " ,").split()) for entity in found["entities"]) == inside > 0
    (listed,) = asked.predict([{"tokens": found["words"]}])
    assert (listed["tags"], listed["words"]) == (found["tags"], found["words"])


def test_an_answer_is_where_it_says_and_silence_has_no_place():
    rows = [{"question": "who ?", "context": " " + CONTEXT * 4}]
    options = {"max_length": 32, "stride": 8}
    (given,) = predictor("question-answering", null_threshold=1e9, **options).predict(rows)
    assert rows[0]["context"][given["start"] : given["end"]] == given["answer"] != ""
    assert 0 < given["score"] <= 1
    (silent,) = predictor("question-answering", null_threshold=-1e9, **options).predict(rows)
    assert (silent["answer"], silent["start"], silent["end"]) == ("", None, None)
    assert silent["no_answer_margin"] == given["no_answer_margin"]


def test_a_choice_has_its_text_and_a_probability_for_each():
    row = {"question": "who ?", "choices": ["Ana", "Bob"]}
    three = {"question": "where ?", "choices": ["Ana", "Bob", "New York"]}
    for found in predictor("multiple-choice").predict([row, three]):
        assert found["choice"] == found["choices"][found["index"]]
        assert sum(found["probabilities"]) == pytest.approx(1)
        assert len(found["probabilities"]) == len(found["choices"])
        assert max(found["probabilities"]) == found["probabilities"][found["index"]]


def test_texts_are_continued_as_generate_does_alone():
    asked = predictor("language-modeling")
    model, tokenizer = asked.backbone.model, asked.backbone.tokenizer
    for prompt in ("a", "a longer beginning"):
        inputs = tokenizer(prompt, return_tensors="pt")
        written = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        (found,) = asked.predict([prompt], max_new_tokens=5)
        assert found["generated"] == tokenizer.decode(written, skip_special_tokens=True).strip()


def test_questions_are_answered_as_answer_does():
    asked = predictor("chat")
    prompts = ["hello", "what is a longer question ?"]
    assert asked.predict(prompts, max_new_tokens=5) == asked.answer(prompts, max_new_tokens=5)
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "not read"}]
    (found,) = asked.predict([{"messages": turns}], max_new_tokens=5)
    assert found["answer"] == asked.answer(["hello"], max_new_tokens=5)[0]["answer"]
    with pytest.raises(DataError, match="row 1"):
        asked.predict([{"text": "hello"}])


def test_masks_are_filled_with_the_likeliest_tokens():
    (found,) = predictor("masked-lm").predict(["<mask> met <mask>"])
    assert len(found["masks"]) == 2
    for mask in found["masks"]:
        assert [one["probability"] for one in mask] == sorted((one["probability"] for one in mask), reverse=True)
    with pytest.raises(DataError, match="row 2 has no mask"):
        predictor("masked-lm").predict(["a <mask>", "a"])


def test_vectors_have_length_one_and_pairs_a_similarity():
    (found,) = predictor("embedding").predict([TEXT])
    assert np.linalg.norm(found["embedding"]) == pytest.approx(1, abs=1e-5)
    options = {"anchor": "q", "positive": "d", "text": None, "label": None, "loss_function": "infonce"}
    (pair,) = predictor("embedding", **options).predict([{"q": TEXT, "d": "who met Bob ?"}])
    assert pair["similarity"] == pytest.approx(np.dot(*pair["embeddings"].values()), abs=1e-5)
    assert predictor("embedding", **options).predict([TEXT])[0]["embedding"] == pytest.approx(found["embedding"])


# ---- rows that lack something, and the command


def test_a_text_alone_is_refused_where_more_is_read():
    for name, columns in (
        ("question-answering", "'question', 'context'"),
        ("multiple-choice", "'question', 'choices'"),
    ):
        with pytest.raises(ConfigurationError, match=f"reads 2 columns: {columns}"):
            predictor(name).predict([TEXT])


def test_a_row_that_lacks_a_column_is_refused_by_its_number():
    with pytest.raises(DataError, match="row 2 has nothing in 'context'; its columns are 'question'"):
        predictor("question-answering").predict([{"question": "a", "context": "b"}, {"question": "a"}])
    with pytest.raises(DataError, match="row 1 has nothing in 'text'"):
        predictor("classification").predict([" "])


@pytest.mark.parametrize("name", ["token-classification", "question-answering", "masked-lm", "embedding", "seq2seq"])
def test_the_command_prints_one_line_per_row(name, files, tmp_path, command):  # noqa: F811
    asked = predictor(name)
    folder = tmp_path / "checkpoint"
    asked.backbone.model.save_pretrained(folder)
    asked.backbone.tokenizer.save_pretrained(folder)
    rows = rows_of(name, files)
    if isinstance(rows[0], dict):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        ended = command("predict", folder, "--file", file, "--json")
        assert command("predict", folder, "a text").says("reads 2 columns", "--file FILE")
    else:
        ended = command("predict", folder, *rows, "--json")
        plain = command("predict", folder, *rows)
        assert len(plain.out.splitlines()) == len(rows)
    assert ended.code == 0, ended.error
    assert len([json.loads(line) for line in ended.out.splitlines()]) == len(rows)
