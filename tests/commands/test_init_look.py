"""What is seen in a data file before a config is written for it."""

from __future__ import annotations

import json

import pytest

from rlhf_ray.commands.init.look import columns_of, look
from rlhf_ray.errors import DataError


@pytest.fixture
def rows(tmp_path):
    def write(*given: dict, name: str = "rows.jsonl") -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in given), encoding="utf-8")
        return str(tmp_path / name)

    return write


def test_prompts_with_answers(rows):
    seen = look(rows({"question": "2+2?", "answer": "4"}, {"question": "über?", "answer": "é", "level": 3}), "rl", {})
    assert (seen.kind, seen.rows, seen.columns) == ("prompt_completion", 2, ("question", "answer", "level"))
    assert seen.answer == "answer" and not seen.is_chat and not seen.is_text
    assert seen.longest_prompt == 6, "bytes: the ü has two"
    assert seen.longest_text == 6 + 2
    assert str(seen).endswith("2 rows of type prompt_completion; columns question, answer, level")


def test_columns_with_names_of_their_own(rows):
    file = rows({"frage": "2+2?", "antwort": "4"}, {"frage": "3+3?", "antwort": "6"})
    with pytest.raises(DataError, match="2 of 2 rows are not what `rl` reads"):
        look(file, "rl", {})
    assert look(file, "rl", {"prompt": "frage"}).answer is None
    assert look(file, "sft", {"prompt": "frage", "completion": "antwort"}).answer == "antwort"
    assert columns_of(file) == ("frage", "antwort")


def test_messages_are_chats_for_every_command(rows):
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    file = rows({"messages": said}, {"messages": said[:1] + [{"role": "assistant", "content": "Well met."}]})
    assert look(file, "rl", {}).is_chat and look(file, "sft", {}).is_chat
    pairs = rows(*({"prompt": said[:1], "chosen": said[1:], "rejected": [{"role": "assistant", "content": word}]}
                   for word in ("No.", "Go away.")), name="pairs.jsonl")  # fmt: skip
    assert look(pairs, "dpo", {}).is_chat


def test_of_a_pair_only_the_longer_answer_is_in_a_sequence(rows):
    pairs = [{"prompt": "1234", "chosen": "12", "rejected": "123456"}, {"prompt": "12", "chosen": "1", "rejected": "2"}]
    assert look(rows(*pairs), "rm", {}).longest_text == 4 + 6


def test_rows_for_another_command(rows):
    with pytest.raises(DataError) as error:
        look(rows({"text": "a film"}, {"text": "a book"}), "dpo", {})
    said = str(error.value)
    assert "2 of 2 rows are not what `dpo` reads" in said and "rows.jsonl:1: " in said
    assert "--for dpo` has them all" in said


def test_one_bad_row_is_said_for_a_run_would_refuse_it(rows):
    with pytest.raises(DataError, match=r"(?s)1 of 3 rows are not.*rows.jsonl:2: "):
        look(rows({"prompt": "a"}, {"prompt": 7}, {"prompt": "b"}), "rl", {})


@pytest.mark.parametrize(("given", "says"), [([{"prompt": "a"}], "it has one row"), ([], "no row is left")])
def test_too_few_rows(rows, given, says):
    with pytest.raises(DataError, match=says):
        look(rows(*given), "rl", {})


def test_a_missing_file_and_a_name_of_the_hub(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        look(str(tmp_path / "absent.jsonl"), "rl", {})
    seen = look("owner/name", "rl", {})
    assert seen.kind is None and "on the Hub" in str(seen), "nobody asks the network"


def test_who_has_columns_with_names_of_their_own_is_told_how_to_name_them(rows):
    file = rows({"id": 1, "我的 问题": "1+1=", "回答": "2"}, {"id": 2, "我的 问题": "1+2=", "回答": "3"})
    for command, hint in (("rl", "--column prompt='我的 问题'"), ("dpo", "--column chosen='我的 问题'")):
        with pytest.raises(DataError) as refused:
            look(file, command, {})
        assert str(refused.value).endswith(hint)
