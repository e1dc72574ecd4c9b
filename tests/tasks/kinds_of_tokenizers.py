"""A tiny tokenizer of each kind, trained on the spot: pieces of words, bytes, and pieces with their space."""

from functools import cache

import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = [
    "Ana met Bob in New York and paid 3 euros for unbelievable pancakes",
    "the größe of a Würstchen is unbelievable , said Bob",
    "who met Bob ? where did Ana pay ? what is unbelievable ?",
]
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]
KINDS = ("wordpiece", "bytes", "bytes, spaces trimmed", "unigram")


@cache
def tokenizer_of(kind):
    """A fast tokenizer that puts <s> and </s> around texts and </s> between two."""
    core, trainer = _MADE[kind]()
    core.train_from_iterator(TEXTS * 20, trainer)
    ends = [(token, core.token_to_id(token)) for token in ("<s>", "</s>")]
    template = processors.TemplateProcessing(single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=ends)
    trimmed = [processors.ByteLevel(trim_offsets=True)] if "trimmed" in kind else []
    core.post_processor = processors.Sequence([*trimmed, template])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        mask_token="<mask>",
        model_max_length=64,
    )


def _wordpiece():
    core = Tokenizer(models.WordPiece(unk_token="<unk>"))
    core.normalizer, core.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    return core, trainers.WordPieceTrainer(vocab_size=120, special_tokens=SPECIAL, show_progress=False)


def _bytes():
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": SPECIAL, "initial_alphabet": alphabet, "show_progress": False}
    return core, trainers.BpeTrainer(vocab_size=300, **options)


def _unigram():
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    options = {"special_tokens": SPECIAL, "unk_token": "<unk>", "show_progress": False}
    return core, trainers.UnigramTrainer(vocab_size=90, **options)


_MADE = {"wordpiece": _wordpiece, "bytes": _bytes, "bytes, spaces trimmed": _bytes, "unigram": _unigram}
