"""Ranks by cosine, and the scores of ranks."""

import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from lightsft.errors import DataError
from lightsft.metrics.retrieval import ranks, retrieval_scores


def by_sorting(queries, documents, relevant, excluded=None):
    """Ranks of the relevant documents of each query in one sorted list, the irrelevant first among equals."""
    found = []
    for number, (query, wanted) in enumerate(zip(queries, relevant, strict=True)):
        cosine = [query @ d / (np.linalg.norm(query) * np.linalg.norm(d)) for d in documents]
        order = [k for k in range(len(documents)) if excluded is None or k != excluded[number]]
        order.sort(key=lambda k: (-np.round(cosine[k], 9), k in wanted))
        found.append([place for place, k in enumerate(order, 1) if k in wanted])
    return found


@pytest.mark.parametrize("block", [1, 7, 40, 2**20])
@pytest.mark.parametrize("coarse", [False, True])
def test_ranks_are_places_in_the_sorted_list(coarse, block):
    chance = np.random.default_rng(0)
    draw = (lambda *shape: chance.integers(1, 3, shape)) if coarse else chance.normal
    queries, documents = (draw(8, 3), draw(30, 3)) if coarse else (draw(size=(8, 3)), draw(size=(30, 3)))
    relevant = [chance.choice(30, chance.integers(1, 5), replace=False).tolist() for _ in range(8)]
    found = ranks(queries, documents, relevant, block=block)
    expected = by_sorting(queries, documents, relevant)
    assert [row[row > 0].astype(int).tolist() for row in found] == expected


def test_one_relevant_document_may_be_given_by_its_index():
    chance = np.random.default_rng(1)
    queries, documents = chance.normal(size=(12, 5)), chance.normal(size=(12, 5))
    expected = by_sorting(queries, documents, [[k] for k in range(12)])
    assert ranks(queries, documents, np.arange(12)).astype(int).tolist() == expected
    assert ranks(queries.astype(np.float32), documents.astype(np.float32), range(12)).astype(int).tolist() == expected


def test_a_query_may_be_left_out_of_its_own_search():
    vectors = np.random.default_rng(2).normal(size=(10, 4))
    labels = np.arange(10) % 2
    relevant = [[k for k in range(10) if k != i and labels[k] == labels[i]] for i in range(10)]
    found = ranks(vectors, vectors, relevant, excluded=np.arange(10), block=25)
    assert found.astype(int).tolist() == by_sorting(vectors, vectors, relevant, np.arange(10))
    same_label = [np.flatnonzero(labels == label) for label in labels]  # with the query itself
    assert np.array_equal(ranks(vectors, vectors, same_label, excluded=np.arange(10)), found)
    assert ranks(vectors, vectors, relevant)[0, 0] == found[0, 0] + 1  # itself comes first otherwise


def test_equal_documents_come_first_even_where_products_differ_in_the_last_bit():
    chance = np.random.default_rng(3)
    document = chance.normal(size=384)
    documents = np.tile(document, (101, 1)) * chance.uniform(0.1, 10, (101, 1))
    queries = chance.normal(size=(5, 384))
    for block in (2, 33, 10_000):
        assert set(ranks(queries, documents, [50] * 5, block=block)[:, 0]) == {101.0}


def test_length_is_no_similarity():
    documents = np.array([[100.0, 100.0], [0.01, 0.0]])
    assert ranks(np.array([[1.0, 0.1]]), documents, [1]).tolist() == [[1]]


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_a_vector_without_a_direction_finds_nothing(value):
    chance = np.random.default_rng(4)
    queries, documents = chance.normal(size=(3, 4)), chance.normal(size=(9, 4))
    plain = ranks(queries, documents, [0, 1, 2])
    broken = queries.copy()
    broken[1] = value
    found = ranks(broken, documents, [0, 1, 2])
    assert found[:, 0].tolist() == [plain[0, 0], 9, plain[2, 0]]


def test_a_document_that_is_no_number_is_last():
    documents = np.eye(4)
    documents[2] = np.nan
    assert ranks(np.ones((1, 4)) - [0, 0, 0, 2], documents, [3])[0, 0] == 3  # behind two, before the broken one
    assert ranks(np.eye(4)[2:3], documents, [2])[0, 0] == 4


def test_scores_of_single_ranks_by_hand():
    found = retrieval_scores(np.array([[1], [2], [6], [11]]))
    assert found == pytest.approx(
        {
            "recall@1": 1 / 4,
            "recall@5": 2 / 4,
            "recall@10": 3 / 4,
            "mrr": (1 + 1 / 2 + 1 / 6 + 1 / 11) / 4,
            "ndcg@10": (1 + 1 / np.log2(3) + 1 / np.log2(7)) / 4,
        }
    )


@pytest.mark.parametrize("seed", range(4))
def test_discounted_gain_is_scikit_learn_s(seed):
    chance = np.random.default_rng(seed)
    queries, documents = chance.normal(size=(6, 3)), chance.normal(size=(40, 3))
    relevant = [chance.choice(40, chance.integers(1, 25), replace=False) for _ in range(6)]
    gains = np.array([np.isin(np.arange(40), row) for row in relevant]).astype(float)
    cosines = queries @ (documents / np.linalg.norm(documents, axis=1, keepdims=True)).T
    found = retrieval_scores(ranks(queries, documents, relevant))
    assert found["ndcg@10"] == pytest.approx(ndcg_score(gains, cosines, k=10))


def test_what_cannot_be_searched_is_named():
    vectors = np.eye(3)
    with pytest.raises(DataError, match="query 2 has no relevant"):
        ranks(vectors, vectors, [[0], [], [1]])
    with pytest.raises(DataError, match="from 0 to 2"):
        ranks(vectors, vectors, [0, 1, 3])
    assert set(retrieval_scores(np.zeros((0, 1))).values()) == {None}
