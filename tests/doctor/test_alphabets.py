"""Scripts by name, and words of two."""

import pytest

from lightsft.doctor.alphabets import disguised_word, script_counts
from tests.doctor.reviews import clean_rows, codes, examined, found, texts


def test_letters_belong_to_their_script():
    assert script_counts("Hello, Мир 你好 こんにちは カタカナ ｱ Ｌ ½ ª µ 𝐱 ℃ 123!") == {
        "Latin": 6,
        "Cyrillic": 3,
        "CJK": 12,
    }
    assert script_counts("שלום नमस्ते 한국어") == {"Hebrew": 4, "Devanagari": 4, "Hangul": 3}


@pytest.mark.parametrize("word", ["pаypal", "Аpple", "mоsсow", "gοοgle", "МОCКВА", "Cопия"])
def test_a_word_in_disguise_is_found(word):
    assert disguised_word(f"see {word} here") == word


@pytest.mark.parametrize(
    "text", ["Δt = 5 μm, σx", "IT-отдел, SMSка, VIPу, iPhoneом", "USB и PDFы", "naïve Straße Łódź"]
)
def test_words_that_mix_on_purpose_are_left_alone(text):
    assert disguised_word(text) == ""


def test_several_scripts_in_like_shares_are_no_finding():
    russian = texts(*(f"Строка номер {n} о погоде в городе и о людях" for n in ("один", "два", "три")))
    assert "other_script" not in codes(examined([*clean_rows(3), *russian]))


def test_the_title_names_the_scripts():
    rows = [*clean_rows(60), *texts("Строка", "文字")]
    finding = found(examined(rows), "other_script")
    assert finding.title == "2 rows in another script than the Latin of the rest (3.2 %: 1 Cyrillic, 1 CJK)"
    assert finding.rows == {"train": (61, 62)}
