"""SQuAD's nested articles, paragraphs and questions (v1.1 and v2) as one row per question."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lightsft.data.parts import Numbered
from lightsft.data.problems import Problem

EXPECTED = 'a "question", and "answers": a list of {"text", "answer_start"}'


def is_squad(articles: list[Any]) -> bool:
    """Whether these are articles with paragraphs."""
    return bool(articles) and isinstance(articles[0], Mapping) and "paragraphs" in articles[0]


def questions(articles: list[Any], position: int = 0) -> Iterator[Numbered]:
    """{"id", "title", "context", "question", "answers": {"text": [...], "answer_start": [...]}, "is_impossible"}.

    The columns are those of the flat data set. A question that lacks something is a problem with its number.
    """
    for number, (title, paragraph, asked) in enumerate(_walk(articles), 1):
        try:
            yield Numbered(number, _row(title, paragraph, asked), position=position)
        except (KeyError, TypeError, AttributeError) as error:
            lacks = f"lacks {error}" if isinstance(error, KeyError) else "is not laid out like a question"
            problem = Problem("not_squad", f"{lacks} in the article {str(title)[:60]!r}", EXPECTED)
            yield Numbered(number, None, problem, position=position)


def _walk(articles: list[Any]) -> Iterator[tuple[str, Any, Any]]:
    """Every question with its paragraph; None where an article or paragraph holds no list of them."""
    for article in articles:
        title = article.get("title", "") if isinstance(article, Mapping) else ""
        for paragraph in _list(article, "paragraphs"):
            for asked in _list(paragraph, "qas"):
                yield title, paragraph, asked


def _list(holder: Any, name: str) -> list[Any]:
    inner = holder.get(name) if isinstance(holder, Mapping) else None
    return inner if isinstance(inner, list) else [None]


def _row(title: str, paragraph: Any, asked: Any) -> dict[str, Any]:
    answers = asked.get("answers") or []
    return {
        "id": str(asked["id"]),
        "title": title,
        "context": paragraph["context"],
        "question": asked["question"],
        "answers": {
            "text": [answer["text"] for answer in answers],
            "answer_start": [answer["answer_start"] for answer in answers],
        },
        "is_impossible": bool(asked.get("is_impossible", False)),
    }
