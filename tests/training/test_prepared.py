"""From a configuration to rows: columns found, bad rows refused or left out and counted, splits of any kind."""

import pytest
import torch

from lightsft.adapter_files import read_tensors
from lightsft.config import SingleConfig, build
from lightsft.errors import ConfigurationError, DataError
from lightsft.training.prepared import read
from lightsft.training.single import train
from tests.checkpoints import labelled_rows, write_csv, write_jsonl


@pytest.fixture
def configured(bert, tmp_path):
    """A configuration around some rows."""

    def make(rows, **options):
        data = write_jsonl(tmp_path / "rows.jsonl", rows)
        given = {"model": str(bert), "data": str(data), "out": str(tmp_path / "out"), "dtype": "float32"}
        return build(SingleConfig, given | options)

    return make


BAD = {
    "an empty text": ({"text": " ", "label": "pos"}, "empty_cell"),
    "no label": ({"text": "a film", "label": None}, "empty_cell"),
    "a list of labels": ({"text": "a film", "label": ["pos"]}, "several_labels"),
}


@pytest.mark.parametrize(("row", "code"), BAD.values(), ids=list(BAD))
def test_a_bad_row_is_an_error_with_its_number_or_left_out_and_counted(configured, row, code):
    rows = labelled_rows(60)
    rows.insert(7, row)
    with pytest.raises(DataError, match=r"row 8 has .*\n.*\n.*--drop-bad-rows"):
        read(configured(rows))
    prepared = read(configured(rows, drop_bad_rows=True))
    assert prepared.dropped == {"train": {code: 1}}
    assert sum(len(part) for part in prepared.splits.named().values()) == 60
    assert any(f"left out of train: 1 rows ({code} 1)" in line for line in prepared.lines())


def test_every_bad_row_is_counted(configured):
    with pytest.raises(DataError, match=r"row 1 has an empty 'text' \(3 rows cannot be used\)"):
        read(configured([{"text": "", "label": "pos"}] * 3 + labelled_rows(60)))


def test_nothing_left_is_an_error(configured):
    rows = [{"text": "", "label": label} for label in ("pos", "neg")] * 5
    with pytest.raises(DataError, match="none of the 10 rows can be used"):
        read(configured(rows, drop_bad_rows=True))


def test_columns_that_nobody_named_are_found_and_said(configured):
    rows = [{"id": n, "review": f"{row['text']} {n}", "stars": row["label"]} for n, row in enumerate(labelled_rows(80))]
    prepared = read(configured(rows))
    assert (prepared.task.text, prepared.task.label) == ("review", "stars")
    assert "'review' (by its name)" in prepared.found
    assert "'stars' (by its content)" in prepared.found


def test_splits_that_the_data_holds_are_taken_as_they_are(bert, tmp_path):
    rows = labelled_rows(60)
    for name, part in (("train", rows[:30]), ("dev", rows[30:45]), ("test", rows[45:])):
        write_jsonl(tmp_path / f"{name}.jsonl", part)
    config = build(SingleConfig, {"model": str(bert), "data": str(tmp_path), "out": str(tmp_path / "out")})
    assert {name: len(part) for name, part in read(config).splits.named().items()} == {
        "train": 30,
        "validation": 15,
        "test": 15,
    }


def test_a_group_is_in_one_split_and_classes_have_their_share(configured):
    rows = [{**row, "text": f"{row['text']} {n}", "writer": n % 20} for n, row in enumerate(labelled_rows(200))]
    grouped = read(configured(rows, group="writer")).splits.named()
    writers = [{row["writer"] for row in part} for part in grouped.values()]
    assert sum(map(len, writers)) == len(set.union(*writers)) == 20
    stratified = read(configured(rows, split="stratified")).splits
    shares = [sum(row["label"] == "pos" for row in part) / len(part) for part in stratified.named().values()]
    assert max(shares) - min(shares) < 0.06


UNUSED = [
    ({"split": "stratified"}, "have no classes"),
    ({"shots": 4}, "have no classes"),
    ({"label": "x"}, "does not use label='x'"),
]


@pytest.mark.parametrize(("options", "found"), UNUSED)
def test_what_a_task_does_not_have_is_refused(configured, llama, options, found):
    rows = [{"prompt": f"good {n}", "completion": "bad"} for n in range(40)]
    with pytest.raises(ConfigurationError, match=found):
        read(configured(rows, task="chat", model=str(llama), **options))


def test_a_few_examples_per_class_differ_between_seeds(configured):
    rows = [{**row, "text": f"{row['text']} {n}"} for n, row in enumerate(labelled_rows(200))]
    prepared = read(configured(rows, shots=4))
    draws = [prepared.training_rows(seed) for seed in range(3)]
    assert all(sorted(row["label"] for row in draw) == ["neg"] * 4 + ["pos"] * 4 for draw in draws)
    assert draws[0] == prepared.training_rows(0)
    assert draws[0] != draws[1] != draws[2]


# ---- batches


def trained_tensors(configured, out, **options):
    rows = [{"prompt": "good film " * (1 + n % 7) + str(n), "completion": "bad " * (1 + n % 3)} for n in range(80)]
    config = configured(rows, task="chat", out=str(out), strategy="lora(rank=2)", epochs=2, **options)
    train(config, say=lambda line: None)
    return read_tensors(out)


def test_a_packed_run_ends_in_the_same_weights(configured, llama, tmp_path):
    options = {"model": str(llama), "batch_size": 8, "learning_rate": 1e-2}
    padded = trained_tensors(configured, tmp_path / "padded", **options)
    packed = trained_tensors(configured, tmp_path / "packed", packing=True, **options)
    assert padded.keys() == packed.keys()
    for name, tensor in padded.items():
        torch.testing.assert_close(packed[name], tensor, rtol=1e-3, atol=1e-5)


def test_a_run_by_tokens_continues_and_repeats(configured, llama, tmp_path):
    options = {"model": str(llama), "tokens_per_batch": 128, "learning_rate": 1e-2}
    one = trained_tensors(configured, tmp_path / "one", **options)
    other = trained_tensors(configured, tmp_path / "other", **options)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_packing_is_refused_where_a_text_is_read_as_a_whole(configured):
    with pytest.raises(ConfigurationError, match="reads a sequence as a whole"):
        train(configured(labelled_rows(60), packing=True), say=lambda line: None)


def test_the_first_row_of_each_split_is_shown(configured):
    said = []
    train(configured(labelled_rows(60), epochs=1, strategy="bitfit"), say=said.append)
    for split in ("train", "validation", "test"):
        assert f"the first row of {split}:" in said
    assert any(line.startswith("  loss    | ") for line in said)


def test_a_file_of_its_own_is_checked_too(configured, tmp_path):
    other = write_csv(tmp_path / "test.csv", [{"text": "good", "label": "strange"}])
    with pytest.raises(DataError, match=r"test.csv: row 1 has the label 'strange'"):
        read(configured(labelled_rows(60), test_data=str(other)))


def test_an_option_may_be_called_as_an_argument_of_ours(configured, llama):
    rows = [{"question asked": f"good {n}", "target": "bad"} for n in range(40)]
    prepared = read(configured(rows, task={"name": "seq2seq", "source": "question asked"}, model=str(llama)))
    assert prepared.task.source == "question asked"
