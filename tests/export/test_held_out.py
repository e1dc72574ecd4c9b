"""Rows to score a merge on: a file's, or those that the run held out."""

import json
import logging
import shutil

import pytest

from lightsft.config import SingleConfig, build
from lightsft.errors import ConfigurationError, DataError
from lightsft.export import held_out as module
from lightsft.export.held_out import held_out
from lightsft.export.merge import merge
from lightsft.training import single as singles
from lightsft.training.prepared import prepare
from lightsft_adapters import LoRA
from tests.checkpoints import labelled_rows, write_csv
from tests.export.test_merge import adapter_on
from tests.run_fixtures import single


@pytest.fixture(scope="module")
def trained(bert, rows_csv, tmp_path_factory):
    """(folder of a finished run, its test rows); nothing may change it."""
    config = build(SingleConfig, single(bert, rows_csv, tmp_path_factory.mktemp("held") / "run"))
    singles.train(config, say=lambda text: None)
    return config.out, prepare(config).splits.test


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of the run's folder without its checkpoints."""
    return shutil.copytree(trained[0], tmp_path / "adapter", ignore=shutil.ignore_patterns("checkpoints"))


def test_the_test_split_of_the_run(trained):
    out, rows = trained
    found = held_out(out)
    assert found.rows == rows
    assert set(found.task.labels) == {row["label"] for row in labelled_rows(60)}


def test_the_test_split_of_the_comparison(trained, folder, tmp_path):
    _, rows = trained
    state = json.loads((folder / "run.json").read_text())
    strategy = state["settings"].pop("strategy")
    state["settings"] |= {"strategies": [strategy], "seeds": 1}
    state["settings"].pop("seed")
    (tmp_path / "run.json").write_text(json.dumps(state))
    (folder / "run.json").unlink()
    place = shutil.copytree(folder, tmp_path / "trials" / "lora-0" / "adapter")
    assert held_out(place).rows == rows


def test_no_more_rows_than_can_be_scored_quickly(trained, monkeypatch):
    monkeypatch.setattr(module, "MOST_ROWS", 3)
    assert len(held_out(trained[0]).rows) == 3


def test_rows_of_a_chat_model_that_no_run_trained(llama, tmp_path):
    adapter, _ = adapter_on(llama, LoRA(rank=2), tmp_path / "adapter", task="chat", labels=None)
    rows = [{"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "ba"}]}] * 3
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert held_out(adapter, str(tmp_path / "rows.jsonl")).rows == rows


def test_other_data_is_not_taken_for_the_runs(trained, folder, caplog):
    state = json.loads((folder / "run.json").read_text())
    state["data_sha256"]["data"] = "0" * 64
    (folder / "run.json").write_text(json.dumps(state))
    with caplog.at_level(logging.WARNING):
        assert held_out(folder) is None
    assert "another now" in caplog.text


@pytest.mark.parametrize("change", [{"data": "/nowhere/rows.csv"}, {"no_such_key": 1}])
def test_a_run_that_cannot_be_read_is_said(folder, change, caplog):
    state = json.loads((folder / "run.json").read_text())
    state["settings"] |= change
    (folder / "run.json").write_text(json.dumps(state))
    assert held_out(folder) is None
    assert "merge is not scored" in caplog.text


def test_an_adapter_without_a_run_has_none(bert, tmp_path):
    adapter, _ = adapter_on(bert, LoRA(rank=2), tmp_path / "adapter")
    assert held_out(adapter) is None
    (adapter / "lightsft.json").unlink()  # what is left is PEFT's
    with pytest.raises(ConfigurationError, match="does not say which task"):
        held_out(adapter, "rows.csv")


def test_rows_of_a_file(folder, tmp_path):
    rows = labelled_rows(7)
    assert [dict(row) for row in held_out(folder, write_csv(tmp_path / "rows.csv", rows)).rows] == rows


@pytest.mark.parametrize(
    ("rows", "message"),
    [([{"text": "good", "label": "unheard"}], "'unheard'"), ([{"words": "good", "label": "good"}], "no column 'text'")],
)
def test_wrong_rows_are_refused(folder, tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        held_out(folder, write_csv(tmp_path / "rows.csv", rows))


@pytest.mark.slow
def test_the_certificate_holds_both_scores(trained, tmp_path):
    out, rows = trained
    certificate = json.loads((merge(out, out=tmp_path / "merged") / "certificate.json").read_text())
    scores = json.loads((out / "scores.json").read_text())
    assert certificate["metric"] == "accuracy"
    assert certificate["examples"] == len(rows)
    assert certificate["score_before"] == certificate["score_after"] == pytest.approx(scores["test"]["accuracy"])


@pytest.mark.slow
def test_the_command_says_both(trained, command, tmp_path):
    out, rows = trained
    ended = command("merge", out, "--out", tmp_path / "one")
    assert ended.code == 0, ended.error
    assert f"on {len(rows)} rows" in ended.out
    data = write_csv(tmp_path / "rows.csv", labelled_rows(7))
    ended = command("merge", out, "--out", tmp_path / "two", "--data", data)
    assert "on 7 rows" in ended.out
    ended = command("merge", out, "--out", tmp_path / "three", "--data", tmp_path / "none.csv")
    assert ended.code == 2
    assert "no file" in ended.error
    assert not (tmp_path / "three").exists()
