"""What is text of a completion: the special tokens that a policy was taught, not those that control the generator."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken

from rlhf_ray.config.rewards import RewardModelConfig
from rlhf_ray.data.completion_text import CompletionText
from rlhf_ray.models.tokenizers import build_tokenizer
from rlhf_ray.rewards.classifier import TextScores
from rlhf_ray.rewards.compose import RewardSet, load_reward
from rlhf_ray.roles.batch import build_batch
from rlhf_ray.roles.protocols import Request
from rlhf_ray.roles.reward import Reward

TURNS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|stop|>{% endfor %}<|assistant|>"
MARKS = ["<sum>", "</sum>", "<|user|>", "<|assistant|>", "<|stop|>", "<|call|>"]


@pytest.fixture(params=["char", "bpe"])
def tokenizer(request):
    """Its EOS is another token than what its chat template ends a turn with; all marks are special."""
    made = build_tokenizer(request.param, ["it is 0123456789"], vocab_size=300 if request.param == "bpe" else None)
    made.add_special_tokens({"additional_special_tokens": [AddedToken(mark, special=True) for mark in MARKS]})
    made.chat_template = TURNS
    return made


def ids_of(tokenizer, *parts):
    return [
        token
        for part in parts
        for token in (
            [tokenizer.convert_tokens_to_ids(part)]
            if part in MARKS or part == tokenizer.eos_token
            else tokenizer(part, add_special_tokens=False)["input_ids"]
        )
    ]


def test_taught_tokens_are_text_and_what_ends_an_answer_is_none(tokenizer):
    text = CompletionText(tokenizer, stop=ids_of(tokenizer, "<|call|>"))
    body = ids_of(tokenizer, "it is ", "<sum>", "42", "</sum>")
    ends = [[], ids_of(tokenizer, "<|stop|>"), ids_of(tokenizer, "<|call|>"), [tokenizer.eos_token_id]]
    padded = [*body, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.pad_token_id]
    assert set(text.decode([*(body + end for end in ends), padded])) == {"it is <sum>42</sum>"}
    turn = ids_of(tokenizer, "1", "<|stop|>", "<|user|>", "2")
    assert text.decode([turn]) == ["1<|user|>2"], "a turn that the policy made up is seen"
    assert CompletionText(tokenizer).decode([body + ends[2]]) == ["it is <sum>42</sum><|call|>"]


def test_a_completion_behind_its_prompt(tokenizer):
    prompt = ids_of(tokenizer, "<|user|>", "it is", "<|stop|>", "<|assistant|>")
    answer = ids_of(tokenizer, "<sum>", "4", "</sum>", "<|stop|>")
    assert CompletionText(tokenizer).decode_behind(prompt, answer) == "<sum>4</sum>"
    words = build_tokenizer("word", ["the film was good"])
    ids = [words(text, add_special_tokens=False)["input_ids"] for text in ("the film was", "good")]
    assert CompletionText(words).decode_behind(*ids) == " good", "with the blank that it lacks alone"
    assert CompletionText(words).decode([ids[1] + [words.eos_token_id]]) == ["good"]


def test_rewards_networks_and_samples_see_the_same_text(tokenizer):
    class Judge:
        def __init__(self):
            self.config, self.texts = RewardModelConfig(path="judge"), None

        def score(self, answers):
            self.texts = [answered.whole for answered in answers]
            return TextScores([0.0] * len(answers), 0)

    answers = [ids_of(tokenizer, "<sum>", "7", "</sum>", "<|stop|>"), ids_of(tokenizer, "7", "<|stop|>")]
    prompt = tuple(ids_of(tokenizer, "<|user|>", "3+4", "<|assistant|>"))
    requests = [Request(0, n, prompt, n, {"prompt": "<|user|>3+4<|assistant|>"}) for n in range(2)]
    batch = build_batch(
        requests, answers, [[0.0] * len(ids) for ids in answers], truncated=[False] * 2, weight_version=0
    )
    judge, taught = Judge(), load_reward("regex", args={"pattern": r"(?s)<sum>\d+</sum>"})
    scores = Reward(RewardSet([taught]), tokenizer, model=judge).score(batch, texts=2)
    assert scores.by_function["regex"].tolist() == [1.0, 0.0]
    assert [completion for _, completion in scores.texts] == ["<sum>7</sum>", "7"]
    assert judge.texts == ["<|user|>3+4<|assistant|><sum>7</sum>", "<|user|>3+4<|assistant|>7"]
