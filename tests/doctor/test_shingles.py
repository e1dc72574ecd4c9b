"""The array arithmetic against sets of word triples."""

import itertools
import random

import numpy as np
import pytest

from lightsft.doctor.near import BANDS, ROWS
from lightsft.doctor.shingle_store import ShingleStore
from lightsft.doctor.shingles import band_hashes, jaccards, shingle_sets, words_of
from tests.doctor.reviews import clean_rows


def triples(words):
    return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}


def reference(one, other):
    return len(triples(one) & triples(other)) / len(triples(one) | triples(other))


@pytest.fixture(scope="module")
def documents():
    """Some texts, and each again with a few words replaced."""
    chance = random.Random(0)
    documents = []
    for row in clean_rows(60, seed=3):
        words = words_of(row["text"], row["text"].encode())
        documents.append(words)
        changed = list(words)
        for _ in range(chance.randint(0, 3)):
            changed[chance.randrange(len(words))] = b"else"
        documents.append(changed)
    return documents


@pytest.fixture(scope="module")
def sets(documents):
    return shingle_sets([b" ".join(words) for words in documents])


def test_a_text_has_as_many_shingles_as_it_has_distinct_triples(documents, sets):
    values, offsets = sets
    assert np.diff(offsets).tolist() == [len(triples(words)) for words in documents]
    for start, end in itertools.pairwise(offsets):
        assert (np.diff(values[start:end].astype(np.int64)) > 0).all()


def test_equal_triples_have_equal_hashes_wherever_they_stand(sets, documents):
    alone, _ = shingle_sets([b" ".join(documents[7])])
    values, offsets = sets
    assert alone.tolist() == values[offsets[7] : offsets[8]].tolist()


def test_jaccards_are_those_of_the_sets_of_triples(documents, sets):
    pairs = list(itertools.combinations(range(len(documents)), 2))
    one, other = (np.array(side) for side in zip(*pairs, strict=True))
    expected = [reference(documents[i], documents[j]) for i, j in pairs]
    np.testing.assert_allclose(jaccards(*sets, one, other), expected, atol=1e-12)


def test_band_hashes_meet_as_often_as_the_formula_says(documents, sets):
    bands = np.stack([band_hashes(*sets, band, 1) for band in range(400)])
    for i in range(0, 24, 2):
        share = (bands[:, i] == bands[:, i + 1]).mean()
        assert share == pytest.approx(reference(documents[i], documents[i + 1]), abs=0.09)  # over 3.5 sigma


def test_texts_with_a_jaccard_of_08_meet_in_some_band(documents, sets):
    bands = np.stack([band_hashes(*sets, band, ROWS) for band in range(BANDS)])
    near = [
        (i, j)
        for i, j in itertools.combinations(range(len(documents)), 2)
        if reference(documents[i], documents[j]) >= 0.8
    ]
    assert len(near) > 15
    assert all((bands[:, i] == bands[:, j]).any() for i, j in near)


def test_words_are_those_between_punctuation_without_case():
    assert words_of("It's “FINE”, été—oui!", "It's “FINE”, été—oui!".encode()) == [
        b"it", b"s", b"fine", "été".encode(), b"oui",
    ]  # fmt: skip
    assert words_of("आप कैसे हैं?", "आप कैसे हैं?".encode()) == [w.encode() for w in ("आप", "कैसे", "हैं")]
    assert words_of("我们去 Café", "我们去 Café".encode()) == [w.encode() for w in ("我", "们", "去", "café")]


def test_a_full_store_keeps_half_and_near_duplicates_together():
    chance = random.Random(1)
    texts = []
    for _ in range(2000):
        words = [f"w{chance.randrange(5000)}" for _ in range(40)]
        texts += [" ".join(words).encode(), " ".join([*words[:-1], "x"]).encode()]  # Jaccard 37/39
    store = ShingleStore(most_texts=1000)
    for start in range(0, len(texts), 100):
        store.add(list(range(start, start + 100)), texts[start : start + 100])
    assert store.one_in in (4, 8)
    assert store.texts <= 1000
    rows, values, offsets = store.taken()
    assert (np.diff(rows) > 0).all()
    assert len(offsets) == len(rows) + 1
    assert offsets[-1] == len(values)
    expected, expected_offsets = shingle_sets([texts[row] for row in rows])
    assert values.tolist() == expected.tolist()
    assert offsets.tolist() == expected_offsets.tolist()
    pairs = sum(1 for row in rows if row % 2 == 0 and row + 1 in set(rows.tolist()))
    assert pairs > 0.85 * len(rows) / 2  # chosen apart, it would be one in one_in


def test_a_store_without_room_for_shingles_keeps_fewer_texts():
    store = ShingleStore(most_shingles=500)
    for start, row in enumerate(clean_rows(100)):
        store.add([start], [b" ".join(words_of(row["text"], row["text"].encode()))])
    assert 0 < store.shingles <= 500
    assert store.one_in > 1


def test_texts_that_begin_alike_do_not_all_go_at_once():
    prompt = " ".join(f"p{place}" for place in range(300))
    store = ShingleStore(most_texts=500)
    for start in range(0, 2000, 100):
        texts = [f"{prompt} own{number} words{number}".encode() for number in range(start, start + 100)]
        store.add(list(range(start, start + 100)), texts)
    assert 200 <= store.texts <= 500
    assert "begin alike" in store.chosen_by
