from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from rlhf_ray.cli import app
from rlhf_ray.config.data import DatasetConfig
from rlhf_ray.data.validate import columns_from, validate
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.models.tokenizers import char_tokenizer

GOOD = b'{"prompt": "ab", "completion": "cd"}'
# line 2 is blank, 5 not JSON, 6 no object, 7 not UTF-8
MIXED = [
    GOOD, b"", GOOD, b'{"prompt": "ab"}', b'{"prompt": ', b"[1]", b'{"prompt": "\xff"}',
    b'{"prompt": "ab", "completion": ""}', b'{"prompt": "a", "completion": "b"}',
]  # fmt: skip


@pytest.fixture
def mixed(tmp_path):
    file = tmp_path / "mixed.jsonl"
    file.write_bytes(b"\n".join(MIXED))
    return str(file)


def test_every_bad_row_is_named_and_the_good_ones_are_counted(mixed):
    report = validate(DatasetConfig(path=mixed))
    assert [bad.where.removeprefix(mixed) for bad in report.bad] == [":4", ":5", ":6", ":7", ":8"]
    whys = [bad.why for bad in report.bad]
    for why, says in zip(
        whys, ("no field 'completion'", "broken JSON", "a JSON list", "not UTF-8", "'completion' is empty"), strict=True
    ):
        assert says in why
    assert (report.rows, report.types, report.is_good) == (8, {"prompt_completion": 3}, False)
    assert report.left_out == {"duplicate": 1}
    lines = str(report).splitlines()
    assert len(lines) == 7 and lines[0].startswith(f"{mixed}:4: no field 'completion'")
    assert lines[5] == f"{mixed}: 8 rows: 3 prompt_completion; 5 bad"


def test_a_csv_file_is_read_on_after_a_bad_row(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text('text,label\na,1\nb,2,3\nc,good\n"d",0\n')
    report = validate(DatasetConfig(path=str(file)))
    assert [bad.where for bad in report.bad] == [f"{file}:3", f"{file}:4"]
    assert report.types == {"labelled": 2}


def test_with_a_tokenizer_the_template_and_the_length_are_checked(write):
    tokenizer = char_tokenizer("abcd")
    rows = write({"messages": [{"role": "user", "content": "ab"}]}, {"messages": [{"role": "user", "content": "a"}]})
    report = validate(DatasetConfig(path=rows), tokenizer)
    assert len(report.bad) == 2 and "no chat template" in report.bad[0].why
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    report = validate(DatasetConfig(path=rows), tokenizer, max_length=1)
    assert [bad.why for bad in report.bad] == ["2 tokens, the limit is 1; shorten the row"]
    assert report.tokens == {"mean": 1.0, "max": 1.0}
    pairs = write({"prompt": "a", "chosen": "bc", "rejected": "b"}, name="pairs.jsonl")
    assert validate(DatasetConfig(path=pairs), tokenizer).tokens == {"mean": 3.5, "max": 4.0}


def test_a_file_without_rows_is_not_good(write):
    report = validate(DatasetConfig(path=write()))
    assert not report.is_good and "0 rows: none good; 0 bad" in str(report)


def test_columns_from_the_command_line():
    assert columns_from(["prompt=question", "completion=a=b"]) == {"prompt": "question", "completion": "a=b"}
    for wrong in ("prompt", "prompt=", "=x"):
        with pytest.raises(DataError, match="no role=column pair"):
            columns_from([wrong])


def run(*arguments):
    return CliRunner().invoke(app, ["validate-data", *arguments])


def test_the_command(mixed, write):
    found = run(mixed)
    assert found.exit_code == 1 and f"{mixed}:5: broken JSON" in found.output
    found = run(mixed, "--json")
    assert found.exit_code == 1
    assert json.loads(found.output)["bad"][0] == {
        "where": f"{mixed}:4",
        "why": "no field 'completion'; the row has 'prompt'; name another with data.columns (data.field for prompts), "
        "or mend the row",
    }
    good = write({"question": "a", "answer": "b"})
    found = run(good, "--column", "prompt=question", "--column", "completion=answer")
    assert found.exit_code == 0 and found.output == f"{good}: 1 rows: 1 prompt_completion; 0 bad\n"
    assert run(good, "--type", "prompt", "--column", "prompt=question").exit_code == 0


def test_the_command_reads_a_models_tokenizer(write, tmp_path):
    char_tokenizer("ab").save_pretrained(tmp_path / "model")
    found = run(write({"text": "ab"}), "--model", str(tmp_path / "model"))
    assert found.exit_code == 0 and "tokens a sequence: mean 3, max 3" in found.output


def test_a_wrong_option_is_told_with_the_right_ones(write):
    with pytest.raises(ConfigError, match=r"2 problems\n(.|\n)*'unpaired' or 'verl'(.|\n)*did you mean columns.prompt"):
        CliRunner().invoke(
            app, ["validate-data", write(), "--type", "promt", "--column", "promt=x"], catch_exceptions=False
        )


def test_real_dialogues(shared_data):
    source = str(shared_data / "hh_harmless.test.jsonl")
    report = validate(DatasetConfig(path=source))
    assert report.types == {"preference": 399} and [bad.where for bad in report.bad] == [f"{source}:159"]
    assert "field 'chosen' has no answer after the shared prompt" in report.bad[0].why
