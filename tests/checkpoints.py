"""Checkpoint folders and labelled rows that a run takes seconds on: what `tiny_models` is to a single model.

A two-layer BERT without a task head and a two-layer Llama, each saved with a fast tokenizer of its own, and texts in
which one word decides the label.
"""

import csv
import json
import random
from functools import cache

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

GOOD, BAD = ("good", "great", "lovely"), ("bad", "awful", "dreadful")
FILLER = [
    "the",
    "a",
    "this",
    "that",
    "film",
    "book",
    "meal",
    "room",
    "day",
    "was",
    "is",
    "seems",
    "looked",
    "felt",
    "really",
    "quite",
    "rather",
    "very",
    "so",
    "and",
    "but",
    "here",
    "there",
    "again",
    "today",
    "we",
    "they",
    "found",
    "said",
    "thought",
    "with",
    "of",
    "from",
]
LABELS = ("neg", "pos")
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CHAT_SPECIAL = ("<pad>", "<bos>", "<end>", "<|system|>", "<|user|>", "<|assistant|>")
_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


def labelled_rows(number=300, seed=0):
    """Rows {"text", "label"}: filler words, and one word that is good or bad."""
    chance, rows = random.Random(seed), []
    for index in range(number):
        label = LABELS[index % 2]
        words = chance.choices(FILLER, k=chance.randint(3, 12))
        words.insert(chance.randrange(len(words) + 1), chance.choice(GOOD if label == "pos" else BAD))
        rows.append({"text": " ".join(words), "label": label})
    return rows


def chat_rows(number=80, seed=0):
    """Rows {"prompt", "completion"}: the answer repeats the last word of the question."""
    chance = random.Random(seed)
    questions = [chance.choices(FILLER, k=chance.randint(2, 6)) for _ in range(number)]
    return [{"prompt": " ".join(words), "completion": f"we said {words[-1]}"} for words in questions]


def write_csv(path, rows, separator=","):
    """The rows as a file of separated fields with a header."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_jsonl(path, rows):
    """The rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@cache
def wordpiece_tokenizer():
    """A fast BERT tokenizer whose vocabulary is the words of `labelled_rows`."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *FILLER]
    return transformers.BertTokenizerFast(vocab={word: index for index, word in enumerate(words)}, model_max_length=64)


@cache
def chat_tokenizer():
    """A fast byte-level BPE tokenizer without merges (a token per byte), with marks of its own and a chat template."""
    symbols = [*CHAT_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<end>",
        extra_special_tokens=list(CHAT_SPECIAL[3:]),
        chat_template=TEMPLATE,
        model_max_length=128,
    )


def save_bert(folder, *, dtype=torch.float32, seed=0, **options):
    """A base BERT without a task head, and its tokenizer. It has read a few texts: good and bad differ in it."""
    torch.manual_seed(seed)
    tokenizer = wordpiece_tokenizer()
    config = transformers.BertConfig(**{**_SIZES, "vocab_size": len(tokenizer), "pad_token_id": 0, **options})
    model = transformers.BertForSequenceClassification(config)
    _pretrain(model, tokenizer)
    return _save(model.bert, tokenizer, folder, dtype)


def _pretrain(model, tokenizer, steps=60):
    rows = labelled_rows(32 * steps, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        part = rows[32 * step : 32 * (step + 1)]
        batch = tokenizer([row["text"] for row in part], padding=True, return_tensors="pt")
        optimizer.zero_grad()
        model(**batch, labels=torch.tensor([LABELS.index(row["label"]) for row in part])).loss.backward()
        optimizer.step()


def save_llama(folder, *, dtype=torch.float32, seed=0, **options):
    """A causal Llama, and its tokenizer with a chat template."""
    torch.manual_seed(seed)
    tokenizer = chat_tokenizer()
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_key_value_heads": 2}
    sizes = {**_SIZES, "vocab_size": len(tokenizer), "max_position_embeddings": 128}
    config = transformers.LlamaConfig(**{**sizes, **ids, **options})
    return _save(transformers.LlamaForCausalLM(config), tokenizer, folder, dtype)


def _save(model, tokenizer, folder, dtype):
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
