"""Several sources in `data`: the forms that a file may have, what each inherits, and what is refused."""

from __future__ import annotations

import pytest
import yaml

from rlhf_ray.config.load import dump_config, load_config, parse_config
from rlhf_ray.config.pipeline import load_pipeline, resolve
from rlhf_ray.config.schema import RunConfig
from rlhf_ray.config.supervised import SFTConfig
from rlhf_ray.errors import ConfigError

A, B = {"path": "data/math.jsonl", "weight": 3, "field": "question"}, {"path": "owner/talk:chat", "weight": 1}


@pytest.fixture
def load(tmp_path):
    """A config file with this `data`; overrides."""

    def load(data, *overrides, schema=RunConfig):
        tree = {"model": {"path": "m"}, "data": data}
        if schema is RunConfig:
            tree |= {"rewards": [{"function": "keyword"}], "eval": {"size": 4}}
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(tree))
        return load_config(path, overrides, schema)

    return load


def refused(load, data, *overrides, schema=RunConfig) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load(data, *overrides, schema=schema)
    return [line.removeprefix("  - ") for line in str(error.value).splitlines()[1:]]


def test_what_a_source_leaves_empty_is_as_in_the_section(load):
    data = load({"template": "chat", "system_prompt": "s", "split": "main", "eval_size": 8, "sources": [
        {**A, "name": "sums", "system_prompt": "count", "limit": 5}, {**B, "template": "none", "split": "train"},
    ]}).data  # fmt: skip
    sums, talk = data.parts
    assert (sums.name, sums.weight, sums.key) == ("sums", 3.0, "data.sources.0")
    assert (talk.name, talk.weight, talk.key) == ("talk_chat", 1.0, "data.sources.1")
    assert (sums.data.path, sums.data.field, sums.data.limit, sums.data.split) == (A["path"], "question", 5, "main")
    assert (sums.data.template, sums.data.system_prompt, sums.data.eval_size) == ("chat", "count", 8)
    assert (talk.data.split, talk.data.template) == ("train", "none")
    assert (talk.data.system_prompt, talk.data.field) == (None, None)
    assert data.paths == "data/math.jsonl, owner/talk:chat" and not talk.data.sources


def test_one_path_is_one_source_without_a_name(load):
    data = load({"path": "a.jsonl", "eval_size": 4}).data
    assert [(part.name, part.data, part.key) for part in data.parts] == [("", data, "data")]


@pytest.mark.parametrize(("path", "name"), [
    ("task:arithmetic", "arithmetic"), ("/x/gsm 8k.train.jsonl.gz", "gsm_8k"), ("Owner/Set", "Set"), ("./", "source"),
])  # fmt: skip
def test_a_source_is_called_after_its_path(load, path, name):
    data = load({"eval_size": 4, "sources": [path]}).data
    assert data.parts[0].name == name


def test_a_list_is_the_short_form_and_overrides_reach_into_it(load):
    short = load(["a.jsonl", {"path": "b.jsonl", "limit": 3}], "data.eval_size=4")
    assert short.data.sources[0].path == "a.jsonl" and short.data.parts[1].data.limit == 3
    overrides = ("data.sources.0.path=c.jsonl", "data.sources.1.weight=2", "data.sources.0.weight=1")
    changed = load(["a.jsonl", {"path": "b.jsonl"}], *overrides, "data.eval_size=4")
    assert [(part.data.path, part.weight) for part in changed.data.parts] == [("c.jsonl", 1.0), ("b.jsonl", 2.0)]
    named = load({"path": "a.jsonl", "eval_size": 4}, "data=[x.jsonl, y.jsonl]", "data.eval_size=4",
                 "data.sources.1.limit=3")  # fmt: skip
    assert named.data.paths == "x.jsonl, y.jsonl" and named.data.parts[1].data.limit == 3
    back = load([A], "data.sources=[]", "data.path=one.jsonl", "data.eval_size=4")
    assert back.data.paths == "one.jsonl"
    there = load({"path": "a.jsonl", "eval_size": 4}, "data.path=null", "data.sources=[b.jsonl]")
    assert there.data.paths == "b.jsonl"


