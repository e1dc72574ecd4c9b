"""Sources other than plain files of rows: SQuAD, folders, arrow, packed files, objects in memory, splits."""

import gzip
import json
from typing import ClassVar

import datasets
import numpy as np
import pandas
import pyarrow
import pytest
from pyarrow import feather, ipc

from lightsft.data.reading import read_rows, read_splits, size_bytes, stream_rows
from lightsft.errors import DataError

ROWS = [{"text": "café", "label": "pos"}, {"text": "no", "label": "neg"}]
QUESTIONS = {
    "version": "v2.0",
    "data": [
        {
            "title": "Rome",
            "paragraphs": [
                {
                    "context": "Rome is a city.",
                    "qas": [
                        {"id": "1", "question": "What?", "answers": [{"text": "a city", "answer_start": 8}]},
                        {"id": "2", "question": "Why?", "answers": [], "is_impossible": True},
                    ],
                }
            ],
        }
    ],
}
FLAT = [
    {
        "id": "1",
        "title": "Rome",
        "context": "Rome is a city.",
        "question": "What?",
        "answers": {"text": ["a city"], "answer_start": [8]},
        "is_impossible": False,
    },
    {
        "id": "2",
        "title": "Rome",
        "context": "Rome is a city.",
        "question": "Why?",
        "answers": {"text": [], "answer_start": []},
        "is_impossible": True,
    },
]


