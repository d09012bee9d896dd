from __future__ import annotations

import gzip
import json
import os
import pickle
import struct

import pyarrow
import pyarrow.parquet
import pytest

from rlhf_ray.data.paths import looks_local
from rlhf_ray.data.rows import read_rows
from rlhf_ray.data.values import without_padding
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


# ---- JSON: the contents decide, not the suffix -------------------------------------------------------------

LAKES = [{"lake": "Inari"}, {"lake": "Saimaa", "depth": {"max": 86}}]


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (json.dumps(LAKES), ["1", "1"]),
        (json.dumps(LAKES, indent=2), ["2", "5"]),
        ("\n\n[\n" + ",\n".join(map(json.dumps, LAKES)) + "\n]\n", ["4", "5"]),
        ("\n".join(map(json.dumps, LAKES)), ["1", "2"]),
        (json.dumps({"version": 1, "data": LAKES, "more": {}}), ["1", "1"]),
        (json.dumps({"version": 1, "data": LAKES, "more": {}}, indent=1), ["4", "7"]),
        ('{"version": 1,\n"data": [\n' + ",\n".join(map(json.dumps, LAKES)) + "]}", ["3", "4"]),
    ],
)
def test_json_of_many_shapes_gives_the_same_rows(tmp_path, suffix, text, lines):
    file = tmp_path / f"lakes.{suffix}"
    file.write_text(text)
    assert rows_of(file) == list(zip(LAKES, lines, strict=True))


def test_a_single_object_is_a_row_and_an_empty_array_none(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('{\n "lake": "Inari"\n}')
    assert rows_of(file) == [({"lake": "Inari"}, "1")]
    file.write_text('{"data": ["a text"]}')
    assert rows_of(file) == [({"data": ["a text"]}, "1")], "no rows under data: it is a column"
    file.write_text('{"data": [{"x": 1}]}\n{"data": [{"x": 2}]}\n')
    assert [where for _, where in rows_of(file)] == ["1", "2"]
    for empty in ("[]", "[\n]", "", "\n"):
        file.write_text(empty)
        assert rows_of(file) == []


def complaints(path, **options):
    bad = []
    good = [row.where for row in read_rows(str(path), on_bad=lambda error: bad.append(str(error)), **options)]
    return good, bad


def test_a_broken_array_is_one_complaint_with_its_line(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('[\n{"a": 1},\n"text",\n{"a": 2},\n{"a": 3,}\n,{"a": 4}]')
    good, bad = complaints(file)
    assert good == [f"{file}:2", f"{file}:4"]
    assert bad[0] == f"{file}:3: a JSON str, not an object; an array must hold one a row"
    assert len(bad) == 2 and bad[1].startswith(f"{file}:5: broken JSON (")
    for text, line in (('[{"a": 1}\n{"a": 2}]', 2), ('[{"a": 1},\n', 2), ('[{"a": 1}] x', 1), ("[\n{} ]\n[]", 3)):
        file.write_text(text)
        assert complaints(file)[1][0].startswith(f"{file}:{line}: broken JSON"), text
    file.write_bytes(b'[\n{"a": "\xff"}]')
    good, (bad,) = complaints(file)
    assert good == [] and bad.startswith(f"{file}:2: not UTF-8 (invalid start byte); save the file as UTF-8")


def test_a_key_that_comes_twice_and_a_number_too_long_are_bad_rows(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": 1}\n{"a": {"b": 1, "b": 2}}\n{"a": ' + "9" * 5000 + "}\n")
    good, bad = complaints(file)
    assert good == [f"{file}:1"] and len(bad) == 2
    assert f"{file}:2: broken JSON (the key 'b' comes twice in one object)" in bad[0]
    assert bad[1].startswith(f"{file}:3: broken JSON (Exceeds the limit")


# ---- CSV, TSV, gzip ----------------------------------------------------------------------------------------


def test_tsv(tmp_path):
    file = tmp_path / "a.tsv"
    file.write_text('prompt\tanswer\na, b\tc\n"tab\there"\td\n')
    assert rows_of(file) == [({"prompt": "a, b", "answer": "c"}, "2"), ({"prompt": "tab\there", "answer": "d"}, "3")]
    file.write_text('prompt\tanswer\na\tb\n"c"d\te\nf\tg\n')
    assert complaints(file)[1][0].startswith(f"{file}:3: broken from here on")
    file.write_text('prompt\tanswer\n"never closed\tb\nc\td\n')
    with pytest.raises(DataError, match=r"a\.tsv:2: broken from here on .*cells that hold tabs"):
        rows_of(file)


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ("prompt,answer,prompt", "the column 'prompt' comes twice"),
        ("prompt;answer", "separated by ';'"),
        ("prompt\tanswer", r"separated by '\\t'"),
    ],
)
def test_a_header_that_would_lose_a_column_is_refused(tmp_path, header, says):
    file = tmp_path / "a.csv"
    file.write_text(f"{header}\n1,2,3\n")
    with pytest.raises(DataError, match=rf"a\.csv:1: .*{says}"):
        rows_of(file)


