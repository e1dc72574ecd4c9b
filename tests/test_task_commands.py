"""The commands in docs/tasks.md run, on the rows that stand above them."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import transformers

from lightsft.tasks import TASKS
from tests.run_fixtures import command  # noqa: F401  a fixture
from tests.tasks.kinds_of_tokenizers import tokenizer_of

TEXT = (Path(__file__).parent.parent / "docs" / "tasks.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## ([a-z-]+)\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE))
OF_TEXTS = [name for name in SECTIONS if "`:\n\n```json" in SECTIONS[name]]
ENCODERS = (
    "classification",
    "multi-label",
    "regression",
    "token-classification",
    "question-answering",
    "multiple-choice",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny BERT without a head."""
    torch.manual_seed(0)
    tokenizer, folder = tokenizer_of("unigram"), tmp_path_factory.mktemp("model") / "base"
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_every_task_is_in_the_tables():
    for name in TASKS:
        assert TEXT.count(f"`{name}`") >= 2, name


@pytest.mark.parametrize("name", ENCODERS)
def test_the_commands_of_a_section_run(name, model, tmp_path, monkeypatch, command):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    for file, rows in re.findall(r"`([\w.]+)`:\n\n```json\n(.*?)```", SECTIONS[name], re.DOTALL):
        Path(file).write_text(rows, encoding="utf-8")
    (session,) = re.findall(r"```console\n(.*?)```", SECTIONS[name], re.DOTALL)
    for line in session.splitlines():
        program, *arguments = shlex.split(line.removeprefix("$ ").replace("MODEL", str(model)))
        assert program == "lightsft"
        if arguments[0] == "train":
            file = arguments[arguments.index("--data") + 1]
            arguments += ["--validation-data", file, "--test-data", file, "--epochs", 1, "--max-length", 64]
        ended = command(*arguments)
        assert ended.code == 0, ended.error
        assert ended.out.strip()