def dump(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def fill(folder, *names):
    """Small files, each holding its own name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name, encoding="utf-8")
    return folder


class TestJsonDocuments:
    def test_squad_is_flattened_to_a_row_per_question(self, tmp_path):
        assert read_rows(dump(tmp_path / "squad.json", QUESTIONS)) == FLAT

    def test_a_question_that_lacks_something_is_a_problem_with_its_number(self, tmp_path):
        damaged = json.loads(json.dumps(QUESTIONS))
        del damaged["data"][0]["paragraphs"][0]["qas"][0]["question"]
        damaged["data"].append({"title": "Empty", "paragraphs": None})
        one, two, three = stream_rows(dump(tmp_path / "squad.json", damaged))
        assert (one.row, one.problem.code, one.number) == (None, "not_squad", 1)
        assert one.problem.found == "lacks 'question' in the article 'Rome'"
        assert two.row == FLAT[1]
        assert three.problem.code == "not_squad"

    def test_rows_under_data_are_the_rows(self, tmp_path):
        assert read_rows(dump(tmp_path / "rows.json", {"version": 1, "data": ROWS})) == ROWS

    def test_lists_named_for_splits_are_splits(self, tmp_path):
        path = dump(tmp_path / "rows.json", {"train": ROWS, "dev": ROWS[:1]})
        assert read_splits(path) == {"train": ROWS, "validation": ROWS[:1]}
        assert read_rows(path, split="validation") == read_rows(path, split="dev") == ROWS[:1]
        with pytest.raises(DataError, match="no split 'test'"):
            read_rows(path, split="test")

    def test_squad_inside_of_splits_is_flattened(self, tmp_path):
        path = dump(tmp_path / "squad.json", {"train": QUESTIONS, "test": QUESTIONS["data"]})
        assert read_splits(path) == {"train": FLAT, "test": FLAT}

    def test_one_object_per_line_under_the_name_json_is_read(self, tmp_path):
        (tmp_path / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        assert read_rows(tmp_path / "rows.json") == ROWS

    @pytest.mark.parametrize("ending", ["", "{]", '{"a": 1} {"a": 2}]', '{"a": 1},]', '{"a": 1}] 7', '{"a": 1}, '])
    def test_a_list_that_breaks_off_gives_the_rows_before_it(self, tmp_path, ending):
        (tmp_path / "rows.json").write_text(f'[{json.dumps(ROWS[0])},\n{{"a": 0}},\n{ending}')
        found = list(stream_rows(tmp_path / "rows.json"))
        assert [one.row for one in found[:2]] == [ROWS[0], {"a": 0}]
        assert found[-1].problem.code == "broken_json"
        with pytest.raises(ValueError):
            json.loads((tmp_path / "rows.json").read_text())

    def test_the_element_with_broken_bytes_is_the_problem(self, tmp_path):
        (tmp_path / "rows.json").write_bytes(b'[{"a": "x"},\n {"a":\n "\xff"},\n {"a": "y"}, 7]')
        found = list(stream_rows(tmp_path / "rows.json"))
        assert [one.row for one in found] == [{"a": "x"}, None, {"a": "y"}, None]
        assert found[3].problem.code == "not_an_object"
        assert (found[1].problem.code, found[1].line) == ("broken_encoding", 2)


class TestFolders:
    def test_texts_by_label_are_rows_with_their_file(self, tmp_path):
        fill(tmp_path, "pos/a.txt", "neg/b.txt", "pos/deep/c.txt", ".hidden/x.txt", "pos/.DS_Store")
        assert read_rows(tmp_path) == [
            {"text": name, "label": name[:3], "file": str(tmp_path / name)}
            for name in ("neg/b.txt", "pos/a.txt", "pos/deep/c.txt")
        ]

    def test_a_flat_folder_of_texts_has_no_labels(self, tmp_path):
        fill(tmp_path, "b.txt", "a.txt")
        assert read_rows(tmp_path) == [{"text": name, "file": str(tmp_path / name)} for name in ("a.txt", "b.txt")]

    @pytest.mark.parametrize(
        ("kind", "endings"), [("image", "png jpg jpeg webp bmp gif PNG"), ("audio", "wav flac ogg mp3")]
    )
    def test_images_and_sounds_are_paths_with_their_label(self, tmp_path, kind, endings):
        names = [f"cat/{number}.{ending}" for number, ending in enumerate(endings.split())]
        fill(tmp_path, *names, "cat/README.txt", "dog/0.txt")
        assert read_rows(tmp_path) == [{kind: str(tmp_path / name), "label": "cat"} for name in names]

    def test_folders_named_for_splits_are_splits(self, tmp_path):
        fill(tmp_path, "train/pos/a.txt", "valid/neg/b.txt", "test/neg/c.txt", "README.md")
        found = read_splits(tmp_path)
        assert {name: [row["text"] for row in rows] for name, rows in found.items()} == {
            "train": ["train/pos/a.txt"],
            "validation": ["valid/neg/b.txt"],
            "test": ["test/neg/c.txt"],
        }
        assert read_rows(tmp_path, split="validation")[0]["label"] == "neg"

    def test_a_label_that_is_called_train_makes_no_split(self, tmp_path):
        fill(tmp_path, "train/1.png", "bus/2.png")
        assert [row["label"] for row in read_rows(tmp_path)] == ["bus", "train"]

    def test_files_named_for_splits_are_splits(self, tmp_path):
        dump(tmp_path / "train-00000-of-00002.json", ROWS)
        dump(tmp_path / "train-00001-of-00002.json", ROWS[:1])
        dump(tmp_path / "dev.json", ROWS[1:])
        (tmp_path / "test.csv").write_text("text,label\nx,pos\n")
        assert read_splits(tmp_path) == {
            "train": [*ROWS, ROWS[0]],
            "validation": ROWS[1:],
            "test": [{"text": "x", "label": "pos"}],
        }
        numbers = [(one.number, one.position) for one in stream_rows(tmp_path)]
        assert [number for number, _ in numbers] == [1, 2, 3]
        assert numbers[-1][1] == size_bytes(tmp_path)

    def test_images_and_sounds_in_one_folder_are_refused(self, tmp_path):
        with pytest.raises(DataError, match="both images and sounds"):
            read_rows(fill(tmp_path, "a/1.png", "a/1.wav"))

    def test_a_text_with_broken_bytes_is_a_problem_that_names_its_file(self, tmp_path):
        fill(tmp_path, "a/1.txt", "a/3.txt")
        (tmp_path / "a" / "2.txt").write_bytes(b"caf\xe9")
        found = list(stream_rows(tmp_path))
        assert [one.problem and one.problem.code for one in found] == [None, "broken_encoding", None]
        assert "2.txt" in found[1].problem.found


class TestTables:
    @pytest.mark.parametrize("layout", ["file", "stream", "feather"])
    def test_arrow_files_and_streams_are_read_by_batches(self, tmp_path, layout):
        table = pyarrow.Table.from_pylist([{"n": number, "tokens": ["a"] * (number % 3)} for number in range(3000)])
        path = tmp_path / ("rows.feather" if layout == "feather" else "rows.arrow")
        if layout == "feather":
            feather.write_feather(table, path)
        else:
            maker = ipc.new_file if layout == "file" else ipc.new_stream
            with maker(path, table.schema) as writer:
                writer.write_table(table, max_chunksize=700)
        found = list(stream_rows(path))
        assert [one.row for one in found] == table.to_pylist()
        positions = [one.position for one in found]
        assert positions == sorted(positions)
        assert 0 < positions[-1] <= size_bytes(path)

    @pytest.mark.parametrize("name", ["rows.arrow", "rows.feather", "rows.parquet"])
    def test_a_damaged_table_is_refused(self, tmp_path, name):
        (tmp_path / name).write_bytes(b"ARROW1 and more")
        with pytest.raises(DataError, match="is damaged"):
            read_rows(tmp_path / name)

    def test_the_position_in_a_parquet_file_grows_to_its_size(self, tmp_path):
        path = tmp_path / "rows.parquet"
        datasets.Dataset.from_list([{"n": number} for number in range(2500)]).to_parquet(path)
        found = list(stream_rows(path))
        assert [one.number for one in found] == list(range(1, 2501))
        assert 0 < found[0].position < found[-1].position == size_bytes(path)


class TestPacked:
    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("rows.jsonl.gz", "".join(json.dumps(row) + "\n" for row in ROWS)),
            ("rows.json.gz", json.dumps(ROWS)),
            ("rows.csv.gz", "text,label\ncafé,pos\nno,neg\n"),
            ("rows.tsv.GZ", "text\tlabel\ncafé\tpos\nno\tneg\n"),
        ],
    )
    def test_packed_files_give_the_same_rows(self, tmp_path, name, text):
        (tmp_path / name).write_bytes(gzip.compress(text.encode()))
        assert read_rows(tmp_path / name) == ROWS

    DAMAGED: ClassVar = {
        "no archive": b"text,label\n",
        "cut short": gzip.compress(b"text,label\n" * 500, mtime=0)[:-20],
    }

    @pytest.mark.parametrize("content", DAMAGED.values(), ids=list(DAMAGED))
    def test_a_damaged_one_is_refused(self, tmp_path, content):
        (tmp_path / "rows.csv.gz").write_bytes(content)
        with pytest.raises(DataError, match=r"rows.csv.gz is damaged"):
            read_rows(tmp_path / "rows.csv.gz")

    def test_a_packed_table_is_of_no_kind(self, tmp_path):
        (tmp_path / "rows.parquet.gz").write_bytes(b"x")
        with pytest.raises(DataError, match="no kind that is read"):
            read_rows(tmp_path / "rows.parquet.gz")


class TestMemory:
    def test_lists_columns_and_frames_give_the_same_rows(self):
        columns = {name: [row[name] for row in ROWS] for name in ROWS[0]}
        for source in (ROWS, tuple(ROWS), columns, pandas.DataFrame(ROWS), datasets.Dataset.from_list(ROWS)):
            assert read_rows(source) == ROWS
            assert size_bytes(source) == 0

    def test_a_missing_cell_of_a_frame_is_none(self):
        frame = pandas.DataFrame(
            {
                "text": ["a", None, np.nan],
                "stars": [1.5, np.nan, 2.0],
                "count": pandas.array([1, None, 3], dtype="Int64"),
                "when": [pandas.NaT, pandas.NaT, pandas.NaT],
                "tokens": [["a"], [], None],
            },
            index=[7, 7, 9],
        )
        assert read_rows(frame) == [
            {"text": "a", "stars": 1.5, "count": 1, "when": None, "tokens": ["a"]},
            {"text": None, "stars": None, "count": None, "when": None, "tokens": []},
            {"text": None, "stars": 2.0, "count": 3, "when": None, "tokens": None},
        ]

    def test_numbers_of_a_frame_are_python_s(self):
        (row,) = read_rows(pandas.DataFrame({"a": np.array([1], np.int32), "b": np.array([2.0], np.float32)}))
        assert [type(value) for value in row.values()] == [int, float]

    def test_splits_in_memory_are_splits(self):
        part = datasets.Dataset.from_list(ROWS)
        for source in (
            datasets.DatasetDict({"train": part, "valid": part.select([0])}),
            {"train": ROWS, "valid": ROWS[:1]},
            {"train": pandas.DataFrame(ROWS), "valid": part.select([0])},
        ):
            assert read_splits(source) == {"train": ROWS, "validation": ROWS[:1]}
            assert read_rows(source, split="valid") == ROWS[:1]

    def test_a_source_without_splits_is_all_training_rows(self):
        assert read_splits(ROWS) == {"train": ROWS}

    def test_splits_with_names_of_their_own_keep_them(self):
        part = datasets.Dataset.from_list(ROWS)
        source = datasets.DatasetDict({"train": part, "val": part, "dev": part, "extra": part})
        assert list(read_splits(source)) == ["train", "val", "dev", "extra"]

    def test_a_streamed_data_set_is_read(self):
        assert read_rows(datasets.Dataset.from_list(ROWS).to_iterable_dataset()) == ROWS

    def test_images_of_a_data_set_stay_as_they_are_stored(self):
        data = datasets.Dataset.from_list([{"image": {"bytes": b"x", "path": None}}])
        data = data.cast_column("image", datasets.Image())
        assert read_rows(data) == [{"image": {"bytes": b"x", "path": None}}]

    @pytest.mark.parametrize(
        ("source", "found"),
        [
            ({"a": [1], "b": [1, 2]}, "different lengths"),
            ([], "holds no rows"),
            ([ROWS[0], "text"], "the data: row 2 is not an object but 'text'"),
            (7, "the data is a int"),
            (pandas.DataFrame([[1, 2]], columns=["a", "a"]), "names 'a' twice"),
        ],
    )
    def test_what_holds_no_rows_is_refused(self, source, found):
        with pytest.raises(DataError, match=found):
            read_rows(source)
