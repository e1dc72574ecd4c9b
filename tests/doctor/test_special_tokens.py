"""What is a special token depends on the tokenizer."""

import pytest

from lightsft.doctor.special_tokens import special_tokens
from tests.doctor.reviews import codes, examined, texts


def test_the_tokenizer_s_own_are_read_off_it(tokenizer):
    assert set(special_tokens(tokenizer)) == {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "<|im_end|>"}


@pytest.mark.parametrize(
    "text", ["[INST] hi [/INST]", "<<SYS>> be nice", "</s>", "word [MASK] word", "<|eot_id|>", "<pad>", "<｜User｜>"]
)
def test_what_looks_like_one_is_noted(text):
    assert codes(examined(texts(text))) == {"foreign_special_token"}


@pytest.mark.parametrize("text", ["word <|im_end|> word", "word [SEP] word [INST]"])
def test_what_the_tokenizer_takes_for_one_is_a_warning(text, tokenizer):
    assert "special_token" in codes(examined(texts(text), tokenizer=tokenizer), least="warning")


@pytest.mark.parametrize("text", ["a < b | c > d", "list[0], [sic], [1]", "<3 [hi] || <--|-->", "word [word] <word>"])
def test_brackets_alone_are_none(text, tokenizer):
    assert codes(examined(texts(text))) == set()


def test_a_form_of_its_own_is_found(tokenizer):
    import copy

    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"additional_special_tokens": ["@@END@@"]})
    assert "special_token" in codes(examined(texts("word @@END@@ word"), tokenizer=other))
    assert "special_token" not in codes(examined(texts("word @@END@@ word"), tokenizer=tokenizer))
