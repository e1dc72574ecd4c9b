"""A full disk ends with exit code 2, and what was there stays: files may not grow beyond a limit here."""

import resource
from contextlib import contextmanager

import pytest

from tests.cli.test_bad_input import contents, refused
from tests.run_fixtures import flags


@contextmanager
def no_file_larger_than(size):
    """Every write beyond `size` bytes fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("size", "reason"),
    [(2_000, "File too large"), (40_000, "PyTorch could not write a whole file")],
    ids=["in the adapter's tensors", "in the optimizer's state"],
)
def test_training_on_a_full_disk_is_refused_and_continues_when_there_is_space(
    command, bert, rows_csv, tmp_path, size, reason
):
    arguments = flags(model=bert, data=rows_csv, out=tmp_path / "out", epochs=1, max_train_examples=32, dtype="float32")
    with no_file_larger_than(size):
        ended = command("train", *arguments)
    refused(ended, "cannot write", reason, "free some space", "run the same command again")
    assert command("train", *arguments).code == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_merging_on_a_full_disk_leaves_nothing_half_written(command, trained, tmp_path):
    before = contents(trained)
    with no_file_larger_than(20_000):
        ended = command("merge", trained, "--out", tmp_path / "merged")
    refused(ended, "cannot write", "merged", "File too large", "free some space")
    assert list(tmp_path.iterdir()) == []
    assert contents(trained) == before


def test_predictions_on_a_full_disk_leave_nothing_half_written(command, trained, rows_csv, tmp_path):
    with no_file_larger_than(2_000):
        ended = command("predict", trained, "--file", rows_csv, "--out", tmp_path / "predictions.jsonl")
    refused(ended, "cannot write", "predictions.jsonl", "File too large")
    assert list(tmp_path.iterdir()) == []