def test_the_resolved_config_reads_back(load, tmp_path):
    for schema, data in ((RunConfig, [A, B]), (SFTConfig, ["a.jsonl", {"path": "b.csv", "columns": {"prompt": "q"}}])):
        config = load(data, "data.eval_size=4", schema=schema)
        assert parse_config(yaml.safe_load(dump_config(config)), schema, source="test") == config


def test_a_stage_of_a_pipeline_has_them_too(tmp_path):
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump({"model": {"path": "m"}, "data": ["a.jsonl", "b.jsonl"]}))
    stage = {"name": "sft", "run": "sft", "config": "sft.yaml", "set": {"data.sources.1.path": "${values}.jsonl"}}
    tree = {"values": {"values": "c"}, "stages": [stage]}
    (tmp_path / "pipe.yaml").write_text(yaml.safe_dump(tree))
    pipeline, overrides = load_pipeline(tmp_path / "pipe.yaml", ["sft.data.sources.0.limit=7"])
    (resolved,) = resolve(pipeline, tmp_path, tmp_path / "run", overrides)
    assert resolved.config.data.paths == "a.jsonl, c.jsonl" and resolved.config.data.parts[0].data.limit == 7


@pytest.mark.parametrize(("data", "says"), [
    ({"path": "a.jsonl", "sources": [A, B]}, "data.path=a.jsonl and data.sources both say where the rows are; remove"),
    ({"path": "", "eval_size": 4}, "data.path is empty; name a file or a dataset, or set data.sources"),
    ({"eval_size": 4}, "data.path: required and not set"),
    ({"sources": []}, "data.path: required and not set"),
    ([A, {"path": "b.jsonl"}], "data.sources.1 has no weight, and others have one; set data.sources.1.weight"),
    ([A, {**B, "weight": 0}], "data.sources.1.weight: input should be greater than 0 (got 0)"),
    ([A, {**B, "weight": 1e-4}], "data.sources.1.weight=0.0001 is less than a ten-thousandth of all weights"),
    ([A, {**A}], "data.sources.0 and data.sources.1 are both called math, and metrics go by name; set"),
    ([A, {**B, "name": "math"}], "data.sources.0 and data.sources.1 are both called math"),
    ([A, {**B, "name": "a/b"}], "data.sources.1.name: string should match pattern"),
    ([A, {**B, "weigth": 1}], "data.sources.1.weigth: unknown key; did you mean data.sources.1.weight?"),
    ([A, {"weight": 1}], "data.sources.1.path: required and not set"),
    ([A, 3], "data.sources.1: input should be a valid dictionary"),
    ([A, {**B, "chat_template": "zephyr"}], "data.sources.1.chat_template=zephyr: a model has one chat template"),
    ([A, {**B, "template": "none", "system_prompt": "x"}], "data.sources.1.template=none uses no chat template"),
    ({"eval_path": "e", "sources": [A, {**B, "eval_path": "f"}]}, "data.eval_path and data.sources.1.eval_path both"),
    ([A, {"path": "task:arithmetic", "split": "test", "weight": 1}], "data.sources.1.split=test of task:arithmetic is"),
])  # fmt: skip
def test_what_is_refused(load, data, says):
    problems = refused(load, data)
    assert any(problem.startswith(says) for problem in problems), problems


def test_the_section_has_the_chat_template_of_all(load):
    data = load({"chat_template": "zephyr", "template": "chat", "eval_size": 4, "sources": [
        {**A, "chat_template": "zephyr"}, {**B, "template": "none"},
    ]}).data  # fmt: skip
    assert [part.data.chat_template for part in data.parts] == ["zephyr", None]


def test_plain_text_is_one_source(load):
    tree = {"path": "a.jsonl"}
    problems = refused(load, tree, "plain_text.data=[b.jsonl, c.jsonl]", schema=SFTConfig)
    assert problems == ["plain_text.data.sources: the plain text is one source; set plain_text.data.path"]


def test_held_out_rows_of_a_source_are_rows_to_validate_on(load):
    sources = [{"path": "a.jsonl"}, {"path": "b.jsonl", "eval_path": "e.jsonl"}]
    assert load(sources, "eval.patience=2", schema=SFTConfig).eval.patience == 2
    assert "no rows to validate on" in refused(load, sources[:1], "eval.patience=2", schema=SFTConfig)[0]
    assert load([A, {**B, "eval_path": "e.jsonl"}], "data.eval_size=0").eval.size == 4
