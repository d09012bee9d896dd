"""Rewards to advantages on batches small enough to work by hand."""

import pytest
import torch

from rlhf_ray.config.algorithm import PRESETS, AlgorithmConfig
from rlhf_ray.errors import DataError
from rlhf_ray.roles.advantages import AdvantageEstimator


def estimator(**settings) -> AdvantageEstimator:
    return AdvantageEstimator(AlgorithmConfig(**settings))


@pytest.fixture
def four(batch_of):
    """Two groups of two: completions of 2, 1, 1 and 2 tokens behind a prompt of one."""
    batch = batch_of([((2,), (3, 1)), ((2,), (4,)), ((5,), (6,)), ((5,), (7, 1))])
    return batch.replace(score=torch.tensor([1.0, 0.0, 2.0, 2.0]))


def test_grpo(four):
    # Group 0: mean 0.5, standard deviation (n-1) 0.70711: +-0.5/0.70721 = +-0.70701. Group 1: all equal, 0.
    result = estimator().estimate(four, 0.0)
    expected = 0.5 / (0.5**0.5 + 1e-4)
    assert result.columns["advantages"].tolist() == pytest.approx([expected, -expected, 0, 0]), "a number an answer"
    assert set(result.columns) == {"advantages"}, "no critic, no returns"
    assert result.stats["advantage/mean"] == pytest.approx(expected / 6), "over 6 tokens: 2 up, 1 down, 3 at 0"


def test_grpo_without_the_standard_deviation(four):
    result = estimator(normalize_std=False).estimate(four, 0.0)
    assert result.columns["advantages"].tolist() == [0.5, -0.5, 0, 0]
    assert result.stats["advantage/mean"] == pytest.approx(0.5 / 6)
    # squares: 3 x (0.5 - 1/12)^2-ish; by hand sum x^2 = 0.75, mean 1/12, var = 0.125 - 1/144
    assert result.stats["advantage/std"] == pytest.approx((0.125 - 1 / 144) ** 0.5)


def test_groups_are_found_by_prompt_not_by_place(four):
    mixed = four.select([0, 2, 1, 3])
    result = estimator(normalize_std=False).estimate(mixed, 0.0).columns["advantages"]
    assert result.tolist() == [0.5, 0.0, -0.5, 0.0]


def test_rloo_and_reinforce(four):
    rloo = estimator(name="rloo").estimate(four, 0.0).columns["advantages"]
    assert rloo.tolist() == [1.0, -1.0, 0.0, 0.0], "against the other one"
    batch_mean = estimator(name="reinforce").estimate(four, 0.0).columns["advantages"]
    assert batch_mean.tolist() == [-0.25, -1.25, 0.75, 0.75], "mean 1.25"


def test_gae(four):
    """gamma 0.5, lambda 0.5, row 0: tokens at 1 and 2 with values 2 and 3, reward 1 on the last."""
    values = torch.tensor([[9.0, 2.0, 3.0], [9.0, 1.0, 9.0], [9.0, 0.0, 9.0], [9.0, 0.0, 0.0]])
    result = estimator(name="ppo", gamma=0.5, lam=0.5, whiten_advantages=False).estimate(
        four.replace(values=values), 0.0
    )
    # row 0: delta_2 = 1 - 3 = -2; delta_1 = 0 + 0.5*3 - 2 = -0.5; A_1 = -0.5 + 0.25*(-2) = -1
    # row 1: A = 0 - 1 = -1. row 2: A = 2. row 3: delta_2 = 2, A_1 = 0 + 0.25*2 = 0.5
    assert result.columns["advantages"].tolist() == [[0, -1, -2], [0, -1, 0], [0, 2, 0], [0, 0.5, 2]]
    assert result.columns["returns"].tolist() == [[0, 1, 1], [0, 0, 0], [0, 2, 0], [0, 0.5, 2]]
    # values 2 3 1 0 0 0 against returns 1 1 0 2 .5 2: Var(returns) = 10.25/6 - (6.5/6)^2 = 0.534722,
    # errors -1 -2 -1 2 .5 2: squares 14.25/6 - (0.5/6)^2 = 2.368056
    assert result.stats["value/explained_variance"] == pytest.approx(1 - 2.368056 / 0.534722, rel=1e-5)


