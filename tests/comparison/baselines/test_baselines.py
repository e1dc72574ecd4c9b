"""Each baseline against the same made by hand, and which of them a task has."""

import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.pipeline import make_pipeline, make_union
from sklearn.preprocessing import StandardScaler

import lightsft
from lightsft import Backbone
from lightsft.comparison.baselines import all_baselines
from lightsft.comparison.baselines.head_inputs import head_inputs
from lightsft.comparison.baselines.linear_probe import STRENGTHS as PROBE_STRENGTHS
from lightsft.comparison.baselines.linear_probe import linear_probe
from lightsft.comparison.baselines.tfidf import STRENGTHS, tfidf
from lightsft.data.splits import Splits
from lightsft.training.evaluate import outcomes_of
from tests.checkpoints import LABELS, chat_rows, labelled_rows, wordpiece_tokenizer
from tests.tiny_models import tiny

TASK = lightsft.task("classification", labels=LABELS)
ROWS = labelled_rows(400)
SPLITS = Splits(ROWS[:240], ROWS[240:300], ROWS[300:])


@pytest.fixture(scope="module")
def backbone(bert):
    return Backbone.load(bert, labels=LABELS, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def found(backbone):
    return all_baselines(TASK, SPLITS, backbone, batch_size=32)


def texts_and_labels(rows):
    return [row["text"] for row in rows], [LABELS.index(row["label"]) for row in rows]


def best_by_hand(pipelines, validation):
    """The pipeline that is right most often, among equals that with the smallest loss."""
    texts, labels = validation
    return max(pipelines, key=lambda one: (one.score(texts, labels), -log_loss(labels, one.predict_proba(texts))))


def test_a_labelled_task_has_all_of_them_with_outcomes_of_every_row(found):
    assert set(found) == {"untuned", "majority", "linear_probe", "tfidf"}
    for one in found.values():
        assert one.validation.shape == (60, 3)
        assert one.test.shape == (100, 3)
        assert one.seconds > 0
        assert one.test[:, -1].tolist() == [LABELS.index(row["label"]) for row in SPLITS.test]
        assert one.test[:, :-1].sum(axis=1) == pytest.approx(1, abs=1e-6)
        assert 0 <= TASK.metrics(one.test)["accuracy"] <= 1


def test_untuned_is_the_model_as_it_is(found, backbone):
    assert (found["untuned"].test == outcomes_of(backbone, TASK, SPLITS.test, 32)).all()
    assert "random weights" in found["untuned"].about


def test_majority_is_the_best_constant(found):
    assert TASK.metrics(found["majority"].test) == TASK.baseline(SPLITS.train, SPLITS.test)


def test_tfidf_is_the_pipeline_by_hand(found):
    from sklearn.feature_extraction.text import TfidfVectorizer

    def pipeline(strength):
        words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2, token_pattern=r"(?u)\b\w+\b")
        characters = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True, min_df=2)
        return make_pipeline(make_union(words, characters), LogisticRegression(C=strength, max_iter=1000))

    made = [pipeline(strength).fit(*texts_and_labels(SPLITS.train)) for strength in STRENGTHS]
    best = best_by_hand(made, texts_and_labels(SPLITS.validation))
    texts, _ = texts_and_labels(SPLITS.test)
    assert found["tfidf"].test[:, :-1] == pytest.approx(best.predict_proba(texts), abs=1e-6)
    assert TASK.score(found["tfidf"].test, "accuracy") > 0.95
    assert "fitted on 240 of 240" in found["tfidf"].about


def test_the_linear_probe_is_the_pipeline_by_hand(found, backbone):
    vectors = {name: head_inputs(backbone, TASK, rows, 32) for name, rows in SPLITS.named().items()}
    labels = {name: texts_and_labels(rows)[1] for name, rows in SPLITS.named().items()}
    made = [
        make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000)) for strength in PROBE_STRENGTHS
    ]
    for pipeline in made:
        pipeline.fit(vectors["train"], labels["train"])
    best = best_by_hand(made, (vectors["validation"], labels["validation"]))
    assert found["linear_probe"].test[:, :-1] == pytest.approx(best.predict_proba(vectors["test"]), abs=1e-6)
    assert TASK.score(found["linear_probe"].test, "accuracy") > 0.9


def test_more_rows_than_asked_for_are_left_out_and_it_says_so(backbone):
    assert "fitted on 50 of 240" in tfidf(TASK, SPLITS, "accuracy", most_rows=50).about
    assert "fitted on 40 of 240" in linear_probe(TASK, SPLITS, backbone, 32, "accuracy", most_rows=40).about


def test_several_labels_and_numbers_have_theirs():
    for number, (name, given) in enumerate({"multi-label": {"labels": LABELS}, "regression": {}}.items()):
        task = lightsft.task(name, label="y", **given)
        answers = {"neg": "neg", "pos": "pos,neg"} if name == "multi-label" else {"neg": -1.0, "pos": 2.0}
        parts = Splits(
            *([{**row, "y": answers[row["label"]]} for row in rows[:60]] for rows in SPLITS.named().values())
        )
        model = tiny("bert", num_labels=2 - number)
        found = all_baselines(task, parts, Backbone(model, tokenizer=wordpiece_tokenizer()), 32)
        assert set(found) == {"untuned", "majority", "linear_probe", "tfidf"}
        for one in found.values():
            assert one.test.shape == found["untuned"].test.shape
            assert task.metrics(one.test)["loss"] is not None
        assert task.score(found["tfidf"].test, "loss") < 0.5 * task.score(found["majority"].test, "loss")


def test_pairs_are_read_together():
    rows = [{"text": "the film", "text_pair": row["text"], "label": row["label"]} for row in ROWS]
    task = lightsft.task("classification", labels=LABELS, text_pair="text_pair")
    assert task.score(tfidf(task, Splits(rows[:200], rows[200:300], rows[300:]), "accuracy").test, "accuracy") > 0.8


def test_texts_without_words_have_characters_and_empty_ones_nothing():
    rows = [{"text": text, "label": label} for text, label in [("!!! ???", "pos"), ("... ,,,", "neg")] * 10]
    assert TASK.score(tfidf(TASK, Splits(rows, rows, rows), "accuracy").test, "accuracy") == 1.0
    blank = [{"text": " ", "label": label} for label in LABELS]
    assert tfidf(TASK, Splits(blank, blank, blank), "accuracy") is None


def test_a_language_model_has_its_untuned_self_alone(llama):
    rows = chat_rows(30)
    backbone = Backbone.load(llama, task="chat", dtype="float32", device="cpu")
    found = all_baselines(lightsft.task("chat"), Splits(rows[:10], rows[10:20], rows[20:]), backbone, 8)
    assert set(found) == {"untuned"}
    assert "head" not in found["untuned"].about