@pytest.mark.parametrize(
    ("suffix", "text", "rows"),
    [
        ("jsonl", '{"a": "x"}\n\n{"a": "y"}', [({"a": "x"}, "1"), ({"a": "y"}, "3")]),
        ("json", '[{"a": "x"},\n{"a": "y"}]', [({"a": "x"}, "1"), ({"a": "y"}, "2")]),
        ("csv", "a\nx\ny\n", [({"a": "x"}, "2"), ({"a": "y"}, "3")]),
        ("tsv", "a\tb\nx\ty\n", [({"a": "x", "b": "y"}, "2")]),
        ("txt", "x\n\ny\n", [({"text": "x"}, "1"), ({"text": "y"}, "3")]),
    ],
)
def test_gzip_of_each(tmp_path, suffix, text, rows):
    file = tmp_path / f"a.{suffix}.gz"
    file.write_bytes(gzip.compress(text.encode()))
    assert rows_of(file) == rows
    file.write_bytes(gzip.compress(text.encode() * 100)[:-20])
    assert "broken gzip data" in complaints(file)[1][-1]
    file.write_text(text)
    assert complaints(file) == ([], [f"{file}: broken gzip data (Not a gzipped file ({text[:2].encode()!r})); the file "
                                     "is cut off or was never packed: fetch or pack it again"])  # fmt: skip


# ---- tables ------------------------------------------------------------------------------------------------

CALLS = [
    {"messages": [{"role": "user", "content": "Weather?"},
                  {"role": "assistant", "content": None, "tool_calls": [{"name": "w", "arguments": {"at": "Oslo"}}]}]},
    {"messages": [{"role": "user", "content": "Root?"},
                  {"role": "assistant", "content": None, "tool_calls": [{"name": "r", "arguments": {"of": 9}},
                                                                        {"name": "now", "arguments": {}}]}],
     "tools": '[{"name": "r"}]'},
]  # fmt: skip


def _schema_of(rows):
    """With every field of every row, as pyarrow's own inference of nested structs has it."""
    messages = pyarrow.array([row["messages"] for row in rows]).type
    return pyarrow.schema({"messages": messages, "tools": pyarrow.string()})


def test_a_table_gives_the_rows_that_were_put_in(tmp_path):
    import datasets

    table = pyarrow.Table.from_pylist(CALLS, schema=_schema_of(CALLS))
    schema = table.schema
    assert table.to_pylist()[0]["messages"][1]["tool_calls"][0]["arguments"] == {"at": "Oslo", "of": None}
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.ipc.new_file(tmp_path / "b.arrow", schema) as sink:
        sink.write_table(table)
    with pyarrow.ipc.new_stream(tmp_path / "c.arrow", schema) as sink:
        sink.write_table(table)
    for name in ("a.parquet", "b.arrow", "c.arrow"):
        assert rows_of(tmp_path / name) == [(CALLS[0], "1"), (CALLS[1], "2")], name
    saved = datasets.Dataset(table)
    saved.save_to_disk(tmp_path / "one")
    assert rows_of(tmp_path / "one") == [(CALLS[0], "0"), (CALLS[1], "1")]
    datasets.DatasetDict({"train": saved, "test": saved.select([1])}).save_to_disk(tmp_path / "splits")
    (row,) = read_rows(str(tmp_path / "splits"), split="test")
    assert (row.fields, row.where) == (CALLS[1], f"{tmp_path}/splits/test:0")
    with pytest.raises(DataError, match=r"splits: it has no split 'validation'; it has 'train', 'test'"):
        list(read_rows(str(tmp_path / "splits"), split="validation"))
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(DataError, match="one: cannot load this folder of save_to_disk"):
        rows_of(tmp_path / "one")


