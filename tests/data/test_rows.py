from __future__ import annotations

import json

import pyarrow
import pyarrow.parquet
import pytest

from rlhf_ray.data.rows import read_rows
from rlhf_ray.errors import DataError


def rows_of(path):
    return [(row.fields, row.where.rpartition(":")[2]) for row in read_rows(str(path))]


def test_jsonl_counts_blank_lines_and_knows_only_newlines(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "one"}\n\n{"prompt": "two\u2028still two"}\r\n', encoding="utf-8")
    assert rows_of(file) == [({"prompt": "one"}, "1"), ({"prompt": "two\u2028still two"}, "3")]


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"prompt": "one"}\n')
    assert rows_of(file) == [({"prompt": "one"}, "1")]


@pytest.mark.parametrize(
    ("line", "says"),
    [(b'{"prompt": "x"', "broken JSON"), (b'["x"]', "a JSON list"), (b'{"prompt": "\xff"}', "not UTF-8")],
)
def test_a_bad_jsonl_line_is_named(tmp_path, line, says):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(b'{"prompt": "fine"}\n' + line + b"\n")
    with pytest.raises(DataError, match=rf"bad\.jsonl:2: .*{says}"):
        rows_of(file)


def test_csv_with_commas_quotes_and_line_breaks(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text('prompt,answer\n"one, two","a\nb"\n"say ""hi""",c\n', encoding="utf-8")
    assert rows_of(file) == [
        ({"prompt": "one, two", "answer": "a\nb"}, "3"),  # the record ends on line 3
        ({"prompt": 'say "hi"', "answer": "c"}, "4"),
    ]


@pytest.mark.parametrize("line", ["only one", "one,two,three"])
def test_a_ragged_csv_row_is_named(tmp_path, line):
    file = tmp_path / "a.csv"
    file.write_text(f"prompt,answer\nx,y\n{line}\n")
    with pytest.raises(DataError, match=r"a\.csv:3: the number of cells differs from the header .2 columns"):
        rows_of(file)


def test_parquet(tmp_path):
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["x", "y"], "level": [1, 2]}), file)
    assert rows_of(file) == [({"prompt": "x", "level": 1}, "1"), ({"prompt": "y", "level": 2}, "2")]
    file.write_bytes(b"PAR1 this is none")
    with pytest.raises(DataError, match="not a readable parquet file"):
        rows_of(file)


def test_plain_text(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one\n\n  two\n")
    assert rows_of(file) == [({"text": "one"}, "1"), ({"text": "  two"}, "3")]


def test_missing_and_empty_sources(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        rows_of(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="not a data file"):
        rows_of(tmp_path / "folder")
    (tmp_path / "empty.csv").touch()
    with pytest.raises(DataError, match="first line must name the columns"):
        rows_of(tmp_path / "empty.csv")


def test_a_dataset_name_that_cannot_be_loaded():
    with pytest.raises(DataError, match="somebody/nothing: cannot load this Hugging Face dataset, split 'train'"):
        list(read_rows("somebody/nothing"))


def test_a_hub_dataset_by_name(monkeypatch):
    import datasets

    calls = []

    def load_dataset(name, subset, split):
        calls.append((name, subset, split))
        return [{"prompt": "x"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [row.fields for row in read_rows("owner/name:main", split="test")] == [{"prompt": "x"}]
    assert calls == [("owner/name", "main", "test")]


def test_the_real_files(shared_data):
    for name, count, field in [("gsm8k.test", 600, "question"), ("hh_harmless.test", 400, "chosen")]:
        file = shared_data / f"{name}.jsonl"
        rows = list(read_rows(str(file)))
        assert len(rows) == count and rows[-1].where == f"{file}:{count}"
        assert rows[-1].fields[field] == json.loads(file.read_text().splitlines()[-1])[field]
