"""Texts without a fault, and reports on rows like them."""

import json
import random

from lightsft.data.parts import Numbered
from lightsft.doctor import examine
from lightsft.tasks import task

WORDS = {
    "s": "actor camera director ending script soundtrack story editor dialogue villain heroine pacing",
    "v": "carries weakens lifts ruins saves explains hides repeats drowns deepens shortens colours",
    "o": "scene mystery romance journey finale opening argument silence chase dinner trial wedding",
    "a": "quiet clumsy brilliant tired honest hollow gentle noisy patient awkward daring familiar",
    "p": "Lisbon Oslo Naples Boston Vienna Cairo Dublin Quito Perth Lyon Bergen Malmö",
    "t": "yesterday tonight twice slowly again early often finally suddenly barely nearly once",
}
CHOICES = {kind: words.split() for kind, words in WORDS.items()}
PARTS = (
    "The {a} {s} {t} {v} the {o}.",
    "In {p}, a {a} {o} {v} our {s}!",
    "Why does the {s} sound so {a} {t}?",
    "I saw it {t} in {p}: {a}, {a}, and never {a}.",
    "Nobody in the {o} believed the {s}; that {v} everything {t}.",
    '"{p} at night" is {a} where the {o} is {a}.',
    "It's the {s}, not the {o}, that {v} this {a} film.",
)


def sentence(chance):
    pieces = chance.choice(PARTS).split("{")
    return pieces[0] + "".join(chance.choice(CHOICES[piece[0]]) + piece[2:] for piece in pieces[1:])


def clean_rows(count, seed=0):
    """Reviews of two to four sentences; no two are alike. Labels alternate."""
    chance = random.Random(seed)
    texts = [" ".join(sentence(chance) for _ in range(chance.randint(2, 4))) for _ in range(count)]
    assert len(set(texts)) == count
    return [{"text": text, "label": ("neg", "pos")[index % 2]} for index, text in enumerate(texts)]


def clean_splits():
    """400 rows to train on, 100 to test on."""
    rows = clean_rows(500)
    return {"train": rows[:400], "test": rows[400:]}


def numbered(rows):
    """Rows as a reader numbers them."""
    return (Numbered(number, row, None, number, 100 * number) for number, row in enumerate(rows, 1))


def task_of(rows, **options):
    """Classification of labelled rows, regression of scored ones, else plain texts; nothing is too long for it."""
    if any("label" in row for row in rows):
        names = {row["label"] for row in rows if row.get("label") is not None} | {"neg", "pos"}
        return task("classification", **{"labels": sorted(names), "max_length": 10**9} | options)
    if any("score" in row for row in rows):
        return task("regression", **{"max_length": 10**9} | options)
    return task("masked-lm", **options)


def examined(rows, tokenizer=None, **options):
    """The report on the rows of one split, or of several by name; options are the task's."""
    splits = rows if isinstance(rows, dict) else {"train": rows}
    chosen = task_of([row for part in splits.values() for row in part], **options)
    return examine({name: numbered(part) for name, part in splits.items()}, chosen, tokenizer)


def texts(*these):
    """Rows with these texts and no label."""
    return [{"text": text, "score": 0} for text in these]


def write(path, rows):
    """A jsonl file; a row that is a string already is written as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def codes(report, *, least="note"):
    """The codes of the findings that are at least so severe."""
    counted = {"error": ("error",), "warning": ("error", "warning"), "note": ("error", "warning", "note")}[least]
    return {finding.code for finding in report.findings if finding.severity in counted}


def found(report, code):
    """The one finding with this code."""
    [finding] = [finding for finding in report.findings if finding.code == code]
    return finding
