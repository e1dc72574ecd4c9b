"""Entities and their scores equal seqeval's, in both of its definitions."""

import itertools
import warnings

import numpy as np
import pytest
from seqeval import scheme as schemes
from seqeval.metrics.sequence_labeling import get_entities, precision_recall_fscore_support
from seqeval.metrics.v1 import precision_recall_fscore_support as strict_scores
from seqeval.scheme import Tokens

from lightsft.errors import DataError
from lightsft.metrics.entities import (
    SCHEMES,
    broken,
    counts,
    entity_per_type,
    entity_scores,
    find_entities,
    scheme_of,
    types_of,
)

REFERENCE = {"BIO": schemes.IOB2, "IOB1": schemes.IOB1, "BIOES": schemes.IOBES, "BILOU": schemes.BILOU}
AS_BIOES = str.maketrans({"L": "E", "U": "S", "M": "I"})


def tags_of(scheme, types=("X", "Y")):
    return ["O", *(f"{prefix}-{kind}" for prefix in SCHEMES[scheme] for kind in types)]


def every_sequence(scheme, longest):
    for length in range(1, longest + 1):
        yield from map(list, itertools.product(tags_of(scheme), repeat=length))


def sequences(scheme, number, seed):
    """Random sequences, most of which break their scheme somewhere."""
    chance = np.random.default_rng(seed)
    return [chance.choice(tags_of(scheme, "XYZ"), chance.integers(1, 15)).tolist() for _ in range(number)]


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_lenient_entities_are_seqeval_s(scheme):
    for tags in every_sequence(scheme, 3):
        translated = [tag[0].translate(AS_BIOES) + tag[1:] for tag in tags]
        expected = [(kind, start, end + 1) for kind, start, end in get_entities(translated)]
        assert find_entities(tags, scheme) == expected, tags


@pytest.mark.parametrize("scheme", list(REFERENCE))
def test_strict_entities_are_seqeval_s(scheme):
    for tags in every_sequence(scheme, 4 if scheme in ("BIO", "IOB1") else 3):
        if scheme == "IOB1" and any(a[0] == b[0] == "B" and a != b for a, b in itertools.pairwise(tags)):
            continue  # seqeval loses the entity before a B of another type, which IOB1 does not have
        expected = [(entity.tag, entity.start, entity.end) for entity in Tokens(tags, REFERENCE[scheme]).entities]
        assert find_entities(tags, scheme, strict=True) == expected, tags


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_both_definitions_agree_on_what_is_not_broken(scheme):
    whole = [tags for tags in every_sequence(scheme, 3) if not broken(tags, scheme)]
    assert len(whole) > 5
    for tags in whole:
        assert find_entities(tags, scheme) == find_entities(tags, scheme, strict=True), tags


def test_entities_by_hand():
    tags = ["B-PER", "I-PER", "O", "B-LOC", "B-LOC", "I-ORG"]
    assert find_entities(tags) == [("PER", 0, 2), ("LOC", 3, 4), ("LOC", 4, 5), ("ORG", 5, 6)]
    assert find_entities(tags, strict=True) == [("PER", 0, 2), ("LOC", 3, 4), ("LOC", 4, 5)]
    assert find_entities(["B-A", "I-A", "E-A", "S-B", "B-A", "I-A", "O"], "BIOES", strict=True) == [
        ("A", 0, 3),
        ("B", 3, 4),
    ]
    assert find_entities(["U-B", "B-A", "L-A"], "BILOU") == [("B", 0, 1), ("A", 1, 3)]
    assert find_entities(["I-A", "B-A", "I-A"], "IOB1") == [("A", 0, 1), ("A", 1, 3)]
    assert find_entities(["B-creative-work", "I-creative-work"]) == [("creative-work", 0, 2)]
    assert find_entities([]) == []