def test_what_spreadsheets_and_pandas_leave_in_a_header(tmp_path):
    file = tmp_path / "a.csv"
    file.write_bytes(b"\xef\xbb\xbf,prompt, completion ,,\r\n0,a, b,,\r\n1,c,d,x,\r\n")
    named = {"column 1": "0", "prompt": "a", "completion": " b", "column 4": "", "column 5": ""}
    second = {"column 1": "1", "prompt": "c", "completion": "d", "column 4": "x", "column 5": ""}
    assert rows_of(file) == [(named, "2"), (second, "3")]
    for mark in ("sep=,", "sep=;", "SEP=\t"):
        file.write_text(f"{mark}\nprompt,completion\na,b\n")
        with pytest.raises(DataError, match=r"a\.csv:1: this line is Excel's mark of the separator, not a header"):
            rows_of(file)
    file.write_text("a, a\n1,2\n")
    with pytest.raises(DataError, match="the column 'a' comes twice"):
        rows_of(file)
    file.write_bytes("prompt,completion\na,b\n你,好\n".encode("gbk"))
    with pytest.raises(DataError, match=r"a\.csv:3: not UTF-8 .*; save the file as UTF-8 \(.*iconv -f GBK"):
        rows_of(file)


@pytest.mark.parametrize("offset", [3000, -1, 9])
def test_a_damaged_table_is_refused_not_read_from_elsewhere(tmp_path, offset):
    """The texts abc, defgh, ij end at 3, 8 and 10; an end beyond the next, or the last, is another's memory."""
    table = pyarrow.table({"text": ["abc", "defgh", "ij"]})
    for name, write in (("file", pyarrow.ipc.new_file), ("stream", pyarrow.ipc.new_stream)):
        path = tmp_path / f"{name}.arrow"
        with write(path, table.schema) as sink:
            sink.write_table(table)
        assert [fields["text"] for fields, _ in rows_of(path)] == ["abc", "defgh", "ij"]
        ends, damaged = (struct.pack("<4i", 0, first, 8, 10) for first in (3, offset))
        assert path.read_bytes().count(ends) == 1
        path.write_bytes(path.read_bytes().replace(ends, damaged))
        with pytest.raises(DataError, match=rf"{name}\.arrow: not a readable Arrow file"):
            rows_of(path)


def test_only_the_content_of_a_message_may_be_none():
    padded = {"role": "tool", "content": None, "name": None, "parts": [{"content": None, "text": "x"}, None]}
    assert without_padding(padded) == {"role": "tool", "content": None, "parts": [{"text": "x"}, None]}


# ---- files, folders and the Hub ----------------------------------------------------------------------------


@pytest.fixture
def no_hub(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("the Hub was asked"))


@pytest.mark.parametrize(
    "source",
    ["data/train.jsonlines", "data/train.jsonl", "../x", "./x", "~/nobody/x", "/nowhere/x", "here/bar.tsv", "rows.xlsx",
     "a/b/c", "name/", "rows\\train.jsonl", "owner/rows.jsnol", "x.unknown", "here/train", "here"],
)  # fmt: skip
def test_what_looks_local_is_never_asked_of_the_hub(tmp_path, monkeypatch, no_hub, source):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(DataError):
        list(read_rows(source))


def test_names_of_the_hub_are_no_local_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("imdb", "openai/gsm8k", "openai/gsm8k:main", "Skywork/Reward-80K-v0.2", "nvidia/Llama-3.1-data",
                 "owner/rows.v2", "wikimedia/wikipedia:20231101.en.x"):  # fmt: skip
        assert not looks_local(name.partition(":")[0]), name


def test_a_hub_name_that_looks_like_a_file(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda name, subset, split: [{"asked": [name, subset, split]}])
    (row,) = read_rows("hf://datasets/owner/c4.en:sub", split="test")
    assert row.fields == {"asked": ["owner/c4.en", "sub", "test"]}


