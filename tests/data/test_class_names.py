"""Numbers of classes in data sets are read as the names that the data set itself gives them."""

import pytest

from lightsft.data.reading import read_rows, read_splits
from lightsft.tasks.token_classification import TokenClassification

datasets = pytest.importorskip("datasets")


@pytest.fixture
def tagged():
    """Two sentences whose tags are numbers, and a label that is missing in one."""
    tag, kind = datasets.ClassLabel(names=["O", "B-PER", "I-PER"]), datasets.ClassLabel(names=["news", "chat"])
    features = datasets.Features(
        {"tokens": datasets.List(datasets.Value("string")), "ner_tags": datasets.List(tag), "kind": kind}
    )
    rows = [
        {"tokens": ["Ana", "Lee", "met"], "ner_tags": [1, 2, 0], "kind": 1},
        {"tokens": ["pancakes"], "ner_tags": [0], "kind": -1},
    ]
    return datasets.Dataset.from_list(rows, features=features)


def test_classes_have_their_names_in_memory_on_disk_and_in_splits(tagged, tmp_path):
    tagged.save_to_disk(str(tmp_path / "saved"))
    for source in (tagged, tmp_path / "saved", tagged.to_iterable_dataset()):
        rows = read_rows(source)
        assert [row["ner_tags"] for row in rows] == [["B-PER", "I-PER", "O"], ["O"]]
        assert [row["kind"] for row in rows] == ["chat", None]
    assert read_splits(datasets.DatasetDict({"train": tagged}))["train"] == read_rows(tagged)


def test_named_tags_have_a_scheme(tagged):
    task = TokenClassification.for_rows(read_rows(tagged), "the data")
    assert (task.tags, task.scheme, task.labels) == ("ner_tags", "BIO", ("B-PER", "I-PER", "O"))
