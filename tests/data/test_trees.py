"""OpenAssistant's message rows. The trees are drawn beside each test; letters are prompters, digits assistants."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from rlhf_ray.config.data import DatasetConfig
from rlhf_ray.data.datasets import load_pairs, load_supervised
from rlhf_ray.data.prompts import load_prompts
from rlhf_ray.data.rows import read_rows
from rlhf_ray.data.types import detect
from rlhf_ray.data.validate import validate
from rlhf_ray.errors import DataError
from rlhf_ray.models.tokenizers import char_tokenizer


def message(name, parent=None, rank=None, **more):
    role = "prompter" if name[-1].isalpha() else "assistant"
    return {"message_id": name, "parent_id": parent, "text": f"<{name}>", "role": role, "rank": rank, "lang": "en",
            "deleted": False, "review_result": True, **more}  # fmt: skip


# a -> 1 (rank 1), 2 (rank 0), 3 (no rank);  2 -> b (rank 1), c (rank 0);  c -> 4;  b -> 5 (1), 6 (0), 7 (1)
TREE = [
    message("a"), message("1", "a", 1), message("2", "a", 0), message("3", "a"), message("b", "2", 1),
    message("c", "2", 0), message("4", "c"), message("5", "b", 1), message("6", "b", 0), message("7", "b", 1),
]  # fmt: skip


def user(name):
    return {"role": "user", "content": f"<{name}>"}


def assistant(name):
    return {"role": "assistant", "content": f"<{name}>"}


def rows(path, form, dropped=None, **options):
    found = read_rows(path, trees_as=form, dropped=dropped, **options)
    return [(row.where.rpartition(":")[2], row.fields) for row in found]


def test_a_conversation_follows_the_best_rank(write):
    best = [user("a"), assistant("2"), user("c"), assistant("4")]
    assert rows(write(*TREE), "messages") == [("1", {"messages": best})]
    assert rows(write(*TREE, message("d", "4")), "messages") == [("1", {"messages": best})], "it ends with an answer"


def test_ranked_siblings_become_rankings_under_the_conversation_so_far(write):
    dropped = Counter()
    assert rows(write(*TREE), "ranked", dropped) == [
        ("1", {"prompt": [user("a")], "completions": ["<2>", "<1>"]}),
        ("5", {"prompt": [user("a"), assistant("2"), user("b")], "completions": ["<6>", "<5>"]}),
    ]
    assert dropped == {
        "answer without a rank": 1, "answer ranked like another": 1, "prompt without two ranked answers": 1
    }  # fmt: skip


def test_every_prompter_is_a_prompt(write):
    assert rows(write(*TREE), "prompt") == [
        ("1", {"prompt": [user("a")]}),
        ("5", {"prompt": [user("a"), assistant("2"), user("b")]}),
        ("6", {"prompt": [user("a"), assistant("2"), user("c")]}),
    ]


def test_the_order_of_the_rows_of_one_tree_does_not_matter(write):
    expected = [fields for _, fields in rows(write(*TREE), "messages")]
    assert [fields for _, fields in rows(write(*TREE[::-1]), "messages")] == expected


def test_deleted_and_refused_messages_go_with_all_that_follows(write):
    tree = [{**row, "deleted": row["message_id"] == "2"} for row in TREE] + [message("e"), message("8", "e")]
    tree[-1]["review_result"] = False
    dropped = Counter()
    assert rows(write(*tree), "messages", dropped) == [("1", {"messages": [user("a"), assistant("1")]})]
    assert dropped == {"deleted message": 7, "message that reviewers refused": 1, "tree without an answer": 1}


def test_the_export_of_whole_trees_says_the_same(write):
    def nested(name):
        row = next(row for row in TREE if row["message_id"] == name)
        return {**row, "replies": [nested(r["message_id"]) for r in TREE if r["parent_id"] == name]}

    whole = write({"message_tree_id": "a", "tree_state": "ready_for_export", "prompt": nested("a")}, name="trees.jsonl")
    for form in ("messages", "ranked", "prompt"):
        flat = [fields for _, fields in rows(write(*TREE), form)]
        assert sorted(map(json.dumps, (f for _, f in rows(whole, form)))) == sorted(map(json.dumps, flat))
    assert {where for where, _ in rows(whole, "ranked")} == {"1"}, "the line of the tree"


def test_rows_stay_as_they_are_on_request_and_other_rows_always(write):
    assert [fields for _, fields in rows(write(*TREE), None)] == TREE
    other = {"message_id": "x", "text": "a text", "role": "user"}
    assert rows(write(other), "messages") == [("1", other)]


@pytest.mark.parametrize(
    ("bad", "line", "says"),
    [
        (message("9", "zzz"), 11, "its parent_id 'zzz' is no message of this file"),
        (message("4", "c"), 11, r"message_id '4' is that of .*:7 too"),
        (message("9", "5"), 11, "the message is of the assistant, and here the prompter speaks"),
        (message("9"), 11, "the message is of the assistant, and here the prompter speaks"),
        ({**message("9", "c"), "role": "system"}, 11, "the role of message '9' is 'system'"),
        ({**message("9", "c"), "role": ["assistant"]}, 11, r"the role of message '9' is \['assistant'\]"),
        ({**message("9", "c"), "text": None}, 11, "a message needs the texts message_id and text"),
        ({**message("9", "c"), "rank": "best"}, 11, "the rank of message '9' is 'best', not a number"),
        (message("z", "z"), 11, "the message follows from itself"),
    ],
)
def test_a_message_that_fits_nowhere_is_named(write, bad, line, says):
    path = write(*TREE, bad)
    with pytest.raises(DataError, match=rf"data\.jsonl:{line}: {says}"):
        rows(path, "messages")
    complaints = []
    rows(path, "messages", on_bad=complaints.append)
    assert len(complaints) == 1


def test_a_list_for_the_role_of_the_first_message_is_named_too(write):
    first = {**message("a"), "role": ["prompter"]}
    with pytest.raises(DataError, match=r"data\.jsonl:1: the role of message 'a' is \['prompter'\]; it must be"):
        rows(write(first, message("1", "a", 0)), "messages")
    other = {"message_id": "x", "text": "a text", "role": ["user"]}
    assert rows(write(other), "messages") == [("1", other)]


def test_a_tree_of_thousands_of_generations_needs_no_stack(write):
    chain = [message("a")]
    for number in range(3000):
        chain.append(message(f"{'x' * (number % 2)}{number}{'' if number % 2 == 0 else 'q'}", chain[-1]["message_id"]))
    ((_, fields),) = rows(write(*chain), "messages")
    assert len(fields["messages"]) == 3000


def test_the_rows_are_of_the_type_that_was_asked_for(write):
    path = write(*TREE)
    kinds = [detect(next(read_rows(path, trees_as=form))) for form in ("messages", "ranked", "prompt")]
    assert kinds == ["messages", "ranked", "prompt"]


def test_each_command_has_its_form(write):
    path, tokenizer = write(*TREE), char_tokenizer("".join(f"<{name}>" for name in "abc1234567") + "useraitn|\n")
    data = DatasetConfig(path=path, chat_template="zephyr")
    reports = []
    assert len(load_supervised(data, tokenizer, seed=0)[0]) == 1
    assert len(load_pairs(data, tokenizer, seed=0, on_report=reports.append)[0]) == 2
    assert reports[0].dropped["answer without a rank"] == 1
    ranked = DatasetConfig(path=path, chat_template="zephyr", type="ranked")
    assert len(load_supervised(ranked, tokenizer, seed=0)[0]) == 2, "the best answer of each ranking"
    assert len(load_prompts(path, tokenizer, chat_template="zephyr")) == 3
    assert validate(DatasetConfig(path=path)).types == {"messages": 1}
    assert validate(DatasetConfig(path=path, type="ranked")).types == {"ranked": 2}


def test_prompts_count_what_is_left_out(write):
    path = write(*({**row, "deleted": row["message_id"] == "2"} for row in TREE))
    prompts = load_prompts(path, char_tokenizer("<>a|user\nistn"), chat_template="zephyr")
    assert len(prompts) == 1 and prompts.left_out == "7 deleted message"
