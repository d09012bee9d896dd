"""What init refuses before it writes a file, and what it offers."""

from __future__ import annotations

import pytest

from rlhf_ray.commands.init.look import Look
from rlhf_ray.commands.init.wishes import check_model, check_reward, reward_args, rewards_for
from rlhf_ray.errors import ConfigError, RlhfRayError

ANSWERS = Look("a.jsonl", "prompt_completion", ("prompt", "answer"), 9, answer="answer")
COMPLETIONS = Look("b.jsonl", "prompt_completion", ("prompt", "completion"), 9, answer="completion")
PROMPTS = Look("c.jsonl", "prompt", ("prompt",), 9)


def test_models(tmp_path):
    assert check_model("scratch") == "scratch:qwen2" and check_model("scratch:lstm") == "scratch:lstm"
    assert check_model("owner/name") == "owner/name"
    with pytest.raises(ConfigError, match="scratch:bert: no such model is built here"):
        check_model("scratch:bert")
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(ConfigError, match="no config.json"):
        check_model(str(tmp_path))
    with pytest.raises(RlhfRayError, match="no such folder"):
        check_model(str(tmp_path / "absent"))


def test_a_reward_that_compares_needs_its_column():
    assert check_reward("exact_answer", ANSWERS) == "exact_answer"
    with pytest.raises(ConfigError, match="compares with the column 'answer', and c.jsonl has prompt"):
        check_reward("math", PROMPTS)
    with pytest.raises(ConfigError, match="compares with the column 'answer'"):
        check_reward("exact_answer", COMPLETIONS)
    assert check_reward("math", COMPLETIONS) == "math"
    assert reward_args("math", COMPLETIONS) == {"column": "completion"} and reward_args("math", ANSWERS) == {}
    assert check_reward("math", Look("owner/name")) == "math", "nobody knows its columns"


@pytest.mark.parametrize(("reward", "says"), [
    ("sentimant", "did you mean 'sentiment'"), ("judge", "needs settings of its own"),
    ("reward.py:9lives", "is no name of a function"), ("no_such_module:f", "cannot be imported"),
])  # fmt: skip
def test_rewards_that_are_none(reward, says):
    with pytest.raises(ConfigError, match=says):
        check_reward(reward, PROMPTS)


def test_a_file_of_ones_own_must_have_the_function(tmp_path):
    file = tmp_path / "mine.py"
    assert check_reward(f"{file}:score", PROMPTS) == f"{file}:score", "it will be written"
    file.write_text("def scare(completions, **columns):\n    return [0.0 for _ in completions]\n")
    with pytest.raises(ConfigError, match="did you mean 'scare'"):
        check_reward(f"{file}:score", PROMPTS)


def test_what_is_offered_fits_the_rows():
    assert rewards_for(ANSWERS)[0] == "exact_answer"
    assert not {"exact_answer", "math", "rouge"} & set(rewards_for(PROMPTS))
    for name in rewards_for(PROMPTS):
        assert check_reward(name, PROMPTS) == name