def test_whitening(four):
    result = estimator(normalize_std=False, whiten_advantages=True).estimate(four, 0.0)
    inside = result.columns["advantages"].repeat_interleave(torch.tensor([2, 1, 1, 2]))
    assert float(inside.mean()) == pytest.approx(0, abs=1e-6) and float(inside.std()) == pytest.approx(1, rel=1e-5)
    assert result.stats["advantage/mean"] == pytest.approx(0, abs=1e-6)
    assert result.stats["advantage/std"] == pytest.approx((5 / 6) ** 0.5), "without Bessel's correction"


def with_logps(batch):
    """log-ratios to the reference: 0.5 a token in row 0, 1 in row 1, none elsewhere."""
    old = -torch.ones(batch.tokens.shape)
    gap = torch.tensor([0.5, 1.0, 0.0, 0.0])[:, None]
    return batch.replace(logp_old=old, logp_ref=old - gap)


def test_kl_in_the_reward_of_a_whole_answer(four):
    """k1: row 0 pays 0.1 * (0.5 + 0.5), row 1 pays 0.1 * 1: rewards 0.9 and -0.1."""
    result = estimator(name="rloo", kl_in="reward", kl_estimator="k1", kl_coef=0.1).estimate(with_logps(four), 0.1)
    assert result.columns["advantages"].tolist() == pytest.approx([1.0, -1.0, 0.0, 0.0])
    dearer = estimator(name="reinforce", kl_in="reward", kl_estimator="k1", kl_coef=0.1)
    result = dearer.estimate(with_logps(four), 0.5)  # the present coefficient counts, not the first one
    assert result.columns["advantages"].tolist() == pytest.approx([-0.5, -1.5, 1.0, 1.0]), "0.5 -0.5 2 2, mean 1"


def test_kl_in_the_reward_of_each_token(four):
    """gamma = lambda = 1, values 0: advantages are the rewards to come. Row 0: -0.05, then 1 - 0.05."""
    batch = with_logps(four).replace(values=torch.zeros(4, 3))
    settings = {"name": "ppo", "lam": 1.0, "whiten_advantages": False, "kl_coef": 0.1}
    result = estimator(**settings).estimate(batch, 0.1).columns["advantages"]
    assert result[0].tolist() == pytest.approx([0, 0.9, 0.95]) and result[1].tolist() == pytest.approx([0, -0.1, 0])
    plain = estimator(**settings, kl_in="loss").estimate(batch, 0.1).columns["advantages"]
    assert plain[0].tolist() == [0, 1, 1], "a KL in the loss is not in the reward"


def test_reinforce_pp_whitens_token_returns(four):
    result = estimator(name="reinforce_pp", kl_coef=0.0).estimate(four, 0.0).columns["advantages"]
    raw = torch.tensor([1.0, 1.0, 0.0, 2.0, 2.0, 2.0])
    expected = (raw - raw.mean()) / raw.std()
    assert result[four.response_mask].tolist() == pytest.approx(expected.tolist(), rel=1e-4)


def test_rewards_are_clipped(four):
    batch = four.replace(score=torch.tensor([5.0, -7.0, 0.5, 0.0]))
    result = estimator(name="rloo", reward_clip=2.0).estimate(batch, 0.0).columns["advantages"]
    assert result.tolist() == [4.0, -4.0, 0.5, -0.5]


def test_rewards_are_divided_by_their_running_standard_deviation(four):
    scale = estimator(name="rloo", normalize_rewards="running")
    batch = four.replace(score=torch.tensor([0.0, 2.0, 0.0, 2.0]))  # std 1.1547
    result = scale.estimate(batch, 0.0).columns["advantages"]
    assert result.tolist() == pytest.approx([-3**0.5, 3**0.5, -3**0.5, 3**0.5])
    scale.estimate(four.replace(score=torch.tensor([4.0, 6.0, 4.0, 6.0])), 0.0)
    moments = scale.reward_moments.sources["all"]
    assert moments.count == 8 and moments.mean == 3.0 and moments.std == pytest.approx((40 / 7) ** 0.5)


def test_each_source_has_a_scale_of_its_own(four):
    columns = tuple({"data_source": name} for name in ("easy", "easy", "hard", "hard"))
    batch = four.replace(score=torch.tensor([0.0, 2.0, 0.0, 200.0]), columns=columns)
    own = estimator(name="rloo", normalize_rewards="source")
    assert own.estimate(batch, 0.0).columns["advantages"].tolist() == pytest.approx([-(2**0.5), 2**0.5] * 2)
    with pytest.raises(DataError, match="no column 'kind'.*'data_source'.*set algorithm.source_field"):
        estimator(name="rloo", normalize_rewards="source", source_field="kind").estimate(batch, 0.0)


