"""Embeddings: four losses by hand and by sentence-transformers, ranks by brute force, vectors of every pooling."""

import warnings

import numpy as np
import pytest
import torch
import transformers
from torch.nn.functional import normalize

import lightsft
from lightsft.errors import ConfigurationError, DataError
from lightsft.tasks.embedding import Embedding
from lightsft.tasks.similarity import groups
from tests.checkpoints import FILLER, wordpiece_tokenizer
from tests.tiny_models import tiny

PAIRS = lightsft.task("embedding", anchor="q", positive="a")
TRIPLETS = lightsft.task("embedding", anchor="q", positive="a", negative="n", loss_function="triplet", margin=0.3)
HARD = lightsft.task("embedding", anchor="q", positive="a", negative="n")
NUMBERS = lightsft.task("embedding", anchor="q", positive="a", similarity="s", loss_function="cosine")
LABELLED = lightsft.task("embedding", text="t", label="l", loss_function="labels")


def vectors(rows=5, texts=2, seed=0):
    """(rows, texts, 6) unit vectors."""
    return normalize(torch.randn(rows, texts, 6, generator=torch.Generator().manual_seed(seed)), dim=-1)


# ---- the losses


@pytest.mark.parametrize("texts", [2, 3], ids=["pairs", "with hard negatives"])
def test_infonce_is_the_formula_in_fp64(texts):
    task, given = PAIRS if texts == 2 else HARD, vectors(texts=texts)
    wide, total = given.double(), 0.0
    for row in range(5):
        against = torch.cat([wide[:, text] for text in range(1, texts)]) @ wide[row, 0] / 0.05
        total -= (against[row] - against.logsumexp(0)).item()
    assert task.loss(given, torch.arange(5)).item() == pytest.approx(total / 5, rel=1e-5)
    assert task.loss(given, torch.arange(5), 20).item() == pytest.approx(total / 20, rel=1e-5)


@pytest.mark.slow  # the import takes ten seconds
@pytest.mark.parametrize("texts", [2, 3], ids=["pairs", "with hard negatives"])
@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_infonce_is_the_ranking_loss_of_sentence_transformers(texts, temperature):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses", exc_type=ImportError)
        reference = losses.MultipleNegativesRankingLoss(model=None, scale=1 / temperature)
    options = {"negative": "n"} if texts == 3 else {}
    task = lightsft.task("embedding", anchor="q", positive="a", temperature=temperature, **options)
    given = vectors(texts=texts)
    expected = reference.compute_loss_from_embeddings([given[:, text] for text in range(texts)], None)
    torch.testing.assert_close(task.loss(given, torch.arange(5)), expected)


def test_rows_that_share_a_text_are_not_each_other_s_negatives():
    given, labels = vectors(4), torch.tensor([0, 1, 0, 3])
    scores = given[:, 0].double() @ given[:, 1].double().T / 0.05
    total = 0.0
    for row, hidden in ((0, 2), (1, None), (2, 0), (3, None)):
        kept = [column for column in range(4) if column != hidden]
        total -= (scores[row, row] - scores[row, kept].logsumexp(0)).item()
    assert PAIRS.loss(given, labels).item() == pytest.approx(total / 4, rel=1e-5)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ([["a", "b"], ["c", "d"]], [[0], [1]]),
        ([["a", "b"], ["c", "b"], ["e", "f"]], [[0, 1], [2]]),
        ([["a", "b"], ["c", "d"], ["a", "d"], ["x", "y"]], [[0, 1, 2], [3]]),
        ([["a", "a"], ["a", "b"]], [[0, 1]]),
        ([], []),
    ],
)
def test_rows_belong_together_also_by_way_of_others(texts, expected):
    found = groups(texts)
    together = [[row for row, group in enumerate(found) if group == name] for name in dict.fromkeys(found)]
    assert together == expected


