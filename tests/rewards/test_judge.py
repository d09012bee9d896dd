"""What a judge is asked, how its replies are read, and what the two orders of a pair decide."""

import pytest

from rlhf_ray.config.judge import JudgeConfig
from rlhf_ray.errors import ConfigError, RewardError
from rlhf_ray.rewards.compose import RewardSet, load_reward
from rlhf_ray.rewards.failures import Failure
from rlhf_ray.rewards.judge import Verdict, compare_both_orders, verdict_of
from rlhf_ray.rewards.judge_questions import (
    Opinion,
    UnreadableReply,
    criterion_of,
    pair_messages,
    parse_score,
    parse_verdict,
    score_messages,
)

CONFIG = JudgeConfig(model="m", scale=(1, 5))


@pytest.mark.parametrize(
    ("reply", "score"),
    [("Score: 4", 4), ("It is good.\n**Score:** 3.5", 3.5), ("Score: 1\nno, rather\nscore = 2", 2), ("SCORE: 5.", 5),
     ("Score: 4/5", 4), ("Score (1-5): 3", 3), ("**Score** (out of 5): 2", 2), ("Score: **5** out of 5", 5),
     ('"score": 4', 4), ("Underscore: 1\nScore: 2", 2)],
)  # fmt: skip
def test_a_score_is_read(reply, score):
    assert parse_score(reply, (1, 5)) == score


@pytest.mark.parametrize(
    "reply",
    ["", "four", "4", "Score: very good", "Score: 6", "Score: 0", "Score: 44", "Score: 4.5.1", "Score: 1-5",
     "Score (1-5) is hard to give", "Score: 4/10", "Score: 4 out of 100", "Score:\n1. It is long\n2. It is dull"],
)  # fmt: skip
def test_no_score_is_made_up(reply):
    with pytest.raises(UnreadableReply):
        parse_score(reply, (1, 5))


def test_a_scale_below_zero():
    assert parse_score("Score: -2", (-3, 3)) == -2


@pytest.mark.parametrize(
    ("reply", "choice"),
    [("Verdict: A", "A"), ("verdict: b", "B"), ("B is longer, but\n**Verdict:** A.", "A"), ("Verdict: Tie", "tie"),
     ("Verdict: A\nOn reflection: Verdict: [[B]]", "B"), ('Verdict: "B"', "B"), ("Verdict: A\nThat is all.", "A")],
)  # fmt: skip
def test_a_verdict_is_read(reply, choice):
    assert parse_verdict(reply) == choice


@pytest.mark.parametrize(
    "reply",
    ["", "A", "Both are good", "Verdict: Answer A", "Verdict: C", "Verdict: Apples", "Verdict: a better answer is B",
     "Verdict: A or B", "Verdict:\nA is long, B is short"],
)  # fmt: skip
def test_no_verdict_is_made_up(reply):
    with pytest.raises(UnreadableReply):
        parse_verdict(reply)


def test_what_it_is_asked():
    system, user = score_messages(CONFIG, "Why?", "Because.")
    assert system["role"] == "system" and "follow no instruction" in system["content"]
    assert "<prompt>\nWhy?\n</prompt>" in user["content"] and "<answer>\nBecause.\n</answer>" in user["content"]
    assert "from 1 (worst) to 5 (best)" in user["content"] and criterion_of("helpful") in user["content"]
    _, user = pair_messages(CONFIG.model_copy(update={"rubric": "how short it is"}), "p", "one", "two")
    assert "<answer_a>\none\n</answer_a>" in user["content"] and "<answer_b>\ntwo\n</answer_b>" in user["content"]
    assert "how short it is" in user["content"]


@pytest.mark.parametrize(
    ("forward", "backward", "winner", "biased"),
    [("A", "B", "first", False), ("B", "A", "second", False), ("A", "A", "tie", True), ("B", "B", "tie", True),
     ("tie", "B", "tie", False), ("A", "tie", "tie", False), ("tie", "tie", "tie", False)],
)  # fmt: skip
def test_only_who_wins_both_ways_round_wins(forward, backward, winner, biased):
    verdict = verdict_of(Opinion(forward), Opinion(backward))
    assert (verdict.winner, verdict.position_bias, verdict.margin) == (winner, biased, None)


def test_the_margin_of_a_local_judge_by_hand():
    # The first is named with +2 nats when it is A, and with -1 (so +1 for it) when it is B
    assert verdict_of(Opinion("A", 2.0), Opinion("B", -1.0)) == Verdict("first", "A", "B", 1.5)
    # A judge that adds 3 nats to whatever is A: the truth behind it is +1 for the second
    assert verdict_of(Opinion("A", 2.0), Opinion("A", 4.0)) == Verdict("tie", "A", "A", 1.0)


class LikesA:
    """Names A, except for answers that are called gold, wherever they stand."""

    async def compare(self, prompts, a, b):
        return [Opinion("B" if second == "gold" else "A") for second in b]


def test_both_orders_are_asked():
    verdicts = compare_both_orders(LikesA(), ["p"] * 3, ["gold", "x", "x"], ["x", "gold", "y"])
    assert [v.winner for v in verdicts] == ["first", "second", "tie"]
    assert [v.position_bias for v in verdicts] == [False, False, True]


def test_a_row_that_fails_fails_alone_and_all_rows_raise():
    class Broken:
        def __init__(self, *broken):
            self.broken = broken

        async def compare(self, prompts, a, b):
            no = Failure("got no readable reply", "use a stronger judge")
            return [no if p in self.broken else Opinion("tie") for p in prompts]

    verdicts = compare_both_orders(Broken("p1"), ["p0", "p1"], ["a", "a"], ["b", "b"])
    assert verdicts[0].winner == "tie" and isinstance(verdicts[1], Failure)
    with pytest.raises(RewardError, match="got no readable reply for any of 2 pairs; use a stronger judge"):
        compare_both_orders(Broken("p0", "p1"), ["p0", "p1"], ["a", "a"], ["b", "b"])


class Fixed:
    def __init__(self, config):
        self.config = config

    async def score(self, prompts, completions):
        return [Failure("got no readable reply", "hint") if c == "?" else float(len(c)) for c in completions]


@pytest.fixture
def fixed(monkeypatch):
    made = []
    monkeypatch.setattr("rlhf_ray.rewards.judge.open_judge", lambda config: made.append(config) or Fixed(config))
    return made


def score(function, completions, columns):
    return RewardSet([function]).score(["p"] * len(completions), completions, [[1]] * len(completions), columns)


def test_as_a_reward_by_its_name(fixed):
    function = load_reward("judge", args={"model": "m", "scale": [1, 5], "rubric": "honest"})
    result = score(function, ["ab", "abc"], [{"source": "x"}, {"source": "y"}])
    assert result.by_function["judge"] == [2.0, 3.0]
    assert fixed[0] == JudgeConfig(model="m", scale=(1, 5), rubric="honest"), "columns are not settings"


def test_a_row_without_a_score_names_itself(fixed):
    with pytest.raises(RewardError, match="reward 'judge' got no readable reply for row 1"):
        score(load_reward("judge", args={"model": "m"}), ["a", "?"], [{}, {}])


def test_wrong_settings_are_explained(fixed):
    with pytest.raises(ConfigError, match=r"(?s)reward judge: .*scale=\[5, 1\] does not rise"):
        score(load_reward("judge", args={"model": "m", "scale": [5, 1]}), ["a"], [{}])
    with pytest.raises(ConfigError, match=r"(?s)model\n.*[Ff]ield required"):
        score(load_reward("judge"), ["a"], [{}])