def test_what_is_there_instead_is_said(tmp_path, no_hub):
    for name in ("train.jsonl", "test.csv", "notes.md", ".hidden.jsonl"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=rf"tran.jsonl: no such file; did you mean {tmp_path}/train.jsonl"):
        rows_of(tmp_path / "tran.jsonl")
    with pytest.raises(DataError, match=rf"no such file; in {tmp_path} there are test.csv, train.jsonl; give"):
        rows_of(tmp_path / "zzz")
    with pytest.raises(DataError, match=rf"no such file: there is no folder {tmp_path}/deeper"):
        rows_of(tmp_path / "deeper" / "train.jsonl")
    for name, advice in (("a.xlsx", "save the sheet as .csv"), ("a.zip", "unpack it"), ("a.gz", "rows.jsonl.gz"),
                         ("a.md", "write it as one of these"), ("rows", "write it as one of these")):  # fmt: skip
        (tmp_path / name).touch()
        with pytest.raises(DataError, match=rf"{name}: files of this kind are not read .*; .*{advice}"):
            rows_of(tmp_path / name)


def test_a_folder_of_files_is_read_by_split(tmp_path, no_hub):
    folder = tmp_path / "rows"
    (folder / "data").mkdir(parents=True)
    with pytest.raises(DataError, match="rows: a folder without data files"):
        rows_of(folder)
    for name in ("train-00001-of-00002", "train-00000-of-00002", "test-00000-of-00001"):
        (folder / "data" / f"{name}.jsonl").write_text(f'{{"from": "{name}"}}\n')
    (folder / "README.md").touch()
    assert [row.where.removeprefix(str(folder)) for row in read_rows(str(folder))] == [
        "/data/train-00000-of-00002.jsonl:1", "/data/train-00001-of-00002.jsonl:1",
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"without a file for the split 'val' .*test-00000-of-00001.jsonl, train-"):
        list(read_rows(str(folder), split="val"))
    (folder / "data" / "train.csv").write_text("a\nb\n")
    with pytest.raises(DataError, match="of 2 kinds; name one file"):
        rows_of(folder)


def test_the_real_files(shared_data):
    for name, count, field in [("gsm8k.test", 600, "question"), ("hh_harmless.test", 400, "chosen")]:
        file = shared_data / f"{name}.jsonl"
        rows = list(read_rows(str(file)))
        assert len(rows) == count and rows[-1].where == f"{file}:{count}"
        assert rows[-1].fields[field] == json.loads(file.read_text().splitlines()[-1])[field]


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_the_line_of_a_csv_file_that_is_not_utf8_is_named(tmp_path, name):
    text = b"prompt\n" + b"yes\n" * 5000 + b"\xff\n" + b"no\n"
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    with pytest.raises(DataError, match=rf"{name}:5002: not UTF-8"):
        list(read_rows(str(tmp_path / name)))


def test_a_row_that_names_a_file_or_a_url_as_its_image_opens_neither(tmp_path):
    """Decoding an image of a Hub dataset reads whatever its row names."""
    datasets = pytest.importorskip("datasets")
    secret = tmp_path / "secret.png"
    rows = {
        "prompt": ["a"],
        "image": [{"bytes": None, "path": str(secret)}],
        "images": [[{"bytes": None, "path": "http://127.0.0.1:9/x.png"}]],
        "inner": [[{"sound": {"bytes": None, "path": str(secret)}}]],
    }
    folder = tmp_path / "saved"
    media = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    columns = {"prompt": datasets.Value("string"), "image": media, "images": [media], "inner": [{"sound": media}]}
    datasets.Dataset.from_dict(rows, datasets.Features(columns)).save_to_disk(folder)
    told = json.loads((folder / "dataset_info.json").read_text())
    image, inner = {"_type": "Image"}, {"feature": {"sound": {"_type": "Audio"}}, "_type": "List"}
    told["features"] |= {"image": image, "images": {"feature": image, "_type": "List"}, "inner": inner}
    (folder / "dataset_info.json").write_text(json.dumps(told))
    secret.mkdir()  # to open it raises
    (row,) = read_rows(str(folder))
    assert row.fields["image"] == {"path": str(secret)} and row.fields["images"][0]["path"].startswith("http://")
    assert row.fields["inner"][0]["sound"]["path"] == str(secret)


@pytest.mark.parametrize("name", ["train.pkl", "train.pickle", "train.pt", "train.npy", "train.jsonl", "train.parquet"])
def test_a_pickle_is_not_loaded_whatever_it_is_called(tmp_path, name):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(DataError, match=name):
        list(read_rows(str(tmp_path / name)))
    with pytest.raises(DataError):
        list(read_rows(str(tmp_path)))
    assert not (tmp_path / "exploded").exists()
