import json
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

from rlhf_ray.config.schema import RunConfig
from rlhf_ray.data.examples import TokenizedExample
from rlhf_ray.data.prompts import located_texts
from rlhf_ray.errors import DataError
from rlhf_ray.models.devices import Hardware
from rlhf_ray.models.loading import load_policy, load_tokenizer
from rlhf_ray.models.tokenizers import build_tokenizer
from rlhf_ray.start import warm_start
from rlhf_ray.start.rl_inputs import load_data
from rlhf_ray.start.warm_start import Lessons, make_tokenizer, starting_policy, warm_start_lessons

CPU = Hardware("cpu", torch.float32)


@pytest.fixture
def reviews(tmp_path):
    path = tmp_path / "reviews.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in ("a good film", "a bad film", "good good good")))
    return path


def taken_apart(example: TokenizedExample) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(prompt, answer): an answer is all that is learned, and stands at the end."""
    start = example.learned.index(True)
    assert all(example.learned[start:])
    return example.token_ids[:start], example.token_ids[start:]


def lessons_of(config: RunConfig, tokenizer) -> Lessons:
    return warm_start_lessons(config.data, config.warm_start, tokenizer, config.clock)


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_model_from_scratch_is_made_taught_and_kept(tiny_config, tmp_path):
    seen = []
    config = tiny_config("warm_start={steps: 3, batch_size: 4, max_length: 16}")
    paths = starting_policy(config, tmp_path / "start", CPU, lambda step, loss: seen.append(step))
    assert paths == (str(tmp_path / "start"),) * 2 and seen == [1, 2, 3]
    assert load_policy(paths[0]).config.vocab_size == len(load_tokenizer(paths[1]))
    starting_policy(tiny_config("warm_start.steps=0"), tmp_path / "untaught", CPU, pytest.fail)
    untaught = weights(tmp_path / "untaught")
    assert not torch.equal(weights(tmp_path / "start")["model.norm.weight"], untaught["model.norm.weight"])


def test_a_finished_folder_is_used_again(tiny_config, tmp_path, monkeypatch):
    starting_policy(tiny_config(), tmp_path / "start", CPU, pytest.fail)
    monkeypatch.setattr(warm_start, "make_model", lambda *_: pytest.fail("made twice"))
    assert starting_policy(tiny_config(), tmp_path / "start", CPU, pytest.fail)[0] == str(tmp_path / "start")


def test_a_cut_off_start_is_not_mistaken_for_a_finished_one(tiny_config, tmp_path, monkeypatch):
    def cut(model, tokenizer):
        raise KeyboardInterrupt

    monkeypatch.setattr(warm_start, "warm_start", cut)
    with pytest.raises((KeyboardInterrupt, TypeError)):
        starting_policy(tiny_config("warm_start.steps=1"), tmp_path / "start", CPU, pytest.fail)
    assert not (tmp_path / "start").exists()


@pytest.mark.parametrize("kind", ["char", "word", "bpe"])
def test_no_text_to_make_a_tokenizer_from(tiny_config, tmp_path, kind):
    (tmp_path / "none.jsonl").write_text("")
    config = tiny_config(f"data.path={tmp_path}/none.jsonl", f"model.tokenizer.path=scratch:{kind}")
    with pytest.raises(DataError, match=r"none\.jsonl: no rows with text for a tokenizer"):
        make_tokenizer(config)


def test_a_folder_is_taken_as_it_lies(tiny_config, tmp_path):
    config = tiny_config("model.path=some/model", "model.tokenizer.path=null")
    assert starting_policy(config, tmp_path / "start", CPU, pytest.fail) == ("some/model", "some/model")
    config = tiny_config("model.path=some/model", "model.tokenizer.path=other/one")
    assert starting_policy(config, tmp_path / "start", CPU, pytest.fail) == ("some/model", "other/one")
    assert not (tmp_path / "start").exists()


@pytest.mark.slow
def test_a_task_teaches_answers_and_their_end(tiny_config):
    config = tiny_config("warm_start={steps: 1, max_length: 16}")
    tokenizer = make_tokenizer(config)
    example = lessons_of(config, tokenizer).examples[0]
    prompt, answer = taken_apart(example)
    assert tokenizer.decode(prompt).endswith("=")
    assert str(eval(tokenizer.decode(prompt[:-1]))) == tokenizer.decode(answer[:-1])
    assert answer[-1] == tokenizer.eos_token_id


def test_texts_are_learnt_whole_and_cut_ones_have_no_end(tiny_config, reviews):
    config = tiny_config(
        f"data.path={reviews}", "data.eval_size=1", "eval.size=1", "model.tokenizer.path=scratch:word",
        "warm_start={steps: 1, max_length: 3}",
    )  # fmt: skip
    tokenizer = make_tokenizer(config)
    first = lessons_of(config, tokenizer).examples[0]
    prompt, text = taken_apart(first)
    assert prompt == () and tokenizer.decode(text) == "a good film", "three words, no room for EOS"
    longer = lessons_of(
        tiny_config(f"data.path={reviews}", "data.eval_size=1", "eval.size=1", "model.tokenizer.path=scratch:word",
                    "warm_start={steps: 1, max_length: 9}"), tokenizer,
    ).examples  # fmt: skip
    assert longer[0].token_ids[-1] == tokenizer.eos_token_id and len(longer[0].token_ids) == 4


@pytest.mark.parametrize("limit", [None, 9])
def test_no_held_out_row_is_learned_from_whatever_was_dropped(tiny_config, tmp_path, limit):
    """Held out are the last usable prompts, wherever their rows stand."""
    texts = [f"film {letter} good" for letter in "abcdefghij"]
    texts.insert(3, "film x bad")
    rows = [{"text": text} for text in [*texts, *["far too long a film to be a prompt of so few tokens good"] * 4]]
    (tmp_path / "reviews.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tiny_config(
        f"data={{path: '{tmp_path}/reviews.jsonl', field: text, eval_size: 3, max_prompt_tokens: 4}}",
        "data.overlong_prompts=drop", f"data.limit={limit or 'null'}", "model.tokenizer.path=scratch:word",
        "warm_start={steps: 1, max_length: 9}", "eval.size=3",
    )  # fmt: skip
    tokenizer = make_tokenizer(config)
    train, held_out = load_data(config, tokenizer)
    learned = [tokenizer.decode(example.token_ids[:-1]) for example in lessons_of(config, tokenizer).examples]
    assert len(held_out) == 3 and learned == [example.prompt for example in train.examples]
    assert not {example.prompt for example in held_out.examples} & set(learned)


def test_sources_are_learned_by_their_weights_and_what_is_not_learned_is_named(tiny_config, tmp_path, monkeypatch):
    for name, count in {"few": 2, "many": 6, "held": 1}.items():
        lines = [{"text": f"{name} {letter} x", "id": letter} for letter in "abcdef"[:count]]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tools = [{"name": "weigh"}]
    call = {"messages": [{"role": "user", "content": "few"}, {"role": "assistant", "content": "x"}], "tools": tools}
    (tmp_path / "calls.jsonl").write_text(json.dumps(call) + "\n" + json.dumps({**call, "tools": []}) + "\n")
    sources = ", ".join(f"{{path: {tmp_path}/{name}.jsonl, weight: {weight}, field: text}}"
                        for name, weight in (("few", 3), ("many", 1)))  # fmt: skip
    config = tiny_config(
        f"data={{sources: [{sources}], eval_path: {tmp_path}/held.jsonl, max_prompt_tokens: 8}}",
        "model.tokenizer.path=scratch:word", "eval.size=1",
        "warm_start={steps: 2, batch_size: 8, max_length: 9}",
    )  # fmt: skip
    tokenizer = make_tokenizer(config)
    lessons = lessons_of(config, tokenizer)
    assert [(part.name, part.rows, part.weight) for part in lessons.parts] == [("few", 2, 3), ("many", 6, 1)]
    assert lessons.unused == {"id": 8}
    taken, notes = [], []
    monkeypatch.setattr(warm_start, "warm_up", lambda trainer, batches, **_: taken.append(batches.rows(0)))
    starting_policy(config, tmp_path / "start", CPU, pytest.fail, notes.append)
    assert sorted(row < 2 for row in taken[0]) == [False] * 2 + [True] * 6, "three of every four rows"
    assert notes == ["warm start: unused: id (8 rows)"]
    unused = Counter()
    located_texts(f"{tmp_path}/calls.jsonl", unused=unused)
    assert unused == {"tools": 1}, "a plain text has no place for them"


def test_a_source_whose_prompts_fill_the_limit_is_refused(tiny_config, reviews):
    rows = map(json.loads, reviews.read_text().splitlines())
    reviews.write_text("".join(json.dumps({**row, "verdict": "good"}) + "\n" for row in rows))
    config = tiny_config(
        f"data={{path: '{reviews}', field: text, eval_size: 1, max_prompt_tokens: 8}}", "eval.size=1",
        "model.tokenizer.path=scratch:word", "warm_start={steps: 1, max_length: 3, completion: verdict}",
    )  # fmt: skip
    with pytest.raises(DataError, match=r"reviews\.jsonl: no prompt is shorter than warm_start\.max_length=3 tokens"):
        lessons_of(config, make_tokenizer(config))


def test_tokenizers(tiny_config, reviews, tmp_path):
    assert len(make_tokenizer(tiny_config())) == 3 + len("0123456789+="), "the task's alphabet"
    assert len(make_tokenizer(tiny_config("model.tokenizer.alphabet=abc"))) == 3 + 3
    data = (f"data.path={reviews}", "data.eval_size=256")
    assert len(make_tokenizer(tiny_config(*data, "model.tokenizer.path=scratch:word"))) == 3 + 4
    two = tiny_config(*data, "model.tokenizer.path=scratch:word", "model.tokenizer.vocab_size=5")
    assert len(make_tokenizer(two)) == 5
    build_tokenizer("char", ["xyz"]).save_pretrained(tmp_path / "tokenizer")
    assert len(make_tokenizer(tiny_config(f"model.tokenizer.path={tmp_path}/tokenizer"))) == 6


def test_prompts_and_answers_are_taught_with_the_generators_tokens(tiny_config, tmp_path):
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in ("ab", "cd", "ef")))
    config = tiny_config(
        f"data={{path: {problems}, field: question, eval_size: 1, template: chat, chat_template: zephyr}}",
        "data.max_prompt_tokens=48", "eval.size=1", "model.tokenizer.path=scratch:bpe",
        "model.tokenizer.vocab_size=260", "model.scratch.max_length=64",
        "warm_start={steps: 1, max_length: 64, completion: answer}",
    )  # fmt: skip
    tokenizer = make_tokenizer(config)
    examples = [taken_apart(example) for example in lessons_of(config, tokenizer).examples]
    assert [tuple(map(tokenizer.decode, parts)) for parts in examples] == [
        ("<|user|>\na<eos>\n<|assistant|>\n", "b<eos>"),
        ("<|user|>\nc<eos>\n<|assistant|>\n", "d<eos>"),
    ], "the last row is held out"


def test_the_chat_template_is_saved_beside_a_model_that_stays_where_it_is(tiny_config, tmp_path):
    build_tokenizer("char", ["xyz"]).save_pretrained(tmp_path / "model")
    config = tiny_config(f"model.path={tmp_path}/model", "model.tokenizer.path=null", "data.chat_template=zephyr")
    policy, tokenizer = starting_policy(config, tmp_path / "start", CPU, pytest.fail)
    assert (policy, tokenizer) == (str(tmp_path / "model"), str(tmp_path / "start"))
    assert "<|assistant|>" in load_tokenizer(tokenizer).chat_template
