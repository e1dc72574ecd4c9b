"""What the doctor works with, in small: rows from a jsonl file, a task with labels, texts without a fault."""

import json
import random
from collections import namedtuple

from lightsft.data.problems import Problem
from lightsft.doctor import examine

Numbered = namedtuple("Numbered", "number row problem line position")

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


class ReviewTask:
    """Empty texts are its errors, and labels that it does not know where it was told the labels."""

    def __init__(self, labels=None):
        self.labels = labels

    def text_of(self, row):
        return str(row["text"])

    def classes(self, row):
        return (row["label"],) if row.get("label") is not None else ()

    def problems(self, row):
        if not str(row["text"]).strip():
            yield Problem("empty_text", "has an empty 'text'", "a text in every row", "fill it, or remove the row")
        if self.labels and row.get("label") not in self.labels:
            yield Problem("unknown_label", f"has the label {row.get('label')!r}")

    def token_problems(self, row, tokenizer):
        if row.get("target") == "cut":
            yield Problem("target_cut", "has a target that truncation removes", severity="warning")


def numbered(rows):
    """Rows as a reader numbers them."""
    return (Numbered(number, row, None, number, 100 * number) for number, row in enumerate(rows, 1))


def write(path, rows):
    """A jsonl file; a row that is a string already is written as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def stream(path):
    """A stand-in for the reader: a line that is not JSON is a problem of its row."""
    position = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            position += len(line)
            try:
                row, problem = json.loads(line), None
            except ValueError as error:
                row, problem = None, Problem("not_json", f"is not JSON: {error}", "one JSON object per line")
            yield Numbered(number, row, problem, number, position)


def examined(rows, **options):
    """The report on the rows of one split, or of several by name."""
    splits = rows if isinstance(rows, dict) else {"train": rows}
    return examine({name: numbered(part) for name, part in splits.items()}, ReviewTask(), **options)


def texts(*these):
    """Rows with these texts and no label."""
    return [{"text": text} for text in these]


def codes(report, *, least="note"):
    """The codes of the findings that are at least so severe."""
    counted = {"error": ("error",), "warning": ("error", "warning"), "note": ("error", "warning", "note")}[least]
    return {finding.code for finding in report.findings if finding.severity in counted}


def found(report, code):
    """The one finding with this code."""
    [finding] = [finding for finding in report.findings if finding.code == code]
    return finding
