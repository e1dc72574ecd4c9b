"""Rows from files: what is written comes back, what is damaged is named."""

import json

import datasets
import pytest

from lightsft.data.reading import read_rows, require_columns
from lightsft.errors import DataError
from tests.checkpoints import write_csv

ROWS = [
    {"text": "plain", "label": "pos"},
    {"text": 'a "quoted", comma\tand tab', "label": "neg"},
    {"text": "two\nlines", "label": "pos"},
    {"text": "größe 🙂", "label": "neg"},
    {"text": "NA", "label": "null"},
    {"text": "007", "label": "1e3"},
]


def write(folder, kind, rows):
    """The rows in a file of that kind."""
    path = folder / f"rows.{kind}"
    if kind in ("csv", "tsv"):
        write_csv(path, rows, "\t" if kind == "tsv" else ",")
    elif kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")
    elif kind == "folder":
        datasets.Dataset.from_list(rows).save_to_disk(path)
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet", "folder"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, kind):
    assert read_rows(write(tmp_path, kind, ROWS)) == ROWS


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet", "folder"])
def test_numbers_and_gaps_keep_their_type(tmp_path, kind):
    rows = [{"text": "a", "label": 1}, {"text": None, "label": 0}, {"text": "c", "label": None}]
    assert read_rows(write(tmp_path, kind, rows)) == rows


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet", "folder"])
def test_nested_values_survive(tmp_path, kind):
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    assert read_rows(write(tmp_path, kind, rows)) == rows


def test_a_split_of_a_saved_data_set_is_chosen(tmp_path):
    parts = {name: datasets.Dataset.from_list([{"text": name}]) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "both")
    assert read_rows(tmp_path / "both") == [{"text": "train"}]
    assert read_rows(tmp_path / "both", split="test") == [{"text": "test"}]
    with pytest.raises(DataError, match="no split 'validation'") as caught:
        read_rows(tmp_path / "both", split="validation")
    assert caught.value.expected == "one of train, test"


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "cp1252"])
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_another_encoding_is_read_when_it_is_named(tmp_path, kind, encoding):
    text = "text,label\ncafé,pos\n" if kind == "csv" else '{"text": "café", "label": "pos"}\n'
    path = tmp_path / f"rows.{kind}"
    path.write_bytes(text.encode(encoding))
    assert read_rows(path, encoding=encoding) == [{"text": "café", "label": "pos"}]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_the_mark_that_spreadsheets_put_first_is_no_part_of_a_name(tmp_path, kind):
    text = "text,label\nx,pos\n" if kind == "csv" else '{"text": "x", "label": "pos"}\n'
    path = tmp_path / f"rows.{kind}"
    path.write_text(text, encoding="utf-8-sig")
    assert read_rows(path) == [{"text": "x", "label": "pos"}]


def test_windows_line_ends_and_blank_lines_are_no_rows(tmp_path):
    (tmp_path / "rows.csv").write_bytes(b"text,label\r\na,pos\r\n\r\nb,neg\r\n")
    assert read_rows(tmp_path / "rows.csv") == [{"text": "a", "label": "pos"}, {"text": "b", "label": "neg"}]


def test_a_text_of_a_megabyte_is_read(tmp_path):
    rows = [{"text": "word " * 200_000, "label": "pos"}]
    assert read_rows(write(tmp_path, "csv", rows)) == rows


def test_an_unusual_separator_in_a_json_line_ends_no_row(tmp_path):
    rows = [{"text": "one\u2028two\x85three\x0cfour"}]
    assert read_rows(write(tmp_path, "jsonl", rows)) == rows


@pytest.mark.parametrize(
    ("name", "content", "fragments"),
    [
        ("rows.csv", b"", ["is empty"]),
        ("rows.csv", b"text,label\n", ["holds no rows"]),
        ("rows.jsonl", b"\n\n", ["holds no rows"]),
        ("rows.json", b"[]", ["holds no rows"]),
        ("rows.csv", b"text,label\na,b\nc,d,e\n", ["3 fields instead of 2 in line 3"]),
        ("rows.csv", b"text,label\na,b,x\nc,d,e\n", ["3 fields instead of 2 in line 2"]),
        ("rows.csv", b"text,label\na\n", ["1 fields instead of 2 in line 2"]),
        ("rows.csv", b'text,label\n"a,b\nc,d\n', ["does not parse"]),
        ("rows.csv", b"text,text\na,b\n", ["'text' twice"]),
        ("rows.csv", b"text,label\n\xff,b\n", ["is not utf-8: byte 0xff at offset 11"]),
        ("rows.jsonl", b'{"a": 1}\n{"a": \n', ["line 2 is not JSON"]),
        ("rows.jsonl", b'{"a": 1}\n\n[1]\n', ["row 2 is not an object", "[1]"]),
        ("rows.json", b'[{"a": 1},\n{"a" 2}]', ["line 2 is not JSON"]),
        ("rows.json", b'{"a": 1}', ["holds a JSON dict", "a list of objects"]),
        ("rows.parquet", b"PAR1 and more", ["is damaged"]),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong(tmp_path, name, content, fragments):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_rows(tmp_path / name)
    for fragment in [*fragments, name]:
        assert fragment in str(caught.value)


def test_an_unknown_encoding_is_refused(tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\na,b\n")
    with pytest.raises(DataError, match="utf-9"):
        read_rows(tmp_path / "rows.csv", encoding="utf-9")


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(DataError, match="no file"):
        read_rows(tmp_path / "nowhere.csv")
    with pytest.raises(DataError, match="not a saved data set"):
        read_rows(tmp_path)


def test_every_missing_column_is_named_beside_those_that_are_there():
    with pytest.raises(DataError) as caught:
        require_columns([{"text": 1, "stars": 2}], ["text", "review", "label"], "file")
    assert caught.value.found == "file has no column 'review', 'label'"
    assert caught.value.expected == "one of its columns: 'text', 'stars'"
