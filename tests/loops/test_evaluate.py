import math

import pytest
import torch

from rlhf_ray.data.prompt_sources import joined, named
from rlhf_ray.loops.evaluate import Evaluator, numbers_of
from rlhf_ray.roles.protocols import Sampling, Scores
from rlhf_ray.sample import sample_seed

GREEDY = Sampling(4, temperature=0)


@pytest.fixture
def evaluator(generator, reward, prompts):
    return Evaluator(generator, reward, prompts, GREEDY, seed=3)


def test_the_numbers_by_hand(evaluator, generator):
    result = evaluator.evaluate(0)
    samples = result.pop("samples")
    assert result == pytest.approx({
        "reward": 2.0, "reward/row": 2.0, "reward/half": 1.0, "response_len": 1.0, "truncated_frac": 0.0,
        # "answer 0" ... "answer 4": 6 different words of 10, 5 pairs of 5
        "distinct_1": 0.6, "distinct_2": 1.0,
        # 5 6, 5 7, 5 6, 5 7, 5 6
        "distinct_1_tokens": 0.3, "distinct_2_tokens": 0.4,
    })  # fmt: skip
    assert samples[1] == {"prompt": "p1", "completion": "answer 1", "reward": 1.0} and len(samples) == 5
    assert generator.sampling == [GREEDY] and generator.awake == 0


def test_every_evaluation_asks_the_same_and_no_training_step_does(evaluator, generator):
    evaluator.evaluate(0)
    evaluator.evaluate(0)
    assert generator.asked[0] == generator.asked[1]
    training = {sample_seed(3, position, member) for position in range(200) for member in range(8)}
    assert not training & {r.seed for r in generator.asked[0]}


def test_accuracy_is_of_the_reward_that_says_what_is_right(evaluator, reward):
    right = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])
    reward.score = lambda batch, texts: Scores(right * 2, {"exact": right, "format": right * 0}, (("p", "c"),) * 5)
    assert "accuracy" not in evaluator.evaluate(0), "that all rewards are 0 or 1 may be chance"
    evaluator.right = "exact"
    result = evaluator.evaluate(0)
    assert result["accuracy"] == pytest.approx(0.6)
    assert result["reward"] == pytest.approx(1.2) and result["reward/format"] == 0.0


def test_a_function_called_reward_does_not_hide_the_sum(evaluator, reward):
    values = torch.ones(5)
    reward.score = lambda batch, texts: Scores(values * 0.5, {"reward": values * 3}, (("p", "c"),) * 5)
    result = evaluator.evaluate(0)
    assert result["reward"] == 0.5 and result["reward/reward"] == 3.0


def test_at_most_ten_samples_are_kept(generator, reward, prompts):
    from rlhf_ray.data.prompts import PromptSet

    many = PromptSet(prompts.examples * 3, prompts.token_ids * 3, {})
    assert len(Evaluator(generator, reward, many, GREEDY, seed=0).evaluate(0)["samples"]) == 10


def test_only_numbers_become_metrics():
    metrics = numbers_of({"reward": 1.5, "samples": [{}], "name": "x", "distinct_1": math.nan}, "eval/")
    assert metrics["eval/reward"] == 1.5 and set(metrics) == {"eval/reward", "eval/distinct_1"}


def test_each_source_is_judged_by_itself_and_shown(generator, reward, prompts):
    mixed = joined([named(prompts.slice(0, 3), "math"), named(prompts.slice(3, 5), "chat")])
    result = Evaluator(generator, reward, mixed, GREEDY, seed=3).evaluate(0)
    assert result["source/math/reward"] == 1.0 and result["source/chat/reward"] == 3.5  # 0, 1, 2 and 3, 4
    assert result["source/chat/reward/half"] == 1.75 and result["reward"] == 2.0
    assert [sample["prompt"] for sample in result["samples"]] == ["p0", "p3", "p1", "p4", "p2"], "in turn"
    assert [sample["reward"] for sample in result["samples"]] == [0, 3, 1, 4, 2]
