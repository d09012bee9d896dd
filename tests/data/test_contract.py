"""One contract for a row: all that it says is used, named as unused, or refused; from the file to the tokens."""

from __future__ import annotations

import pytest

from rlhf_ray.config.data import DatasetConfig
from rlhf_ray.data.datasets import load_supervised
from rlhf_ray.data.prompts import load_prompts
from rlhf_ray.data.validate import validate
from rlhf_ray.errors import DataError
from rlhf_ray.models.tokenizers import char_tokenizer

PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CALLS = PLAIN.replace("m.content }}", "m.content }}{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}")
TURNS = [{"role": "user", "content": "hi", "id": 7}, {"role": "assistant", "content": "yo"}]
CALLING = [
    TURNS[0],
    {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", "name": "f", "arguments": '{"x": 1}'}]},
]


def test_what_nothing_reads_is_said_once_with_its_rows(write):
    tokenizer, reports = char_tokenizer("abc"), []
    tokenizer.chat_template = CALLS
    rows = [{"messages": TURNS, "source": "web"}, {"messages": CALLING, "source": "book"}, {"messages": TURNS, "n": 1}]
    file = write(*rows)
    load_supervised(DatasetConfig(path=file), tokenizer, seed=0, on_report=reports.append)
    assert reports[0].unused == {"messages[].id": 3, "source": 2, "messages[].tool_calls[].id": 1, "n": 1}
    assert str(reports[0]).endswith(
        "unused: messages[].id (3 rows), source (2 rows), messages[].tool_calls[].id (1 rows), n (1 rows)"
    )


def test_a_column_that_is_named_and_in_no_row_is_said(write):
    reports = []
    file = write({"q": "abc", "completion": "b"}, {"q": "bca", "completion": "a", "rules": "c"})
    names = {"prompt": "q", "system": "rules", "history": "before", "margin": "gap"}
    tokenizer = char_tokenizer("abc")
    tokenizer.chat_template = PLAIN
    data = DatasetConfig(path=file, columns=names)
    load_supervised(data, tokenizer, seed=0, on_report=reports.append)
    assert reports[0].absent == {"history": "before", "margin": "gap"}
    assert str(reports[0]).endswith("; no row has 'gap' (columns.margin), 'before' (columns.history)")
    for command in (None, "rl"):
        report = validate(data, command=command)
        assert report.absent == reports[0].absent and "no row has 'gap' (columns.margin)" in str(report)
    assert "no row has" not in str(validate(DatasetConfig(path=file, columns={"prompt": "q"})))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": CALLING}, "drops the tool calls of the assistant's message"),
        ({"messages": TURNS, "tools": [{"name": "weigh"}]}, "drops the tools"),
        ({"messages": [TURNS[0], {**TURNS[1], "reasoning_content": "greet"}]}, "drops the reasoning"),
    ],
)
def test_a_row_of_which_the_template_drops_a_part_is_refused_by_its_line(write, row, says):
    tokenizer = char_tokenizer("abc")
    tokenizer.chat_template = PLAIN
    file = write({"messages": TURNS}, row)
    with pytest.raises(DataError, match=rf"data\.jsonl:2: this chat template {says}"):
        load_supervised(DatasetConfig(path=file), tokenizer, seed=0)
    prompt = [*row["messages"], TURNS[0]] if "reasoning" not in says else row["messages"]
    field = {**row, "messages": None, "prompt": prompt}
    with pytest.raises(DataError, match=rf"data\.jsonl:1: this chat template {says}"):
        load_prompts(write(field), tokenizer)
