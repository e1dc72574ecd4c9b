"""What is damaged is told from what is merely unusual."""

import pytest

from lightsft.doctor.mojibake import mojibake
from tests.doctor.reviews import codes, examined, texts

SENTENCES = (
    "Der Bär läuft über die Straße.",
    "El niño comió piñas en España.",
    "Ça va très bien, merci à tous.",
    "Não é possível: a ação começou.",
    "“Quoted” — it’s 5 €",
    "Привет, как дела?",
    "Γειά σου Κόσμε, τι κάνεις;",
    "我们明天去北京看电影。",
    "שלום עולם, מה שלומך היום?",
    "Nice 😀🎉",
)
ENCODINGS = ("cp1252", "latin-1")


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("sentence", SENTENCES)
def test_misread_utf8_is_found(sentence, encoding):
    damaged = sentence.encode("utf-8").decode(encoding, errors="replace")
    assert mojibake(damaged), damaged


@pytest.mark.parametrize("sentence", SENTENCES)
def test_the_same_sentences_read_right_are_left_alone(sentence):
    assert mojibake(sentence) == ""


HARMLESS = (
    "\u00abA IRM\u00c3\u00bb DISSE \u201cAMANH\u00c3\u201d, MA\u00c7\u00c3\u2026 A IRM\u00c3\u00a0",
    "NÃO É UMA IRMÃ, «A IRMû DISSE, “AMANHÔ…",
    "SÃO PAULO, MAÇÃ, ÂNGELO, À TARDE",
    "Il cria : « LIBERTÉ\u00a0» — « É » — “À” — l’été… « été\u00a0»",
    "„Ä“ und „Ö“ und „Ü“ sind Umlaute; STRAẞE, GROß…",
    "Îles, Ïle, CAFÉ™, CAFÉ®, CAFÉ°, Ñ¿",
    "LÁŠKA, ÚŽASNÝ, ÝŠ, kôň, ďaleko, ŽIŤ",
    "Đây là một câu tiếng Việt: ÂM NHẠC, DÃ NGOẠI",
    "Ça coûte 20 € — voilà ! Où ça ? Là…",
    "½ cup, 20 °C, ±5 %, µm, ©2024, ®, §5, x² + y³",
    "¿Qué? ¡Olé! ¿Y él? «¿Él?»",
    "Çok güzel, İstanbul’da öğle; Ğ, Ş",
)


@pytest.mark.parametrize("text", HARMLESS)
def test_accents_that_were_meant_are_no_damage(text):
    assert mojibake(text) == ""


def test_it_says_what_the_characters_were():
    assert mojibake("un cafÃ© noir") == "Ã© for é"
    assert mojibake("donâ€™t") == "â€™ for ’"


UNUSUAL = (
    "Tabs\tand\nlines\r\nare white space, and so is\u00a0this.",
    "A family 👨\u200d👩\u200d👧, a flag 🇪🇺, a heart ❤\ufe0f",
    "می\u200cخواهم فارسی بنویسم",
    "if a < b and c > d: x &= y; R&D; AT&T; a<c>b",
    "<not-a-tag>, <3, <-, ->, List<String>, &c, &nosuch",
)


@pytest.mark.parametrize("text", UNUSUAL)
def test_unusual_characters_with_a_meaning_are_left_alone(text):
    assert codes(examined(texts(text))) == set()


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("null\x00byte", "control_character"),
        ("escape \x1b[31m", "control_character"),
        ("next \x85line is white space, \x9f is not", "control_character"),
        ("soft\u00adhyphen", "invisible_character"),
        ("<p>paragraph</p>", "html"),
        ('<a href="x">link</a>', "html"),
        ("line<br/>break", "html"),
        ("&#8217; &nbsp;", "html"),
        ("pair \ude00", "surrogate"),
    ],
)
def test_damage_is_found(text, code):
    assert codes(examined(texts(text))) == {code}
