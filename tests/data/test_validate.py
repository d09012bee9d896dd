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
    assert [bad.where.removeprefix(mixed) for bad in report.bad] == [":4", ":5", ":6", ":7"]
    whys = [bad.why for bad in report.bad]
    for why, says in zip(whys, ("no field 'completion'", "broken JSON", "a JSON list", "not UTF-8"), strict=True):
        assert says in why
    assert (report.rows, report.types, report.is_good) == (8, {"prompt_completion": 4}, False)
    assert report.left_out == {"duplicate": 1, "empty": 1}, "as training leaves them out: no mistake that stops it"
    assert [(note.where.removeprefix(mixed), note.why) for note in report.left_out_rows] == [
        (":3", "duplicate"), (":8", "empty")
    ]  # fmt: skip
    lines = str(report).splitlines()
    assert lines[0].startswith(f"{mixed}:4: no field 'completion'")
    assert lines[4:] == [
        f"{mixed}: 8 rows: 4 prompt_completion; 4 bad (as sft reads them)",
        "sft leaves out: 1 duplicate, 1 empty",
        f"  {mixed}:3: duplicate",
        f"  {mixed}:8: empty",
    ]


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
    assert [bad.why.partition(";")[0] for bad in report.bad] == ["the prompt has 2 tokens, the limit is 1"]
    assert report.tokens == {"mean": 1.0, "max": 1.0}
    pairs = write({"prompt": "a", "chosen": "bc", "rejected": "b"}, name="pairs.jsonl")
    assert validate(DatasetConfig(path=pairs), tokenizer, command="dpo").tokens == {"mean": 3.5, "max": 4.0}
    judged = validate(DatasetConfig(path=pairs), tokenizer, command="rm").tokens
    assert judged == {"mean": 2.5, "max": 3.0}, "a reward model reads a text without EOS"


def test_a_pair_is_one_example_of_two_sequences(write):
    rows = write(*({"prompt": "ab", "chosen": "a" * count, "rejected": "b"} for count in (1, 2, 3)))
    # chosen: 2 tokens of the prompt and 1 to 3; rejected: 2 and 1. A policy writes EOS behind them.
    for command, ends in (("rm", 0), ("dpo", 1)):
        report = validate(DatasetConfig(path=rows), char_tokenizer("abcd"), command=command)
        assert (report.rows, report.kept, report.types) == (3, 3, {"preference": 3})
        assert report.tokens == {"mean": (3 + 4 + 5 + 3 * 3) / 6 + ends, "max": 5.0 + ends}


BAD = {"chosen": "a", "rejected": None}


@pytest.mark.parametrize(
    ("good", "command", "whys"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "rm", ["none of the fields", "broken JSON"]),
        ({"prompt": [{"role": "user", "content": "a"}]}, "rl", ["none of the fields", "broken JSON"]),
        ({"text": "a", "label": 1}, "classifier", ["none of the fields", "broken JSON"]),
        ({"prompt": "a", "completion": "b"}, "sft", ["none of the fields", "broken JSON"]),
    ],
)
def test_bad_rows_at_the_beginning_do_not_say_what_the_others_are_for(tmp_path, good, command, whys):
    file = tmp_path / "late.jsonl"
    file.write_text("".join([json.dumps(BAD) + "\n", "{\n", json.dumps(good) + "\n", json.dumps(good) + "\n"]))
    report = validate(DatasetConfig(path=str(file)))
    assert report.command == command and sum(report.types.values()) == 2
    assert [note.where for note in report.bad] == [f"{file}:1", f"{file}:2"], "in the order of the file"
    assert all(says in note.why for note, says in zip(report.bad, whys, strict=True))


def test_a_file_without_rows_is_not_good(write):
    report = validate(DatasetConfig(path=write()))
    assert not report.is_good and "0 rows: none good; 0 bad" in str(report)


def test_columns_from_the_command_line():
    assert columns_from(["prompt=question", "completion=a=b"]) == {"prompt": "question", "completion": "a=b"}
    for wrong in ("prompt", "prompt=", "=x"):
        with pytest.raises(DataError, match="no role=column pair"):
            columns_from([wrong])


PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
ASK = {"role": "user", "content": "ab"}
SAY = {"role": "assistant", "content": "cd"}
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("row", "command"),
    [
        (PAIR, "rm"),
        ({"prompt": "a", "completions": ["b", "c"]}, "rm"),
        ({"prompt": "a"}, "rl"),
        ({"messages": [ASK]}, "rl"),
        ({"instruction": "a"}, "rl"),
        ({"instruction": "a", "output": "b"}, "sft"),
        ({"messages": [ASK, SAY]}, "sft"),
        ({"text": "a", "label": 1}, "classifier"),
        ({"text": "a"}, "sft"),
        ({"prompt": "a", "completion": "b", "label": 1}, "sft"),
    ],
)
def test_a_type_is_checked_for_the_command_that_it_suits(write, row, command):
    report = validate(DatasetConfig(path=write(row)))
    assert (report.command, report.is_good) == (command, True)