@pytest.mark.parametrize(
    ("tags", "scheme", "positions"),
    [
        ("O I-A I-A", "BIO", [1]),
        ("B-A I-B I-B", "BIO", [1]),
        ("B-A I-A O B-B", "BIO", []),
        ("PER O", "BIO", [0]),
        ("E-A O", "BIO", [0]),
        ("I-A I-A B-A", "IOB1", []),
        ("O B-A B-A I-B", "IOB1", [1]),
        ("B-A I-A O", "BIOES", [1]),
        ("B-A O", "BIOES", [0]),
        ("B-A S-A", "BIOES", [0]),
        ("S-A I-A E-A", "BIOES", [1]),
        ("E-A E-A", "BIOES", [0, 1]),
        ("B-A E-B", "BIOES", [0, 1]),
        ("B-A I-A E-A S-B", "BIOES", []),
        ("B-A U-A", "BILOU", [0]),
        ("I-A I-B", "IO", []),
        ("B-A", "IO", [0]),
    ],
)
def test_a_tag_that_continues_nothing_is_found(tags, scheme, positions):
    assert broken(tags.split(), scheme) == positions


def test_an_unknown_tag_or_scheme_is_named():
    with pytest.raises(DataError, match="the tag 'PER'"):
        find_entities(["O", "PER"])
    with pytest.raises(DataError, match="one of BIO, IOB1"):
        find_entities(["O"], "BOI")
    with pytest.raises(DataError, match="'LOC'"):
        counts(["B-LOC"], ["O"], ["PER"])


@pytest.mark.parametrize(
    ("tags", "scheme"),
    [
        (["B-A", "I-A", "O"], "BIO"),
        (["B-A", "B-B", "O"], "BIO"),
        (["I-A", "I-B", "O"], "IO"),
        (["B-A", "I-A", "E-A", "S-A", "O"], "BIOES"),
        (["S-A", "O"], "BIOES"),
        (["B-A", "I-A", "L-A", "U-A", "O"], "BILOU"),
        (["B", "M", "E", "S"], "BMES"),
        (["NN", "VB", "-LRB-"], "plain"),
        (["O", "PER", "LOC"], "plain"),
        (["O"], "plain"),
        ([], "plain"),
    ],
)
def test_the_scheme_is_seen_in_the_tags(tags, scheme):
    assert scheme_of([set(tags)] if scheme != "BIO" else [tags]) == scheme


def test_sequences_tell_iob1_from_bio():
    assert scheme_of([["I-A", "I-A", "B-A"], ["O"]]) == "IOB1"
    assert scheme_of([["B-A", "I-A"], ["O"]]) == "BIO"
    assert scheme_of([["B-A", "I-A"], ["I-A", "O"]]) == "BIO"  # broken as either


def test_types_are_what_follows_the_prefix():
    assert types_of(["O", "B-PER", "I-creative-work", "I"]) == ["PER", "_", "creative-work"]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("scheme", ["BIO", "BIOES"])
def test_scores_equal_seqeval_s(scheme, strict, seed):
    truth = sequences(scheme, 60, seed)
    chance = np.random.default_rng(seed)
    predicted = [
        [tag if chance.random() < 0.9 else str(chance.choice(tags_of(scheme))) for tag in row] for row in truth
    ]
    types = ["W", "X", "Y", "Z"]  # W never occurs
    outcomes = np.array([counts(t, p, types, scheme, strict) for t, p in zip(truth, predicted, strict=True)])
    scores, by_type = entity_scores(outcomes), entity_per_type(outcomes, types)
    mode = {"scheme": REFERENCE[scheme]} if strict else {}
    for average, prefix in (("micro", ""), ("macro", "macro_"), ("weighted", "weighted_")):
        wanted = reference_scores(truth, predicted, average, **mode)[:3]
        assert [scores[prefix + name] for name in ("precision", "recall", "f1")] == pytest.approx(wanted), average
    rows = zip(*reference_scores(truth, predicted, None, **mode), strict=True)
    for kind, row in zip("XYZ", rows, strict=True):
        assert list(by_type[kind].values()) == pytest.approx(list(row))
    assert entity_scores(outcomes.sum(axis=0)) == scores


def reference_scores(truth, predicted, average, scheme=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if scheme:
            return strict_scores(truth, predicted, average=average, scheme=scheme, zero_division=0)
        return precision_recall_fscore_support(truth, predicted, average=average, zero_division=0)


def test_a_sentence_is_counted_by_type():
    found = counts(["B-A", "I-A", "O", "B-B"], ["B-A", "I-A", "O", "B-A"], ["A", "B"])
    assert found.reshape(3, 2).tolist() == [[1, 0], [2, 0], [1, 1]]


def test_without_entities_every_score_is_zero():
    assert set(entity_scores(counts(["O"], ["O"], ["A"])[None]).values()) == {0.0}
