"""Two readings of the same rows agree, and of no others."""

from __future__ import annotations

import datetime
import decimal
import json

import numpy
import pyarrow
import pyarrow.parquet
import pytest

from rlhf_ray.config.data import DatasetConfig
from rlhf_ray.data.cleaning import CleaningReport, fingerprints_of
from rlhf_ray.data.datasets import load_supervised
from rlhf_ray.data.fingerprint import Fingerprint, fingerprint_of_template
from rlhf_ray.data.prompts import load_prompts
from rlhf_ray.data.rows import read_rows
from rlhf_ray.errors import DataError
from rlhf_ray.models.tokenizers import char_tokenizer

DATED = "{{ strftime_now('%d %m %Y') }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
ROWS = [{"prompt": "two", "answer": "2"}, {"prompt": "three", "answer": "3"}]


def of(*rows) -> str:
    found = Fingerprint()
    for row in rows:
        found.add(row, "x:1")
    return found.value


def test_content_and_order_of_rows_count_and_the_order_of_columns_does_not():
    assert of(*ROWS).startswith("2 rows ")
    assert of(*ROWS) == of({"answer": "2", "prompt": "two"}, ROWS[1])
    changed, wider = [ROWS[0], {**ROWS[1], "answer": "4"}], [{**ROWS[0], "x": None}, ROWS[1]]
    others = [ROWS[::-1], changed, ROWS[:1], [*ROWS, ROWS[1]], wider]
    assert len({of(*rows) for rows in [ROWS, *others]}) == 6


def test_a_number_is_not_its_text_and_two_rows_are_not_one():
    assert of({"a": 1}) != of({"a": "1"}) != of({"a": 1.0})
    assert of({"a": "1"}, {"b": "2"}) != of({"a": "1", "b": "2"})


def test_what_json_has_no_word_for(tmp_path):
    class Picture:
        """Prints its address, as many objects do."""

    day = datetime.date(2024, 2, 29)
    row = {"x": b"\xff\x00", "day": day, "price": decimal.Decimal("1.50"), "array": numpy.arange(3), "at": Picture()}
    again = {**row, "array": numpy.arange(3), "at": Picture()}
    assert of({**row, 5: 1}) == of({**again, 5: 1}) != of(row)
    assert of(row) == of(again)
    for name, other in [("x", b"\xff\x01"), ("day", day.replace(day=28)), ("array", numpy.arange(1, 4))]:
        assert of({**row, name: other}) != of(row)
    table = pyarrow.table({"bytes": [b"\x01"], "day": [day], "words": [["a", "b"]]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    (read,) = read_rows(str(tmp_path / "rows.parquet"))
    assert of(read.fields) == of({"bytes": b"\x01", "day": day, "words": ["a", "b"]})


def test_a_row_that_is_too_deep_is_named():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(DataError, match=r"x:1: nested too deeply"):
        of({"a": deep})


def test_prompts_are_known_by_their_rows_and_not_by_what_a_template_makes_of_them(write):
    tokenizer = char_tokenizer("abcdefghijklmnopqrstuvwxyz0123456789 []")
    source = write(*ROWS)
    plain = load_prompts(source, tokenizer)
    tokenizer.chat_template = DATED
    dated = [
        load_prompts(source, tokenizer, template="chat", clock=datetime.datetime(2024, 2, day)) for day in (28, 29)
    ]
    assert [prompts.examples[0].prompt for prompts in dated] == ["28 02 2024[user]two", "29 02 2024[user]two"]
    assert plain.read == dated[0].read == dated[1].read == of(*ROWS)
    assert plain.slice(0, 1).read == plain.read
    assert load_prompts(source, tokenizer, limit=1).read == of(ROWS[0]), "what is not read does not count"


def test_a_supervised_source_says_what_it_has_read(write):
    tokenizer, reports = char_tokenizer("abcdefghijklmnopqrstuvwxyz0123456789 []"), []
    rows = [{"prompt": row["prompt"], "completion": row["answer"]} for row in ROWS]
    rows.append(rows[0])  # left out as a duplicate, and a row all the same
    held_out = write({"prompt": "four", "completion": "4"}, name="held.jsonl")
    data = DatasetConfig(path=write(*rows), eval_path=held_out)
    load_supervised(data, tokenizer, seed=0, on_report=reports.append)
    assert [report.read for report in reports] == [of(*rows), of({"prompt": "four", "completion": "4"})]


def test_a_templates_fingerprint_is_of_its_text_and_not_of_its_ends_of_lines():
    texts = ["{{ a }}\n{{ b }}", "{{ a }}\r\n{{ b }}", "{{ a }}{{ b }}", {"default": "{{ a }}"}, None]
    one, other, *rest = map(fingerprint_of_template, texts)
    assert one == other and len({one, *rest}) == 4


def test_two_readings_of_one_source_are_two_fingerprints():
    reports = [CleaningReport(name, 1, 1, {}, read=read) for name, read in (("a", "1"), ("b", "2"), ("a", "3"))]
    assert fingerprints_of(reports) == {"a": "1", "b": "2", "a, reading 2": "3"}


def test_llama_takes_its_date_from_the_clock_and_a_date_of_ones_own_goes_before_it(write):
    """As Llama 3.1 writes it: `date_string` where it is given, else today's."""
    tokenizer = char_tokenizer("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 :")
    tokenizer.chat_template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "Today Date: {{ date_string }} {% for m in messages %}{{ m.content }}{% endfor %}"
    )
    source = write({"prompt": [{"role": "user", "content": "hi"}]})
    moment = datetime.datetime(2031, 7, 1, 23, 59)
    (example,) = load_prompts(source, tokenizer, clock=moment).examples
    assert example.prompt == "Today Date: 01 Jul 2031 hi"
    (example,) = load_prompts(source, tokenizer, clock=moment, chat_template_args={"date_string": "now"}).examples
    assert example.prompt == "Today Date: now hi"
    (example,) = load_prompts(source, tokenizer).examples
    assert json.dumps(datetime.datetime.now().year) in example.prompt, "without a clock it is today"
