"""How the scores of every task are said: shares in points, BLEU and chrF in points of their own, losses as they are."""

import pytest

from lightsft.metrics.units import NO_UNIT, POINTS, POINTS_OF_HUNDRED
from lightsft.tasks import TASKS, task, task_class

SHARES = {
    "accuracy", "average_precision", "auroc", "ece", "exact_match", "f1", "has_answer_exact_match", "has_answer_f1",
    "hamming_loss", "macro_f1", "macro_precision", "macro_recall", "micro_f1", "micro_precision", "micro_recall", "mrr",
    "ndcg@10", "no_answer_accuracy", "precision", "recall", "recall@1", "recall@10", "recall@5", "rouge1", "rouge2",
    "rougeL", "rougeLsum", "samples_f1", "subset_accuracy", "token_accuracy", "token_f1", "weighted_f1",
}  # fmt: skip
OF_HUNDRED = {"bleu", "chrf"}
OTHERS = {"brier", "loss", "mae", "mcc", "pearson", "perplexity", "r2", "rmse", "spearman"}


def kinds():
    yield from (task_class(name) for name in TASKS if name != "embedding")
    yield task("embedding", anchor="a", positive="b", similarity="c", loss_function="cosine")
    yield task("embedding", anchor="a", positive="b")


@pytest.mark.parametrize("kind", list(kinds()), ids=lambda kind: kind.name)
def test_every_score_that_may_decide_has_its_unit(kind):
    for metric in kind.metric_names:
        unit = kind.unit(metric) if not isinstance(kind, type) else kind.unit(kind, metric)
        expected = {POINTS: SHARES, POINTS_OF_HUNDRED: OF_HUNDRED, NO_UNIT: OTHERS}[unit]
        assert metric in expected