def test_rewards_normalised_in_each_group(four):
    batch = four.replace(score=torch.tensor([0.0, 2.0, 0.0, 200.0]))
    result = estimator(name="reinforce", normalize_rewards="group").estimate(batch, 0.0).columns["advantages"]
    assert result.tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5] * 2, rel=1e-3)


def test_a_moving_baseline_knows_the_past_only(four):
    moving = estimator(name="reinforce", moving_baseline=True)
    first = moving.estimate(four, 0.0).columns["advantages"]
    assert first.tolist() == [1, 0, 2, 2], "no past, no baseline"
    second = moving.estimate(four, 0.0).columns["advantages"]
    assert second.tolist() == pytest.approx([-0.25, -1.25, 0.75, 0.75]), "the mean of the first step was 1.25"
    other = estimator(name="reinforce", moving_baseline=True)
    other.load_state_dict(moving.state_dict())
    assert other.moving_baseline == moving.moving_baseline and other.moving_baseline.updates == 2


def test_remax_subtracts_the_reward_of_the_greedy_answer(four):
    batch = four.replace(baseline=torch.tensor([0.5, 0.5, 3.0, 3.0]))
    plain = estimator(name="remax").estimate(batch, 0.0).columns["advantages"]
    assert plain.tolist() == [0.5, -0.5, -1.0, -1.0]
    bounded = estimator(name="remax", reward_clip=1.0).estimate(batch, 0.0).columns["advantages"]
    assert bounded.tolist() == [0.5, -0.5, 0.0, 0.0], "both are shaped alike"
    scaled = estimator(name="remax", normalize_rewards="running").estimate(batch, 0.0).columns["advantages"]
    std = float(four.score.std())
    assert scaled.tolist() == pytest.approx([0.5 / std, -0.5 / std, -1 / std, -1 / std])


def test_clipping_comes_after_the_division(four):
    batch = four.replace(score=torch.tensor([0.0, 2000.0, 0.0, 2000.0]))
    result = estimator(name="rloo", normalize_rewards="running", reward_clip=1.0).estimate(batch, 0.0)
    assert result.columns["advantages"].tolist() == [-1.0, 1.0, -1.0, 1.0]


def test_equal_rewards_have_no_scale(four):
    for score in (0.0, 3.0):
        scale = estimator(name="reinforce", normalize_rewards="running")
        batch = four.replace(score=torch.full((4,), score))
        assert scale.estimate(batch, 0.0).columns["advantages"].tolist() == [0.0] * 4
    ppo = estimator(name="ppo", normalize_rewards="running", whiten_advantages=False, lam=1.0)
    batch = four.replace(score=torch.full((4,), 3.0), values=torch.zeros(4, 3))
    assert ppo.estimate(batch, 0.0).columns["advantages"][1].tolist() == [0, 3.0, 0], "taken as they are"


def test_the_state_goes_through_a_checkpoint(four):
    one = estimator(normalize_rewards="running")
    one.estimate(four, 0.0)
    other = estimator(normalize_rewards="running")
    other.load_state_dict(one.state_dict())
    assert other.reward_moments == one.reward_moments and other.reward_moments.sources["all"].count == 4
    later = four.replace(score=torch.tensor([3.0, 1.0, 0.0, 5.0]))
    mine, theirs = one.estimate(later, 0.0), other.estimate(later, 0.0)
    assert torch.equal(mine.columns["advantages"], theirs.columns["advantages"])
    assert all(isinstance(x, (int, float)) for x in one.state_dict()["reward_moments"]["all"].values())


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_gives_finite_advantages(four, name):
    batch = with_logps(four).replace(values=torch.zeros(4, 3), baseline=torch.tensor([0.5, 0.5, 1.0, 1.0]))
    advantages = estimator(name=name).estimate(batch, 0.1).columns["advantages"]
    assert advantages.isfinite().all() and advantages.abs().sum() > 0
    if advantages.dim() == 2:
        assert (advantages[~batch.response_mask] == 0).all()


def test_pass_at_k(batch_of):
    batch = batch_of([((2,), (3,))] * 3, group=3).replace(score=torch.tensor([0.0, 1.0, 0.0]))
    result = estimator(advantage="pass_at_k", k=2).estimate(batch, 0.0).columns["advantages"]
    assert result.tolist() == pytest.approx([0.0, 2.0, 0.0]), "3/C(3,2) * 2 pairs that it wins alone"
