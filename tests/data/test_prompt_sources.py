"""Prompts of several sources: which are learned from, which are held out, and whose they are."""

from __future__ import annotations

import pytest

from rlhf_ray.config.schema import DataConfig
from rlhf_ray.data.prompt_sources import held_out_counts, load_split
from rlhf_ray.data.prompts import load_prompts
from rlhf_ray.errors import ConfigError
from rlhf_ray.models.tokenizers import char_tokenizer


@pytest.fixture
def tokenizer():
    return char_tokenizer("abcdefghijklmnopqrstuvwxyz0123456789+= ")


@pytest.fixture
def files(write):
    """Ten prompts a0 .. a9 in `prompt`, and five b0 .. b4 in `q`."""
    first = write(*({"prompt": f"a{n}", "gold": n} for n in range(10)), name="first.jsonl")
    return first, write(*({"q": f"b{n}", "data_source": "own"} for n in range(5)), name="second.jsonl")


def split(tokenizer, asked=None, **data):
    train, held_out = load_split(DataConfig.model_validate(data), tokenizer, clock=None, asked=asked)
    return [example.prompt for example in train.examples], [example.prompt for example in held_out.examples], train


def test_each_source_holds_out_its_share_of_its_last_prompts(files, tokenizer):
    sources = [{"path": files[0], "weight": 3}, {"path": files[1], "field": "q", "weight": 1}]
    learned, held_out, train = split(tokenizer, sources=sources, eval_size=3)
    assert learned == [*(f"a{n}" for n in range(8)), *(f"b{n}" for n in range(4))] and held_out == ["a8", "a9", "b4"]
    assert [(part.name, part.rows, part.weight) for part in train.parts] == [("first", 8, 3.0), ("second", 4, 1.0)]
    assert [train.examples[i].source for i in (0, 7, 8)] == ["first", "first", "second"]
    assert train.token_ids[8] == load_prompts(files[1], tokenizer, field="q").token_ids[0]


def test_rows_carry_the_name_of_their_source_unless_they_have_one(files, tokenizer):
    sources = [{"path": files[0], "name": "x"}, {"path": files[1], "field": "q"}]
    _, _, train = split(tokenizer, sources=sources, eval_size=0)
    assert train.examples[0].columns == {"gold": 0, "data_source": "x"}
    assert train.examples[10].columns == {"data_source": "own"} and train.examples[10].source == "second"
    _, _, alone = split(tokenizer, path=files[0], eval_size=0)
    assert alone.examples[0].columns == {"gold": 0} and alone.examples[0].source == ""


def test_the_prompts_that_are_asked_are_spread_over_the_sources(files, tokenizer):
    sources = [{"path": files[0]}, {"path": files[1], "field": "q"}]
    assert split(tokenizer, sources=sources, eval_size=6, asked=4)[1] == ["a6", "a7", "b3", "b4"]
    assert split(tokenizer, sources=sources, eval_size=6, asked=5)[1] == ["a6", "a7", "a8", "b3", "b4"]


def test_a_source_may_have_held_out_rows_of_its_own(files, write, tokenizer):
    test = write(*({"q": f"t{n}"} for n in range(4)), name="test.jsonl")
    sources = [{"path": files[0]}, {"path": files[1], "field": "q", "eval_path": test}, "task:arithmetic"]
    learned, held_out, train = split(tokenizer, sources=sources, eval_size=2, asked=6)
    assert learned[:8] == [f"a{n}" for n in range(8)] and learned[8:13] == [f"b{n}" for n in range(5)]
    assert held_out[:4] == ["a8", "a9", "t0", "t1"] and [p[-1] for p in held_out[4:]] == ["=", "="]
    one = split(tokenizer, sources=sources[:2], eval_path=files[0], eval_size=2, asked=3)
    assert one[1] == ["a0", "a1", "a2"] and len(one[0]) == 15, "one for all sources"


def test_one_path_is_split_as_ever(files, tokenizer):
    learned, held_out, train = split(tokenizer, path=files[0], eval_size=4, asked=3)
    assert (learned, held_out) == ([f"a{n}" for n in range(6)], ["a6", "a7", "a8"]) and len(train.parts) == 1


def test_no_source_is_held_out_whole(files, tokenizer):
    data = DataConfig.model_validate({"sources": list(files), "eval_size": 60})
    assert held_out_counts(data, [1, 100]) == [0, 60] and held_out_counts(data, [2, 61]) == [1, 59]
    with pytest.raises(ConfigError, match="data.eval_size=60 would hold out all 61 prompts of .*first.jsonl, .*second"):
        held_out_counts(data, [30, 31])


def test_what_was_read_is_known_by_source(files, tokenizer):
    sources = [{"path": files[0], "name": "x"}, {"path": files[1], "field": "q"}]
    train, held_out = load_split(DataConfig.model_validate({"sources": sources, "eval_size": 2}), tokenizer, clock=None)
    assert [prompts.label for prompts in train.sets] == [f"x ({files[0]})", f"second ({files[1]})"]
    assert [p.read for p in train.sets] == [p.read for p in held_out.sets] == [
        load_prompts(files[0], tokenizer).read, load_prompts(files[1], tokenizer, field="q").read,
    ]  # fmt: skip