def test_triplet_loss_is_the_formula():
    given = vectors(texts=3).double()
    total = sum(max(0.0, 0.3 - float(u @ v) + float(u @ w)) for u, v, w in given)
    assert total > 0
    assert TRIPLETS.loss(given, torch.arange(5)).item() == pytest.approx(total / 5)


def test_cosine_loss_is_the_formula():
    given, numbers = vectors().double(), torch.tensor([0.1, 0.5, -1.0, 1.0, 0.0])
    total = sum((float(u @ v) - number) ** 2 for (u, v), number in zip(given, numbers.tolist(), strict=True))
    assert NUMBERS.loss(given, numbers).item() == pytest.approx(total / 5, rel=1e-5)


def test_the_loss_of_labels_is_the_formula():
    given, labels = vectors(texts=1).double(), [0, 1, 0, 0, 2]
    cosines, total = given[:, 0] @ given[:, 0].T / 0.05, 0.0
    for row, label in enumerate(labels):
        others = [other for other in range(5) if other != row]
        same = [other for other in others if labels[other] == label]
        if same:
            total -= np.mean([(cosines[row, j] - cosines[row, others].logsumexp(0)).item() for j in same])
    assert LABELLED.loss(given, torch.tensor(labels)).item() == pytest.approx(total / 5)


@pytest.mark.parametrize("task", [PAIRS, TRIPLETS, HARD, LABELLED], ids=lambda task: task.loss_function)
def test_a_batch_of_one_row_has_a_finite_gradient(task):
    given = vectors(1, len(task.text_columns)).requires_grad_()
    loss = task.loss(given, torch.tensor([0]))
    loss.backward()
    assert loss.isfinite()
    assert given.grad.isfinite().all()


@pytest.mark.parametrize(
    ("task", "labels"), [(TRIPLETS, torch.arange(6)), (NUMBERS, torch.linspace(-1, 1, 6))], ids=["triplet", "cosine"]
)
def test_micro_batches_add_up_to_the_big_batch(task, labels):
    given = vectors(6, len(task.text_columns))
    parts = [task.loss(given[i : i + 2], labels[i : i + 2], 6) for i in (0, 2, 4)]
    torch.testing.assert_close(sum(parts), task.loss(given, labels))
    assert sum(task.items(labels[i : i + 2]) for i in (0, 2, 4)) == task.items(labels) == 6


@pytest.mark.parametrize(("task", "labels"), [(PAIRS, torch.arange(6)), (LABELLED, torch.arange(6) % 2)])
def test_with_negatives_from_the_batch_a_micro_batch_is_easier_than_the_whole(task, labels):
    """Accumulated gradients are not those of the big batch here: what is told apart is the micro-batch's own."""
    given = vectors(6, len(task.text_columns))
    parts = [task.loss(given[i : i + 3], labels[i : i + 3], 6) for i in (0, 3)]
    assert sum(parts) < task.loss(given, labels) - 0.1


# ---- features, batches and the model


@pytest.fixture(scope="module")
def bert():
    """An encoder without a head."""
    return tiny("bert").bert


