"""Rows one at a time: what is wrong with one costs that row, and memory does not grow with the file."""

import csv
import json
import random
import tracemalloc

import pyarrow
import pytest
from pyarrow import ipc, parquet

from lightsft.data import separated
from lightsft.data.reading import read_rows, size_bytes, stream_rows
from lightsft.errors import DataError


def streamed(path, **options):
    return list(stream_rows(path, **options))


def codes(found):
    return [one.problem and one.problem.code for one in found]


def test_a_line_that_is_no_json_costs_that_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"a": \n[1]\n{"a": "\xff"}\n{"a": "\\ud83d"}\n{"a": "\\ud83d\\ude00"}\n{"a": 6}')
    found = streamed(path)
    assert codes(found) == [None, "broken_json", "not_an_object", "broken_encoding", "half_character", None, None]
    assert [one.number for one in found] == [1, 2, 3, 4, 5, 6, 7]
    assert [one.line for one in found] == [1, 3, 4, 5, 6, 7, 8]
    assert [one.row for one in found] == [{"a": 1}, None, None, None, None, {"a": "😀"}, {"a": 6}]
    assert found[-1].position == size_bytes(path) == path.stat().st_size


@pytest.mark.parametrize("line", ["[" * 200_000, "9" * 5000, '{"a": ' * 100_000])
def test_json_that_no_parser_takes_is_a_problem(tmp_path, line):
    (tmp_path / "rows.jsonl").write_text(f'{{"a": 1}}\n{line}\n{{"a": 2}}\n')
    assert codes(streamed(tmp_path / "rows.jsonl")) == [None, "broken_json", None]


def test_a_record_with_too_many_fields_or_broken_bytes_costs_that_row(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b'text,label\na,b\n\nc,d,e\n"two\nlines",x\n"\xe9\n",y\nlast,z\n')
    found = streamed(path)
    assert codes(found) == [None, "wrong_fields", None, "broken_encoding", None]
    assert [one.line for one in found] == [2, 4, 5, 7, 9]
    assert found[3].problem.found == "is not utf-8: byte 0xe9 at offset 37"
    assert [one.row["text"] for one in found if one.row] == ["a", "two\nlines", "last"]
    assert found[-1].position == path.stat().st_size


@pytest.mark.parametrize("after", ["c,d\ne,f\n", 'c,d\n"e",f\n', 'c,d\n"e\n",f\n'])
def test_an_open_quote_costs_the_row_that_it_is_in(tmp_path, after):
    path = tmp_path / "rows.csv"
    path.write_text('text,label\n"open,b\n' + after)
    found = streamed(path)
    assert (codes(found)[0], found[0].line) == ("broken_quotes", 2)
    assert [dict(one.row) for one in found[1:]] == [
        dict(zip(("text", "label"), fields, strict=True)) for fields in csv.reader(after.splitlines(keepends=True))
    ]


def test_an_open_quote_is_given_up_after_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr(separated, "LONGEST_RECORD", 1000)
    path = tmp_path / "rows.csv"
    path.write_text('text,label\n"open,b\n' + "c,d\n" * 1000)
    found = streamed(path)
    assert codes(found) == ["broken_quotes"] + [None] * 1000
    assert "not closed within 1,000 characters" in found[0].problem.found


@pytest.mark.parametrize("size", [1, 3, 100])
def test_reading_is_what_csv_reads(tmp_path, size):
    path = tmp_path / "rows.csv"
    rows = [[f'{number} "quoted"\r\n, and\nmore\r', "x" * number] for number in range(size)]
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["text", "label"], *rows])
    assert [list(row.values()) for row in read_rows(path)] == rows


def test_lines_that_end_with_a_carriage_return_alone_are_rows(tmp_path):
    (tmp_path / "rows.csv").write_bytes(b"text,label\ra,b\rc,d\r")
    assert [row["text"] for row in read_rows(tmp_path / "rows.csv")] == ["a", "c"]


@pytest.mark.parametrize("separator", [";", "\t"])
def test_a_csv_file_may_have_another_separator(tmp_path, separator):
    (tmp_path / "rows.csv").write_text(f"text{separator}label\na, b{separator}c\n")
    assert read_rows(tmp_path / "rows.csv") == [{"text": "a, b", "label": "c"}]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_wide_characters_are_read_across_blocks(tmp_path, monkeypatch, kind, encoding):
    monkeypatch.setattr("lightsft.data.text_lines.BLOCK", 64)
    texts = [f"größe {number} ਊĀਊ" for number in range(50)]  # 0A0A 0100 0A0A: a line feed between two
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path = tmp_path / f"rows.{kind}"
    path.write_bytes("\n".join(rows if kind == "jsonl" else ["text", *texts]).encode(encoding))
    assert [row["text"] for row in read_rows(path, encoding=encoding)] == texts


@pytest.mark.parametrize("written", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_file_in_another_encoding_from_its_first_byte_says_which_one(tmp_path, written):
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"text": "plain"}\n'.encode(written))
    with pytest.raises(DataError, match="is not utf-8") as caught:
        list(stream_rows(path))
    assert caught.value.todo == f"name its encoding: --encoding {written[:6]}"
    assert read_rows(path, encoding=written) == [{"text": "plain"}]


@pytest.mark.parametrize(
    ("raw", "encoding", "fits"),
    [
        (b"caf\xe9", "utf-8", "latin-1"),
        (b"it\x92s", "utf-8", "cp1252"),
        ("größe".encode(), "ascii", "utf-8"),
        (b"\x81\xff", "utf-8", "latin-1"),
    ],
)
def test_bytes_that_do_not_decode_come_with_an_encoding_in_which_they_do(tmp_path, raw, encoding, fits):
    (tmp_path / "rows.jsonl").write_bytes(b'{"a": "' + raw + b'"}\n')
    (one,) = streamed(tmp_path / "rows.jsonl", encoding=encoding)
    assert one.problem.todo == f"name its encoding, for example --encoding {fits}"
    assert read_rows(tmp_path / "rows.jsonl", encoding=fits)


def test_a_header_with_broken_bytes_is_refused(tmp_path):
    (tmp_path / "rows.csv").write_bytes(b"t\xe9xt,label\na,b\n")
    with pytest.raises(DataError, match="the header is not utf-8: byte 0xe9 at offset 1"):
        streamed(tmp_path / "rows.csv")


def test_what_is_missing_is_refused_before_the_first_row_is_asked_for(tmp_path):
    with pytest.raises(DataError, match="no file"):
        stream_rows(tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_memory_does_not_grow_with_the_file(tmp_path, kind):
    line = "word " * 200 + ",x\n" if kind == "csv" else json.dumps({"text": "word " * 200}) + "\n"
    path = tmp_path / f"rows.{kind}"
    path.write_text(("text,label\n" if kind == "csv" else "") + line * 8_000)  # 8 MB
    tracemalloc.start()
    try:
        rows = sum(1 for _ in stream_rows(path))
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert rows == 8_000
    assert peak_bytes < 300_000


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_table_is_not_read_ahead(tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    table = pyarrow.table({"text": [random.Random(0).randbytes(500).hex() + str(number) for number in range(1000)]})
    maker = parquet.ParquetWriter if kind == "parquet" else ipc.new_file
    with maker(path, table.schema) as writer:
        for _ in range(20):
            writer.write_table(table)  # 1 MB, a row group or batch of its own
    before = pyarrow.total_allocated_bytes()
    held_bytes = [pyarrow.total_allocated_bytes() - before for _ in stream_rows(path)]
    assert len(held_bytes) == 20_000
    assert max(held_bytes) < 4_000_000
