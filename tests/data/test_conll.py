"""CoNLL files: sentences of tokens and tags, and the line of what is not one."""

import pytest

from lightsft.data.reading import read_rows, stream_rows
from lightsft.errors import DataError

NER = "-DOCSTART- -X- O\n\n# a note of several words\nEU NNP B-ORG\nrejects VBZ O\n\nPeter NNP B-PER\n\n\n"
SENTENCES = [
    {"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"], "column2": ["NNP", "VBZ"]},
    {"tokens": ["Peter"], "tags": ["B-PER"], "column2": ["NNP"]},
]
UNIVERSAL = (
    "# sent_id = 1\n# text = vámonos al mar\n"
    "1-2\tvámonos\t_\t_\t_\t_\t_\t_\t_\t_\n"
    "1\tvamos\tir\tVERB\tV\t_\t0\troot\t_\t_\n"
    "2\tnos\tnosotros\tPRON\tP\t_\t1\tobj\t_\t_\n"
    "2.1\tx\tx\tX\tX\t_\t_\t_\t_\t_\n"
    "3\tmar\tmar\tNOUN\tN\t_\t1\tobl\t_\tSpaceAfter=No\n"
)


@pytest.mark.parametrize("separator", [" ", "\t", "   "])
@pytest.mark.parametrize("name", ["rows.conll", "rows.bio", "rows.iob", "rows.iob2", "rows.txt"])
def test_sentences_are_lists_of_tokens_tags_and_further_columns(tmp_path, name, separator):
    lines = [line if line[:1] in "#-" else line.replace(" ", separator) for line in NER.split("\n")]
    (tmp_path / name).write_text("\n".join(lines))
    assert read_rows(tmp_path / name) == SENTENCES


def test_windows_line_ends_are_no_part_of_a_tag(tmp_path):
    (tmp_path / "rows.conll").write_bytes(NER.replace("\n", "\r\n").encode())
    assert read_rows(tmp_path / "rows.conll") == SENTENCES


@pytest.mark.parametrize("name", ["rows.conllu", "rows.conll", "rows.txt"])
def test_conll_u_has_forms_and_universal_tags_without_ranges_and_empty_words(tmp_path, name):
    (tmp_path / name).write_text(UNIVERSAL)
    (row,) = read_rows(tmp_path / name)
    assert row["tokens"] == ["vamos", "nos", "mar"]
    assert row["tags"] == ["VERB", "PRON", "NOUN"]
    assert row["lemma"] == ["ir", "nosotros", "mar"]
    assert row["misc"] == ["_", "_", "SpaceAfter=No"]
    assert list(row)[2:] == ["lemma", "xpos", "feats", "head", "deprel", "deps", "misc"]


def test_a_hashtag_is_a_token(tmp_path):
    (tmp_path / "rows.conll").write_text("# id 7 of tweets\n#nlp\tO\nin\tO\n#\tO\nRome\tB-LOC\n")
    assert read_rows(tmp_path / "rows.conll") == [
        {"tokens": ["#nlp", "in", "#", "Rome"], "tags": ["O", "O", "O", "B-LOC"]}
    ]


def test_a_ragged_sentence_is_a_problem_with_its_line_and_the_next_one_is_read(tmp_path):
    path = tmp_path / "rows.conll"
    path.write_text("a O\n\nb O\nc\nd O\n\ne O\n")
    one, two, three = stream_rows(path)
    assert [row.number for row in (one, two, three)] == [1, 2, 3]
    assert (two.row, two.line, two.problem.code) == (None, 3, "ragged_lines")
    assert two.problem.found == "has 1 columns instead of 2 in line 4"
    assert three.row == {"tokens": ["e"], "tags": ["O"]}
    with pytest.raises(DataError, match=r"rows.conll: row 2 has 1 columns instead of 2 in line 4\n"):
        read_rows(path)


def test_tokens_without_tags_are_a_problem_of_every_sentence(tmp_path):
    (tmp_path / "rows.conll").write_text("a\nb\n\nc\n")
    assert [one.problem.code for one in stream_rows(tmp_path / "rows.conll")] == ["ragged_lines"] * 2


@pytest.mark.parametrize("text", ["two words\nper line\n", "OK O\nno tags here\n", "alone\n"])
def test_a_text_file_without_tags_has_a_row_per_line(tmp_path, text):
    (tmp_path / "rows.txt").write_text(text + "\n\n")
    assert read_rows(tmp_path / "rows.txt") == [{"text": line} for line in text.splitlines()]