def rows_of(number, columns=("q", "a")):
    return [
        {name: " ".join(FILLER[row : row + 2 + row % 3 + place]) for place, name in enumerate(columns)}
        for row in range(number)
    ]


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_vectors_do_not_depend_on_the_batch_and_pool_what_they_say(bert, pooling):
    task, tokenizer = lightsft.task("embedding", anchor="q", positive="a", pooling=pooling), wordpiece_tokenizer()
    batch = task.collate(task.encode(rows_of(4), tokenizer), tokenizer)
    labels = batch.pop("labels")
    with torch.no_grad():
        found = task.forward(bert, batch, labels)
    assert found.shape == (4, 2, 32)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(4, 2))
    for number, row in enumerate(rows_of(4)):
        for place, text in enumerate(row.values()):
            with torch.no_grad():
                states = bert(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].double()
            expected = {"mean": states.mean(0), "cls": states[0], "last": states[-1]}[pooling]
            torch.testing.assert_close(found[number, place].double(), normalize(expected, dim=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_decoder_and_the_encoder_of_two_parts_give_vectors_too(name):
    task, tokenizer = lightsft.task("embedding", anchor="q", positive="a", pooling="last"), wordpiece_tokenizer()
    model = tiny(name)
    model = model.model if name == "llama" else transformers.T5EncoderModel(model.config)
    batch = task.collate(task.encode(rows_of(3), tokenizer), tokenizer)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert task.forward(model, inputs, batch["labels"]).shape == (3, 2, 32)


def test_labels_are_numbered_as_they_come_and_similarities_are_kept():
    tokenizer = wordpiece_tokenizer()
    rows = [{"t": "so", "l": "x"}, {"t": "the", "l": "y"}, {"t": "a", "l": "x"}]
    assert [f["labels"] for f in LABELLED.encode(rows, tokenizer)] == [0, 1, 0]
    row = {"q": "so", "a": "the", "s": "0.25"}
    assert NUMBERS.encode([row], tokenizer)[0]["labels"] == 0.25
    same = PAIRS.encode([{"q": "so", "a": "the"}, {"q": "a", "a": "day"}, {"q": "so", "a": "film"}], tokenizer)
    labels = [feature["labels"] for feature in same]
    assert labels[0] == labels[2] != labels[1]


# ---- scores


def brute_force(queries, documents, wanted):
    """The rank of the best wanted document of each query, ties against it."""
    found = []
    for query, right in zip(queries, wanted, strict=True):
        cosines = documents @ query
        best = max(right, key=lambda place: cosines[place])
        others = [place for place in range(len(documents)) if place not in right]
        found.append(1 + sum(cosines[place] >= cosines[best] - 1e-9 for place in others))
    return found


def features_of(texts, labels=None):
    """Features as by_row reads them."""
    return [
        {"input_ids": [[0]] * len(row), "_texts": list(row), "labels": 0 if labels is None else labels[number]}
        for number, row in enumerate(texts)
    ]


def test_ranks_are_those_of_brute_force():
    given = vectors(30).double().numpy()
    features = features_of([(f"q{row}", f"a{row}") for row in range(30)])
    outcomes = PAIRS.by_row(PAIRS.outcomes(torch.tensor(given), None).numpy(), features, None)
    expected = brute_force(given[:, 0], given[:, 1], [[row] for row in range(30)])
    assert outcomes[:, 0].tolist() == expected
    scores = PAIRS.metrics(outcomes)
    assert scores["mrr"] == pytest.approx(np.mean([1 / rank for rank in expected]))
    assert scores["recall@5"] == pytest.approx(np.mean([rank <= 5 for rank in expected]))
    assert scores["recall@1"] < scores["recall@10"]


def test_equal_answers_are_one_document_and_equal_questions_share_theirs():
    given = vectors(4).double().numpy()
    given[2, 1] = given[0, 1]
    features = features_of([("q", "yes"), ("q", "no"), ("r", "yes"), ("s", "maybe")])
    outcomes = PAIRS.by_row(given.reshape(4, -1), features, None)
    documents = given[[0, 1, 3], 1]
    expected = brute_force(given[:, 0], documents, [[0, 1], [0, 1], [0], [2]])
    assert outcomes[:, 0].tolist() == expected


def test_hard_negatives_are_searched_too():
    given = np.zeros((2, 3, 2))
    given[:, 0], given[0, 1], given[1, 1], given[0, 2], given[1, 2] = [1, 0], [0.6, 0.8], [0, 1], [0.8, 0.6], [-1, 0]
    outcomes = HARD.by_row(given.reshape(2, -1), features_of([("q", "a", "x"), ("r", "b", "y")]), None)
    assert outcomes[:, 0].tolist() == [2, 3]


def test_the_nearest_of_a_label_are_found_and_a_label_that_is_alone_has_no_rank():
    given, labels = vectors(12, 1).double().numpy(), [0, 1, 2] * 3 + [0, 1, 9]
    outcomes = LABELLED.by_row(given.reshape(12, -1), features_of([("t",)] * 12, labels), None)
    for row in range(11):
        others = [other for other in range(12) if other != row]
        wanted = [others.index(other) for other in others if labels[other] == labels[row]]
        assert [outcomes[row, 0]] == brute_force([given[row, 0]], given[others, 0], [wanted])
    assert np.isnan(outcomes[11]).all()
    assert LABELLED.metrics(outcomes)["mrr"] == pytest.approx(np.mean(1 / outcomes[:11, 0]))


def test_cosines_are_compared_with_their_numbers():
    from scipy.stats import pearsonr, spearmanr

    given, numbers = vectors(9).double().numpy(), np.linspace(-1, 1, 9)
    outcomes = NUMBERS.by_row(given.reshape(9, -1), features_of([("q", "a")] * 9, numbers), None)
    cosines = (given[:, 0] * given[:, 1]).sum(-1)
    scores = NUMBERS.metrics(outcomes)
    assert scores["spearman"] == pytest.approx(spearmanr(cosines, numbers).statistic)
    assert scores["pearson"] == pytest.approx(pearsonr(cosines, numbers).statistic)


# ---- rows and settings


@pytest.mark.parametrize(
    ("row", "loss", "columns"),
    [
        ({"query": "a b", "document": "c d"}, "infonce", ["query", "document"]),
        ({"anchor": "a", "positive": "b", "negative": "c"}, "infonce", ["anchor", "positive", "negative"]),
        ({"sentence1": "a", "sentence2": "b", "score": 0.3}, "cosine", ["sentence1", "sentence2"]),
        ({"text": "a", "intent": "x"}, "labels", ["text"]),
    ],
)
def test_columns_decide_the_loss(row, loss, columns):
    task = Embedding.for_rows([row] * 3, "file")
    assert (task.loss_function, task.text_columns) == (loss, columns)
    assert task.metric == ("spearman" if loss == "cosine" else "mrr")
    task.require_metric(task.metric)
    assert lightsft.task(**task.describe()) == task
    task.check([row], "file")


def test_columns_that_no_loss_can_use_are_refused():
    with pytest.raises(DataError, match="needs a column for text and label"):
        Embedding.for_rows([{"body": "a"}], "file")
    with pytest.raises(DataError, match="needs a column for negative"):
        Embedding.for_rows([{"anchor": "a", "positive": "b"}], "file", loss_function="triplet")


@pytest.mark.parametrize(
    ("task", "row", "code"),
    [
        (PAIRS, {"q": "a", "a": " "}, "empty_cell"),
        (HARD, {"q": "a", "a": "b"}, "empty_cell"),
        (LABELLED, {"t": "a", "l": None}, "empty_cell"),
        (NUMBERS, {"q": "a", "a": "b", "s": "high"}, "no_similarity"),
        (NUMBERS, {"q": "a", "a": "b", "s": 4.5}, "no_similarity"),
        (NUMBERS, {"q": "a", "a": "b"}, "no_similarity"),
    ],
)
def test_each_problem_of_a_row_has_its_name(task, row, code):
    assert [problem.code for problem in task.problems(row)] == [code]


@pytest.mark.parametrize("options", [{"temperature": 0}, {"pooling": "max"}, {"loss_function": "arcface"}])
def test_settings_that_mean_nothing_are_refused(options):
    with pytest.raises(ConfigurationError):
        lightsft.task("embedding", anchor="q", positive="a", **options)


def test_the_anchor_decides_the_split_and_every_text_is_shown():
    row = {"q": "so", "a": "the day"}
    assert PAIRS.key(row) == "so"
    assert PAIRS.text_of(row) == "so\nthe day"
    assert [text for text, _ in PAIRS.preview(row, wordpiece_tokenizer())] == ["[CLS] so [SEP]", "[CLS] the day [SEP]"]
    assert PAIRS.length(PAIRS.encode([row], wordpiece_tokenizer())[0]) == 7
