"""Prompts of a large file from the cache: the same as without one, made anew where anything differs or is spoilt."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from datetime import datetime

import pytest

from rlhf_ray.data import prompt_cache, prompts
from rlhf_ray.data.prompt_sources import joined, named
from rlhf_ray.data.prompts import load_prompts
from rlhf_ray.data.token_rows import TokenRows
from rlhf_ray.errors import DataError
from rlhf_ray.models.tokenizers import char_tokenizer

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[go]{% endif %}"
)
DATED = "{{ strftime_now('%d') }}" + TEMPLATE


@pytest.fixture
def tokenizer():
    return char_tokenizer("abcdefghijklmnopqrstuvwxyz []0123456789")


@pytest.fixture(autouse=True)
def all_files_are_large(monkeypatch):
    monkeypatch.setattr(prompt_cache, "LARGE", 0)
    monkeypatch.setattr(prompts, "BATCH", 3)  # several of them


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def rereads(monkeypatch):
    """How often a source was read."""
    count = []
    whole = prompts.read_rows
    monkeypatch.setattr(prompts, "read_rows", lambda *args, **kw: count.append(1) or whole(*args, **kw))
    return count


def same(one, other) -> bool:
    return (
        tuple(one.examples) == tuple(other.examples) and tuple(one.token_ids) == tuple(other.token_ids)
        and tuple(one.answers) == tuple(other.answers)
        and (one.dropped, one.read, dict(one.unused), one.label) == (
            other.dropped, other.read, dict(other.unused), other.label)
    )  # fmt: skip


NOW = datetime(2026, 1, 1)
FORMS = {
    "plain": ([{"prompt": f"ab{i}", "answer": i, "more": {"x": [1.5, None, True]}} for i in range(8)], {}),
    "chat": ([{"prompt": [{"role": "user", "content": f"q {i}"}], "id": i} for i in range(8)], {"template": "chat"}),
    "as chat": ([{"question": f"q{i}", "answer": "a"} for i in range(7)],
                {"template": "chat", "system_prompt": "be good"}),
    "instruction": ([{"instruction": "do", "input": "ab" * (i % 2), "output": "c"} for i in range(4)],
                    {"template": "none"}),
    "preference": ([{"prompt": f"p{i}", "chosen": "a", "rejected": "" if i == 1 else "b"} for i in range(5)], {}),
    "too long": ([{"prompt": "a" * i} for i in range(1, 9)], {"max_prompt_tokens": 4, "overlong": "drop"}),
    "words": ([{"text": "a b c d"[: 2 * i + 1]} for i in range(4)], {"prompt_words": 2}),
    "references": ([{"prompt": f"p{i}", "answer": ["a", f"b{i}"]} for i in range(4)], {"reference_field": "answer"}),
    "used names": ([{"prompt": "a", "completions": "taken"} for _ in range(4)], {}),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_the_same_prompts_first_and_from_the_cache(write, tokenizer, folder, rereads, form):
    rows, options = FORMS[form]
    source = write(*rows)
    if options.get("template") == "chat":
        tokenizer.chat_template = TEMPLATE
    options = {**options, "clock": NOW}
    plain = load_prompts(source, tokenizer, **options)
    first = load_prompts(source, tokenizer, cache=str(folder), **options)
    assert isinstance(first.token_ids, TokenRows) and same(plain, first)
    assert len(rereads) == 2
    second = load_prompts(source, tokenizer, cache=str(folder), **options)
    assert same(plain, second) and len(rereads) == 2, "not read again"
    assert [p.name for p in folder.iterdir() if ".tmp-" in p.name] == []


def test_slices_names_and_joins_are_those_of_lists(write, tokenizer, folder):
    source = write(*FORMS["references"][0])
    plain, kept = (
        load_prompts(source, tokenizer, reference_field="answer", cache=cache) for cache in ("none", str(folder))
    )
    for change in (lambda p: p.slice(1, 3), lambda p: named(p, "x", 2.0), lambda p: joined([p, named(p, "y")])):
        assert same(change(plain), change(kept)) and len(change(plain)) == len(change(kept))
    assert replace(kept, label="l").label == "l"


def test_whatever_decides_about_prompts_decides_about_the_cache(write, tokenizer, folder, rereads):
    source = write(*FORMS["plain"][0])

    def loads(**options) -> int:
        before = len(rereads)
        load_prompts(source, tokenizer, cache=str(folder), **options)
        return len(rereads) - before

    assert loads() == 1 and loads() == 0
    assert loads(field="prompt") == 1 and loads(max_prompt_tokens=50) == 1 and loads(limit=20_000) == 1
    assert loads(clock=datetime(2026, 1, 1)) == 0, "no template asks for the date"
    tokenizer.chat_template = TEMPLATE
    assert loads(template="chat") == 1 and loads(template="chat", system_prompt="s") == 1
    tokenizer.add_special_tokens({"additional_special_tokens": ["[x]"]})
    assert loads() == 1, "another tokenizer"
    rows = [*FORMS["plain"][0][:-1], {"prompt": "ab7", "answer": 8, "more": {}}]
    assert write(*rows) == source and loads() == 1, "other bytes under the same name"


def test_a_template_with_the_date_has_a_cache_a_moment(write, tokenizer, folder, rereads):
    source, tokenizer.chat_template = write(*FORMS["chat"][0]), DATED
    for day in (1, 2, 1):
        options = {"template": "chat", "clock": datetime(2026, 1, day), "cache": str(folder)}
        assert load_prompts(source, tokenizer, **options).examples[0].prompt.startswith(f"0{day}[user]")
    assert len(rereads) == 2


@pytest.mark.parametrize("name", ["tokens.i32", "ends.i64", "highest.i32", "rows.jsonl", "row_ends.i64", "meta.json"])
def test_a_spoilt_cache_is_made_anew(write, tokenizer, folder, rereads, name):
    source = write(*FORMS["plain"][0])
    plain = load_prompts(source, tokenizer, cache=str(folder))
    [kept] = folder.iterdir()
    content = bytearray((kept / name).read_bytes())
    content[len(content) // 2] ^= 1
    (kept / name).write_bytes(content)
    again = load_prompts(source, tokenizer, cache=str(folder))
    assert len(rereads) == 2 and tuple(again.token_ids) == tuple(load_prompts(source, tokenizer).token_ids)
    assert same(load_prompts(source, tokenizer, cache=str(folder)), load_prompts(source, tokenizer)) and len(plain) == 8
    (kept / name).unlink()
    assert len(load_prompts(source, tokenizer, cache=str(folder))) == 8


def test_a_writer_that_dies_leaves_nothing_that_is_used(write, tokenizer, folder, monkeypatch):
    source = write(*FORMS["plain"][0])
    with monkeypatch.context() as patched:
        patched.setattr(prompt_cache.Writer, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            load_prompts(source, tokenizer, cache=str(folder))
    assert list(folder.iterdir()) == []


def test_of_two_that_write_at_once_the_first_ones_files_stay(write, tokenizer, folder, monkeypatch):
    source = write(*FORMS["plain"][0])
    found, finish = [], prompt_cache.Writer.finish

    def overtaken(writer, about):
        monkeypatch.setattr(prompt_cache.Writer, "finish", finish)
        found.append(load_prompts(source, tokenizer, cache=str(folder)))
        [kept] = [path for path in folder.iterdir() if ".tmp-" not in path.name]
        before = {path.name: path.stat().st_ino for path in kept.iterdir()}
        finish(writer, about)
        assert before == {path.name: path.stat().st_ino for path in kept.iterdir()}

    monkeypatch.setattr(prompt_cache.Writer, "finish", overtaken)
    second = load_prompts(source, tokenizer, cache=str(folder))
    assert same(found[0], second) and same(second, load_prompts(source, tokenizer))
    assert len(list(folder.iterdir())) == 1


def test_what_cannot_be_kept_is_read(write, tokenizer, tmp_path, folder, rereads, monkeypatch):
    source = write(*FORMS["plain"][0])
    (tmp_path / "file").write_text("")
    unwritable = load_prompts(source, tokenizer, cache=str(tmp_path / "file" / "below"))
    assert unwritable.token_ids == load_prompts(source, tokenizer).token_ids
    assert isinstance(load_prompts(source, tokenizer, cache="none").token_ids, tuple)
    assert isinstance(load_prompts(source, tokenizer, limit=2, cache=str(folder)).token_ids, tuple)
    monkeypatch.setattr(prompt_cache, "LARGE", 1 << 20)
    assert isinstance(load_prompts(source, tokenizer, cache=str(folder)).token_ids, tuple)
    assert not folder.exists()


def test_rows_that_json_would_change_are_not_kept(tmp_path, tokenizer, folder):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    source = str(tmp_path / "rows.parquet")
    parquet.write_table(pyarrow.table({"prompt": ["ab", "cd"], "day": [datetime(2026, 1, 1)] * 2}), source)
    found = load_prompts(source, tokenizer, cache=str(folder))
    assert found.examples[0].columns == {"day": datetime(2026, 1, 1)} and list(folder.iterdir()) == []


def test_csv_and_errors_are_as_without_a_cache(tmp_path, tokenizer, write, folder):
    source = tmp_path / "rows.csv"
    with source.open("w", newline="") as stream:
        csv.writer(stream).writerows([["prompt", "answer"], ["ab", "1"], ["cd", ""]])
    assert same(load_prompts(str(source), tokenizer), load_prompts(str(source), tokenizer, cache=str(folder)))
    bad = write(*[{"prompt": "a"}] * 3, {"prompt": "a" * 9}, {"prompt": 3}, name="bad.jsonl")
    for cache in ("none", str(folder)):
        with pytest.raises(DataError, match=r"bad\.jsonl:4: the prompt has 9 tokens"):
            load_prompts(bad, tokenizer, max_prompt_tokens=4, cache=cache)
        with pytest.raises(DataError, match=r"bad\.jsonl:5"):
            load_prompts(bad, tokenizer, cache=cache)
    assert len(list(folder.iterdir())) == 1


def test_it_lies_where_datasets_keeps_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    assert prompt_cache.default_folder() == tmp_path / "rlhf_ray_prompts"
    monkeypatch.delenv("HF_DATASETS_CACHE")
    monkeypatch.setattr(prompt_cache.hub, "HF_HOME", "/somewhere")
    assert str(prompt_cache.default_folder()) == "/somewhere/datasets/rlhf_ray_prompts"


def test_prompts_tokenized_together_are_those_tokenized_apart(tokenizer):
    from rlhf_ray.data.encoding import Encoder

    texts = ["ab", "", "c d", "[x]"]
    encoder = Encoder(tokenizer, style="none")
    apart = [(*encoder.prompt(text), encoder.take_unused()) for text in texts if text]
    assert encoder.prompts([text for text in texts if text]) == apart and encoder.prompts([]) == []
    with pytest.raises(DataError, match="has no tokens"):
        encoder.prompts(texts)
    assert json.dumps(apart[0][1])
