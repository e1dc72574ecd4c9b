"""Repeated texts: which rows, how many, and in which words it is said."""

import itertools
import random
import re

from lightsft.doctor import near
from lightsft.doctor.collect import seen
from lightsft.doctor.duplicates import Duplicates
from lightsft.doctor.shingle_store import ShingleStore
from tests.doctor.reviews import clean_rows, codes, examined, found, texts


def test_repeats_are_told_to_the_letter_and_apart_from_case():
    rows = [*clean_rows(10), *texts("Same here", "same HERE", "Same here", " same  here ", "Same here")]
    finding = found(examined(rows[10:]), "duplicate")
    assert finding.rows == {"train": (2, 3, 4, 5)}
    assert finding.title == "4 rows with the text of an earlier row (2 to the letter, 2 apart from case and spacing)"
    assert finding.sample == "rows 1 and 2 of train: Same here"


def test_duplicates_agree_with_a_count_by_hand():
    chance = random.Random(5)
    lines = [f"line {chance.randrange(300)} {chance.choice(['a', 'A', ' a'])}" for _ in range(1000)]
    known, expected, to_the_letter = set(), [], 0
    letters = set()
    for number, line in enumerate(lines, 1):
        key = " ".join(line.lower().split())
        if key in known:
            expected.append(number)
            to_the_letter += line in letters
        known.add(key)
        letters.add(line)
    finding = found(examined(texts(*lines)), "duplicate")
    assert finding.count == len(expected)
    assert finding.rows == {"train": tuple(expected[:20])}
    assert f"({to_the_letter} to the letter" in finding.title


def test_a_text_in_two_splits_is_leakage_and_not_a_repeat():
    rows = clean_rows(60)
    report = examined(
        {"train": rows[:40], "validation": rows[38:50], "test": [*rows[50:], rows[0], rows[45], rows[45]]}
    )
    leak = found(report, "leakage")
    assert leak.rows == {"validation": (1, 2), "test": (11, 12, 13)}
    assert leak.sample.startswith("row 39 of train and row 1 of validation: ")
    assert found(report, "duplicate").rows == {"test": (13,)}


def test_conflicting_labels_across_splits_are_said_beside_the_leak():
    rows = clean_rows(40)
    other = {**rows[0], "label": "pos"}
    report = examined({"train": rows[:20], "test": [*rows[20:], other]})
    assert found(report, "conflicting_labels").rows == {"train": (1,), "test": (21,)}
    assert found(report, "leakage").rows == {"test": (21,)}


def test_labels_in_another_order_do_not_conflict():
    collector = Duplicates()
    for number, classes in enumerate([("a", "b"), ("b", "a"), ("a", "b")], 1):
        collector.see(seen("train", number, "the same text", classes))
    assert {finding.code for finding in collector.findings()} == {"duplicate"}


def test_near_duplicates_agree_with_comparing_all_pairs():
    chance = random.Random(2)
    lines = []
    for row in clean_rows(150, seed=4):
        words = row["text"].split()
        lines.append(row["text"])
        for _ in range(chance.randint(0, 2)):
            changed = list(words)
            changed[chance.randrange(len(words))] = "else"
            lines.append(" ".join(changed))
    lines = list(dict.fromkeys(lines))
    chance.shuffle(lines)
    bags = [[w.strip("\"'.,;:!?").lower() for w in line.replace("It's", "it s").split()] for line in lines]
    sets = [set(itertools.pairwise(itertools.pairwise(bag))) for bag in bags]
    near_pairs = [
        (i, j)
        for i, j in itertools.combinations(range(len(lines)), 2)
        if len(sets[i] & sets[j]) >= 0.8 * len(sets[i] | sets[j])
    ]
    finding = found(examined(texts(*lines)), "near_duplicate")
    assert finding.count == len({j for _, j in near_pairs}) > 30


def test_short_texts_are_not_nearly_the_same():
    assert codes(examined(texts("yes it is", "yes it was", "no it is", "is it, yes"))) == set()


def test_with_room_for_few_texts_the_finding_says_how_many_were_compared():
    collector = Duplicates(ShingleStore(most_texts=100))
    for number, row in enumerate(clean_rows(600), 1):
        for place, text in enumerate((row["text"] + " And so on.", row["text"] + " And so on, yes.")):
            collector.see(seen("train", 2 * number + place, text))
    [finding] = collector.findings()
    assert finding.code == "near_duplicate"
    assert 0 < finding.count < 60
    share = re.search(r"1 in \d+ texts", finding.title).group()
    assert share in " ".join(collector.not_checked())


def test_comparisons_are_bounded(monkeypatch):
    monkeypatch.setattr(near, "MOST_COMPARISONS", 5)
    rows = clean_rows(50)
    finding = found(examined([*rows, *({**row, "text": row["text"] + " Really."} for row in rows)]), "near_duplicate")
    assert 0 < finding.count <= 5
