"""Rows in another language; said where it cannot be looked for."""

import sys

import pytest

from lightsft.doctor import languages
from tests.doctor.reviews import codes, examined, found, texts

ENGLISH = [
    f"The {what} was repaired last week, but nobody has told the owners what it is going to cost them."
    for what in ["roof", "bridge", "engine", "window", "garden", "kitchen", "chimney", "staircase", "boiler", "fence"]
]
GERMAN = "Die Heizung wurde letzte Woche repariert, aber niemand hat den Besitzern gesagt, was es kosten wird."


def test_a_row_in_another_language_is_noted():
    pytest.importorskip("py3langid")
    report = examined(texts(*ENGLISH, *(line.upper() for line in ENGLISH), GERMAN))
    finding = found(report, "other_language")
    assert finding.severity == "note"
    assert finding.rows == {"train": (21,)}
    assert "'en' of the rest: 1 de" in finding.title
    assert report.figures["sampled_texts_by_language"] == {"en": 20, "de": 1}


def test_several_languages_in_like_shares_are_no_finding():
    assert "other_language" not in codes(examined(texts(*ENGLISH[:2], GERMAN)))


def test_a_sample_is_bounded_and_said(monkeypatch):
    pytest.importorskip("py3langid")
    monkeypatch.setattr(languages, "SAMPLE", 4)
    report = examined(texts(*ENGLISH))
    assert sum(report.figures["sampled_texts_by_language"].values()) == 4
    assert "languages: of 10 texts of 60 characters or more, 4 were looked at" in report.not_checked


def test_without_py3langid_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(languages, "find_spec", lambda name: None)
    report = examined(texts(*ENGLISH))
    assert "languages: py3langid is not installed (pip install py3langid)" in report.not_checked
    assert "py3langid" not in sys.modules or report.figures.get("sampled_texts_by_language") is None
