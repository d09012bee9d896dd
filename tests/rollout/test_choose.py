"""Which answers are asked for and which of them the learner sees, with a generator and a reward that answer at once."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from rlhf_ray.config.algorithm import AlgorithmConfig
from rlhf_ray.config.schema import RolloutConfig
from rlhf_ray.errors import DivergenceError, RewardError
from rlhf_ray.roles.batch import build_batch
from rlhf_ray.roles.protocols import Sampling, Scores
from rlhf_ray.rollout.source import Rollouts
from rlhf_ray.run.timer import Timer

SAMPLING = Sampling(4, temperature=0.5, stop_token_ids=(1,))


class ScriptedReward:
    """`by_prompt[prompt_id]`: the rewards of its members in order; None: nobody can judge it."""

    def __init__(self, by_prompt: dict[int, list[float | None]]) -> None:
        self.by_prompt = by_prompt
        self.judged: list[list[int]] = []

    def score(self, batch, texts=0):
        ids = batch.prompt_id.tolist()
        self.judged.append(ids)
        members = {prompt: iter(self.by_prompt[prompt]) for prompt in set(ids)}
        values = [next(members[prompt]) for prompt in ids]
        bad = {prompt for prompt, value in zip(ids, values, strict=True) if value is None}
        score_B = torch.tensor([float("nan") if value is None else value for value in values])
        pairs = tuple((f"p{prompt}", f"answer {row}") for row, prompt in enumerate(ids))
        return Scores(
            score_B, {"script": score_B}, pairs[:texts], keep=torch.tensor([prompt not in bad for prompt in ids]),
            stats={"fault/dropped": float(len(bad))},
            events=tuple({"reason": f"prompt {prompt}"} for prompt in sorted(bad)),
        )  # fmt: skip


@pytest.fixture
def rollouts(generator, prompts):
    """make(rewards by prompt, algorithm settings, rollout settings)"""

    def make(by_prompt, algorithm=None, answers=(), **rollout) -> Rollouts:
        config = RolloutConfig(**{"prompts_per_step": 2, "group_size": 2, **rollout})
        return Rollouts(
            generator, ScriptedReward(by_prompt), dataclasses.replace(prompts, answers=answers), config, SAMPLING,
            algorithm=AlgorithmConfig(**(algorithm or {})), seed=7, timer=Timer(), texts=9, steps=5,
        )  # fmt: skip

    return make


def books(rollouts: Rollouts) -> dict[str, tuple[int, int]]:
    """What the ledger says that is not 0, as (samples, tokens); every answer of the fake generator is one token."""
    counts = {name: (count.samples, count.tokens) for name, count in rollouts.ledger.counts().items()}
    return {name: pair for name, pair in counts.items() if any(pair)}


# ---- dynamic sampling -----------------------------------------------------------------------------------------

SAME, MIXED = [1.0, 1.0], [0.0, 1.0]


def test_groups_without_signal_make_room_for_the_next_prompts(rollouts):
    here = rollouts({0: SAME, 1: MIXED, 2: SAME, 3: MIXED, 4: SAME, 5: MIXED}, {"resample_rounds": 3})
    scored = here.next(0)
    assert here.reward.judged == [[0, 0, 1, 1], [2, 2], [3, 3]], "only as many as are missing"
    assert scored.batch.prompt_id.tolist() == [1, 1, 3, 3] and scored.batch.score.tolist() == [0, 1, 0, 1]
    assert scored.batch.sample_id.tolist() == [2, 3, 6, 7]
    assert [text for text, _ in scored.scores.texts] == ["p1", "p1", "p3", "p3"], "of the rows that are there"
    assert here.state_dict()["position"] == 4, "0 and 2 are used up, 4 was not asked"
    assert scored.metrics["groups/asked"] == 4 and scored.metrics["groups/informative"] == 1
    assert scored.metrics["reward/mean"] == 6 / 8, "of all that the policy wrote: 1 1, 0 1, 1 1, 0 1"
    assert scored.metrics["groups/mixed"] == 0.5
    assert books(here) == {"sampled": (8, 8), "learned": (4, 4), "filtered": (4, 4)}


def test_out_of_rounds_the_step_keeps_its_size(rollouts):
    here = rollouts({0: SAME, 1: SAME, 2: MIXED, 3: SAME, 4: SAME}, {"resample_rounds": 1})
    scored = here.next(0)
    assert scored.batch.prompt_id.tolist() == [0, 0, 2, 2], "the first of those without signal"
    assert scored.metrics["groups/informative"] == 0.5 and here.state_dict()["position"] == 4


def test_without_dynamic_sampling_nothing_is_asked_again(rollouts):
    here = rollouts({0: SAME, 1: MIXED})
    scored = here.next(0)
    assert scored.batch.prompt_id.tolist() == [0, 0, 1, 1] and here.state_dict()["position"] == 2
    assert "groups/asked" not in scored.metrics


def test_a_resumed_run_asks_the_same_prompts(rollouts, generator):
    script = {i: SAME if i % 3 else MIXED for i in range(40)}
    whole = rollouts(script, {"resample_rounds": 2})
    steps = [whole.next(step).batch.prompt_id.tolist() for step in range(4)]
    first = rollouts(script, {"resample_rounds": 2})
    for step in range(2):
        first.next(step)
    second = rollouts(script, {"resample_rounds": 2})
    second.load_state_dict(first.state_dict())
    assert [second.next(step).batch.prompt_id.tolist() for step in (2, 3)] == steps[2:]
    asked = [prompt for call in whole.reward.judged for prompt in call]
    assert sorted(set(asked)) == list(range(len(set(asked)))), "none left out"
    assert len(asked) == 2 * len(set(asked)), "none asked twice"


def test_running_ahead_asks_the_same_prompts(rollouts, generator):
    script = {i: SAME if i % 3 else MIXED for i in range(60)}
    here = rollouts(script, {"resample_rounds": 2})
    expected = [here.next(step).batch.prompt_id.tolist() for step in range(5)]
    first = rollouts(script, {"resample_rounds": 2})
    first.next(0)  # a run that stopped after its first step
    ahead = rollouts(script, {"resample_rounds": 2}, max_staleness=1)
    ahead.load_state_dict(first.state_dict())
    try:
        for step in range(1, 5):
            ahead.finish_writing()
            ahead.weights_changed(step)
            assert ahead.next(step).batch.prompt_id.tolist() == expected[step]
        assert ahead.ledger.state_dict() == here.ledger.state_dict()
    finally:
        ahead.close()


# ---- groups that nobody could judge ---------------------------------------------------------------------------


def test_a_group_with_a_failed_row_leaves_the_batch(rollouts):
    here = rollouts({0: [1.0, None], 1: MIXED})
    scored = here.next(0)
    assert scored.batch.prompt_id.tolist() == [1, 1] and scored.scores.score.tolist() == [0, 1]
    assert scored.metrics["reward/mean"] == 0.5 and scored.metrics["fault/dropped"] == 1
    assert scored.scores.events == ({"reason": "prompt 0"},)
    assert books(here) == {"sampled": (4, 4), "learned": (2, 2), "failed": (2, 2)}


def test_dynamic_sampling_replaces_it_too(rollouts):
    here = rollouts({0: [None, None], 1: MIXED, 2: MIXED}, {"resample_rounds": 1})
    scored = here.next(0)
    assert scored.batch.prompt_id.tolist() == [1, 1, 2, 2] and scored.metrics["groups/informative"] == 1


def test_no_group_left_is_an_error(rollouts):
    here = rollouts({0: [None, 1.0], 1: [1.0, None]})
    with pytest.raises(RewardError, match=r"step 1: no group of answers was judged in full.*\(prompt 0; prompt 1\)"):
        here.next(0)


# ---- groups whose log-probabilities are not numbers -----------------------------------------------------------


def breaks(generator, monkeypatch, *sample_ids: int, value: float = float("nan")) -> None:
    """The generator says this of every token of these samples."""
    generate = generator.generate

    def broken(requests, sampling):
        batch = generate(requests, sampling)
        row_B = torch.isin(batch.sample_id, torch.tensor(sample_ids))
        return batch.replace(logp_gen=batch.logp_gen.masked_fill(row_B[:, None] & batch.response_mask, value))

    monkeypatch.setattr(generator, "generate", broken)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_group_with_log_probabilities_that_are_not_finite_leaves_the_batch(rollouts, generator, monkeypatch, value):
    breaks(generator, monkeypatch, 1, value=value)
    here = rollouts({0: MIXED, 1: MIXED})
    scored = here.next(0)
    assert scored.batch.prompt_id.tolist() == [1, 1] and scored.batch.logp_gen.isfinite().all()
    assert scored.metrics["fault/not_finite"] == 1 and scored.metrics["reward/mean"] == 0.5
    assert books(here) == {"sampled": (4, 4), "learned": (2, 2), "failed": (2, 2)}
    reason = "the generator: 1 answers have log-probabilities that are not finite; the groups of prompts 0 are left out"
    [event] = scored.scores.events
    assert event == {
        "kind": "not_finite", "worker": "the generator", "action": "drop_group", "rows": 1, "prompts": [0],
        "reason": reason,
    }  # fmt: skip


def test_dynamic_sampling_replaces_a_group_that_is_not_finite(rollouts, generator, monkeypatch):
    breaks(generator, monkeypatch, 0)
    here = rollouts({0: MIXED, 1: MIXED, 2: MIXED}, {"resample_rounds": 1})
    assert here.next(0).batch.prompt_id.tolist() == [1, 1, 2, 2]


def test_nothing_but_such_groups_is_a_run_that_has_diverged(rollouts, generator, monkeypatch):
    breaks(generator, monkeypatch, 0, 3)
    with pytest.raises(DivergenceError, match="step 1: every group .* not finite.*the groups of prompts 0, 1 are left"):
        rollouts({0: MIXED, 1: MIXED}).next(0)


def test_with_finite_ones_the_count_is_zero(rollouts):
    scored = rollouts({0: MIXED, 1: MIXED}).next(0)
    assert scored.metrics["fault/not_finite"] == 0 and scored.scores.events == ()


# ---- DAPO's length penalty ------------------------------------------------------------------------------------


def test_overlong_answers_lose_reward(rollouts, generator):
    """At most 4 tokens, the last half is the buffer: 2 tokens cost nothing, 3 cost 1/2, 4 cost 1."""
    script = {0: [1.0, 1.0, 0.0, 1.0]}
    here = rollouts(script, {"overlong_buffer": 0.5, "resample_rounds": 1}, prompts_per_step=1, group_size=4)
    answers = [[5] * length for length in (1, 2, 3, 4)]
    generator.generate = lambda requests, sampling: build_batch(
        requests, answers, answers, truncated=[False] * 4, weight_version=0
    )
    scored = here.next(0)
    assert scored.scores.score.tolist() == [1.0, 1.0, -0.5, 0.0]
    assert scored.batch.score.tolist() == [1.0, 1.0, -0.5, 0.0]
    assert scored.scores.by_function["overlong_penalty"].tolist() == [0.0, 0.0, -0.5, -1.0]
    assert scored.metrics["reward/mean"] == 0.75 and scored.metrics["reward/overlong_penalty"] == -0.375


def test_the_penalty_does_not_make_a_group_informative(rollouts, generator):
    script = {0: SAME, 1: MIXED}
    here = rollouts(script, {"overlong_buffer": 1.0, "resample_rounds": 1}, prompts_per_step=1)
    assert here.next(0).batch.prompt_id.tolist() == [1, 1], "right or wrong decides, as in the paper"


# ---- ReMax ----------------------------------------------------------------------------------------------------


def test_the_greedy_answer_is_the_baseline_and_is_not_learned_from(rollouts, generator):
    here = rollouts({0: [0.0, 1.0, 0.25], 1: [1.0, 1.0, 0.75]}, {"name": "remax"})
    scored = here.next(0)
    asked = generator.asked[0]
    assert [r.temperature for r in asked] == [None, None, 0.0, None, None, 0.0]
    assert len({r.sample_id for r in asked}) == 6
    assert scored.batch.sample_id.tolist() == [0, 1, 3, 4]
    assert scored.batch.score.tolist() == [0, 1, 1, 1] and scored.batch.baseline.tolist() == [0.25, 0.25, 0.75, 0.75]
    assert scored.metrics["reward/mean"] == 0.75, "of the sampled ones"
    assert books(here) == {"sampled": (6, 6), "learned": (4, 4), "baseline": (2, 2)}


def test_a_prompt_whose_greedy_answer_cannot_be_judged_is_dropped(rollouts):
    scored = rollouts({0: [0.0, 1.0, None], 1: [1.0, 0.0, 0.5]}, {"name": "remax"}).next(0)
    assert scored.batch.prompt_id.tolist() == [1, 1] and scored.batch.baseline.tolist() == [0.5, 0.5]


# ---- temperatures of the members ------------------------------------------------------------------------------


def test_members_take_the_temperatures_in_turn(rollouts, generator):
    scored = rollouts({0: [0.0, 1.0, 0.0], 1: [1.0, 1.0, 0.0]}, group_size=3, temperatures=[0.5, 2.0]).next(0)
    assert [r.temperature for r in generator.asked[0]] == [0.5, 2.0, 0.5] * 2
    assert scored.batch.temperature.tolist() == [0.5, 2.0, 0.5] * 2


# ---- mixed groups ---------------------------------------------------------------------------------------------

POOLS = tuple(((10 + i, 1), (20 + i, 5, 1)) for i in range(5))


def test_the_last_members_come_from_the_pool(rollouts, generator):
    here = rollouts(dict.fromkeys(range(12), MIXED), answers=POOLS, reference_answers=1)
    here.next(0)
    first = generator.asked[0]
    assert [r.answer is None for r in first] == [True, False, True, False]
    index = int(first[1].columns["answer"])
    assert first[1].answer == (10 + index, 1)
    # The fake writes one token in the place of every answer.
    assert books(here) == {"sampled": (2, 2), "learned": (2, 2), "given": (2, 2)}
    here.load_state_dict({"position": 5})  # the second epoch
    here.next(0)
    again = generator.asked[1][1]
    assert again.answer == (20 + int(again.columns["answer"]), 5, 1), "goes on in the pool"


def test_temperatures_are_those_of_the_sampled_members(rollouts):
    here = rollouts({0: MIXED, 1: MIXED}, answers=POOLS, reference_answers=1, temperatures=[2.0])
    assert here.next(0).batch.temperature.tolist() == [2.0, 0.5, 2.0, 0.5], "a given answer: rollout.temperature"
