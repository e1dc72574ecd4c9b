"""A tokenizer whose tokens are words, so that lengths can be counted by hand."""

import pytest

from tests.doctor.reviews import PARTS, WORDS
from tests.run_fixtures import *  # noqa: F403  fixtures for the tests of this folder


@pytest.fixture(scope="session")
def tokenizer():
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    frame = {word.strip("\"'.,;:!?").lower() for part in PARTS for word in part.split() if "{" not in word}
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<|im_end|>"]
    words = sorted({*" ".join(WORDS.values()).lower().split(), *frame, *"\"'.,;:!?", "s", "it", "word"} - {""})
    vocabulary = {word: place for place, word in enumerate([*special, *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        eos_token="<|im_end|>",
        model_max_length=512,
    )


@pytest.fixture(scope="session")
def tokenizer_folder(tokenizer, tmp_path_factory):
    """What --model needs of a model: the tokenizer and a config.json."""
    from transformers import BertConfig

    folder = tmp_path_factory.mktemp("tokenizer") / "model"
    tokenizer.save_pretrained(folder)
    BertConfig().save_pretrained(folder)
    return folder