def test_a_row_may_be_right_for_one_command_and_useless_for_another(write):
    data = DatasetConfig(path=write({"prompt": "a", "completion": "b"}, {"prompt": "b", "completion": 3}))
    assert ["of type int" in bad.why for bad in validate(data, command="sft").bad] == [True]
    first, second = (bad.why for bad in validate(data, command="rm").bad)
    assert "no pair of answers" in first and "of type int" in second
    assert validate(data, command="rl").is_good, "an answer is for the rewards to read"
    assert len(validate(data, command="classifier").bad) == 2
    good = DatasetConfig(path=write(PAIR, {**PAIR, "rejected": "b"}, name="pairs.jsonl"))
    report = validate(good, command="dpo")
    assert report.is_good and report.left_out == {"identical answers": 1}


def test_labelled_answers_are_for_kto(write):
    data = DatasetConfig(path=write({"prompt": "a", "completion": "b", "label": 0}, {"prompt": "b", "completion": "a"}))
    report = validate(data, char_tokenizer("ab"), command="kto")
    assert ["no field 'label'" in bad.why for bad in report.bad] == [True] and report.kept == 1
    assert [sequence.name for sequence in report.shown.sequences] == ["bad"]
    told = validate(data, command="dpo").bad[0].why
    assert told.endswith("(single answers with a label: dpo with dpo.kind=kto)")


def test_rows_that_are_all_left_out_are_not_good(write):
    report = validate(DatasetConfig(path=write({"prompt": "a", "completion": "b", "label": 0})))
    assert not report.bad and not report.is_good and "sft would have no row to learn from" in str(report)


def test_a_complaint_is_repeated_five_times_and_counted(write):
    rows = [{"prompt": "a", "completion": number} for number in range(9)] + [{"prompt": [], "completion": "b"}]
    source = write({"prompt": "a", "completion": "b"}, *rows)
    report = validate(DatasetConfig(path=source))
    lines = str(report).splitlines()
    assert [line.split(": ")[0].removeprefix(source) for line in lines[:5]] == [":2", ":3", ":4", ":5", ":6"]
    assert lines[5] == f"... and 4 more rows: same reason as {source}:2"
    assert len(json.loads(report.json())["bad"]) == 9, "and JSON has them all"


def test_a_row_is_shown_as_the_model_reads_it(write):
    tokenizer = char_tokenizer("abcd")
    tokenizer.chat_template = MARKED
    source = write({"messages": [ASK]}, {"messages": [ASK, SAY, ASK, {**SAY, "content": "a"}], "note": "x"})
    report = validate(DatasetConfig(path=source), tokenizer, command="sft")
    assert len(report.bad) == 1 and str(report).splitlines()[-1] == "ab\u27e6cd<eos>\u27e7ab\u27e6a<eos>\u27e7"
    assert "unused: note (1 rows)" in str(report)
    assert report.text(colour=True).splitlines()[-1] == "ab\x1b[32mcd<eos>\x1b[0mab\x1b[32ma<eos>\x1b[0m"
    pairs = write(PAIR, {**PAIR, "prompt": "cd"}, name="pairs.jsonl")
    shown = str(validate(DatasetConfig(path=pairs), tokenizer, command="dpo", show=2)).split("\n\n")[1]
    assert shown.splitlines()[0].startswith(f"{pairs}:2 as the model reads it")
    assert shown.splitlines()[1:] == [
        "--- chosen", "cd\u27e6b<eos>\u27e7", "--- rejected", "cd\u27e6c<eos>\u27e7"
    ]  # fmt: skip
    asked = validate(DatasetConfig(path=source), tokenizer, command="rl")
    assert str(asked).splitlines()[-1] == "ab"


def test_the_command_is_named(write):
    assert run(write(PAIR), "--for", "dpo").exit_code == 0
    assert "as rl reads them" in run(write(PAIR), "--for", "pairs").output
    with pytest.raises(DataError, match="--for ppo: no command that reads rows; give one of sft, rm, dpo"):
        CliRunner().invoke(app, ["validate-data", write(PAIR), "--for", "ppo"], catch_exceptions=False)


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
    assert found.exit_code == 0 and found.output == (
        f"{good}: 1 rows: 1 prompt_completion; 0 bad (as sft reads them)\n"
    )
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
    assert (report.types, report.bad, report.command) == ({"preference": 400}, (), "rm")
    assert [(note.where, note.why) for note in report.left_out_rows] == [(f"{source}:159", "empty")]
