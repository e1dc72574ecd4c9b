"""Fixtures of every test that reads files or runs something, imported by the conftest of each such folder."""

import re
import sys
from dataclasses import dataclass

import pytest

from lightsft.cli.app import main
from tests import checkpoints


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    """A folder with a base BERT and its tokenizer; nothing may change it."""
    return checkpoints.save_bert(tmp_path_factory.mktemp("bert") / "base")


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A folder with a causal Llama, its tokenizer and a chat template; nothing may change it."""
    return checkpoints.save_llama(tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture(scope="session")
def rows_csv(tmp_path_factory):
    """300 labelled texts in a csv file; nothing may change it."""
    return checkpoints.write_csv(tmp_path_factory.mktemp("rows") / "rows.csv", checkpoints.labelled_rows())


@pytest.fixture(scope="session")
def chat_jsonl(tmp_path_factory):
    """80 questions and answers as JSON lines; nothing may change it."""
    return checkpoints.write_jsonl(tmp_path_factory.mktemp("chat") / "chat.jsonl", checkpoints.chat_rows())


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    error: str

    def says(self, *fragments):
        """Whether standard error says all of it, whatever box and line breaks it is printed in."""
        shown = _unbroken(self.error)
        missing = [fragment for fragment in fragments if _unbroken(fragment) not in shown]
        assert not missing, f"{missing} not in:\n{self.error}"
        return True


def _unbroken(text):
    return re.sub(r"[\s│╭╮╰╯─]+", "", text)


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a `lightsft` command in this process, the way the console script does."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["lightsft", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return Ended(ended.value.code or 0, printed.out, printed.err)

    return run


@pytest.fixture(scope="session")
def trained(bert, rows_csv, tmp_path_factory):
    """The folder of a finished `lightsft train` run with LoRA; nothing may change it."""
    from lightsft.config import SingleConfig, build
    from lightsft.training.single import train

    out = tmp_path_factory.mktemp("trained") / "run"
    train(build(SingleConfig, single(bert, rows_csv, out)), say=lambda text: None)
    return out


def single(model, data, out):
    """The configuration of `trained`."""
    values = {"model": str(model), "data": str(data), "out": str(out), "strategy": "lora(rank=2)", "epochs": 1}
    return {**values, "max_train_examples": 32, "dtype": "float32", "learning_rate": 0.01}


def flags(**values):
    """`learning_rate=1e-3` as `--learning-rate 1e-3`; None leaves the flag out."""
    given = {f"--{name.replace('_', '-')}": str(value) for name, value in values.items() if value is not None}
    return [part for pair in given.items() for part in pair]
