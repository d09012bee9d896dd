"""A loss and an advantage that a user has written."""

import math

import pytest
import torch

from rlhf_ray.config.algorithm import AlgorithmConfig
from rlhf_ray.errors import ConfigError
from rlhf_ray.roles.formulas import GroupAdvantage, Loss, own_formulas

OWN = """
import torch
from dataclasses import dataclass

def mine(logp_BT, old_BT, adv_BT, mask_BT, *, clip_high, power=2.0):
    ratio_BT = (logp_BT - old_BT).exp()
    return -ratio_BT.clamp(max=1 + clip_high) * adv_BT * power, {"far": (ratio_BT - 1).abs()}

def to_the_median(reward_B, group_B, *, scale=1.0):
    median_B = torch.stack([reward_B[group_B == group].median() for group in group_B])
    return scale * (reward_B - median_B)

def constant(logp_BT, old_BT, adv_BT, mask_BT): return -adv_BT
def detached(logp_BT, old_BT, adv_BT, mask_BT): return -logp_BT.detach() * adv_BT
def mean(logp_BT, old_BT, adv_BT, mask_BT): return (-logp_BT * adv_BT).mean()
def across(logp_BT, old_BT, adv_BT, mask_BT): return -logp_BT * (adv_BT - adv_BT.mean())
def infinite(logp_BT, old_BT, adv_BT, mask_BT): return -logp_BT / (logp_BT - logp_BT)
def fails(logp_BT, old_BT, adv_BT, mask_BT): return logp_BT @ adv_BT
def three(logp_BT, old_BT, mask_BT): return -logp_BT
def needy(logp_BT, old_BT, adv_BT, mask_BT, *, beta): return -logp_BT * beta
def words(logp_BT, old_BT, adv_BT, mask_BT): return -logp_BT, {"kl": 0.5}
def one_number(reward_B, group_B): return reward_B.mean()
def none(reward_B, group_B): return (reward_B - reward_B) / (reward_B - reward_B)
number = 3
"""
CALLED = r"is called as f\(logp_BT, old_BT, adv_BT, mask_BT, \*, settings\)"


@pytest.fixture
def algorithm(tmp_path):
    (tmp_path / "own.py").write_text(OWN)

    def make(loss: str = "mine", advantage: str = "to_the_median", **settings) -> AlgorithmConfig:
        places = {"policy_loss": f"{tmp_path}/own.py:{loss}", "advantage": f"{tmp_path}/own.py:{advantage}"}
        return AlgorithmConfig.model_validate({**places, **settings})

    return make


def test_a_loss_by_hand(algorithm):
    loss = Loss(algorithm(clip_high=0.5, policy_loss_args={"power": 3.0}))
    assert loss.options == {"clip_high": 0.5, "power": 3.0}, "the algorithm's settings by name, and its own"
    # Ratios 2 and 1; what lies outside the mask may be anything.
    logp_BT = torch.tensor([[math.log(2.0), 0.0, -math.inf]], requires_grad=True)
    old_BT, adv_BT = torch.tensor([[0.0, 0.0, math.nan]]), torch.tensor([[1.0, -1.0, 7.0]])
    mask_BT = torch.tensor([[True, True, False]])
    loss_BT, own = loss(logp_BT, old_BT, adv_BT, mask_BT)
    assert loss_BT.tolist() == [[pytest.approx(-1.5 * 3), 3.0, 0.0]]
    loss_BT.sum().backward()
    assert logp_BT.grad.tolist() == [[0.0, 3.0, 0.0]], "ratio 2 is clipped at 1.5"
    stats = loss.stats(logp_BT.detach(), old_BT, mask_BT, adv_BT, own)
    assert loss.metrics({name: float(value) for name, value in stats.items()}) == {
        "ratio/mean": 1.5, "ratio/max": 2.0, "policy_loss/far": 0.5,
    }, "no clipfrac: nobody knows what it clips"  # fmt: skip


def test_built_in_losses_say_what_they_clip():
    loss = Loss(AlgorithmConfig.model_validate({"name": "dapo", "dual_clip": 3.0}))
    assert loss.options == {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0} == loss.clips.keywords
    assert Loss(AlgorithmConfig.model_validate({"name": "gspo"})).of_answers


def test_an_advantage_by_hand(algorithm):
    advantage = GroupAdvantage(algorithm(advantage_args={"scale": 2.0}))
    adv_B = advantage(torch.tensor([1.0, 0.0, 0.5, 4.0, 3.0, 9.0]), torch.tensor([5, 5, 5, 8, 8, 8]))
    assert adv_B.tolist() == [1.0, -1.0, 0.0, 0.0, -2.0, 10.0]


@pytest.mark.parametrize(("loss", "settings", "says"), [
    ("constant", {}, "has no gradient at logp_BT, so nothing would be learned; compute it from logp_BT"),
    ("detached", {}, "has no gradient at logp_BT"),
    ("mean", {}, r"the loss is a tensor of shape \[\]; return a tensor of shape \[2, 3\], a number for each token"),
    ("across", {}, "an answer is another beside other answers, so it would depend on how a step is split"),
    ("infinite", {}, "is not finite for ordinary numbers"),
    ("fails", {}, r"(?s)failed when it was tried as f\(logp_BT, old_BT, adv_BT, mask_BT\): Runtime.*own.py:\d+ in"),
    ("three", {}, f"{CALLED}, and it has too many positional arguments; its own settings are algorithm.policy_loss"),
    ("needy", {}, f"{CALLED}, and it has missing a required .*argument: 'beta'"),
    ("mine", {"policy_loss_args": {"pwer": 1}}, rf"{CALLED}, and it has got an unexpected keyword argument 'pwer'"),
    ("words", {}, r"its number 'kl' is a float; return a tensor of shape \[2, 3\]"),
    ("number", {}, "own.py:number is 3, not a function; name a function"),
    ("mien", {}, "loss .*own.py has no 'mien'; did you mean 'mine'"),
])  # fmt: skip
def test_a_loss_that_cannot_work_is_refused_before_anything_starts(algorithm, loss, settings, says):
    with pytest.raises(ConfigError, match=says):
        own_formulas(algorithm(loss, **settings))


@pytest.mark.parametrize(("advantage", "says"), [
    ("one_number", r"the advantage is a tensor of shape \[\]; return a tensor of shape \[4\], a number for each"),
    ("none", "is not finite for ordinary rewards"),
    ("constant", r"is called as f\(reward_B, group_B, \*, settings\), and it has missing a required argument: 'adv"),
])  # fmt: skip
def test_an_advantage_that_cannot_work_is_refused(algorithm, advantage, says):
    with pytest.raises(ConfigError, match=says):
        own_formulas(algorithm(advantage=advantage))


def test_how_they_will_be_called(algorithm):
    calls = own_formulas(algorithm(advantage_args={"scale": 2.0}))
    assert list(calls.values()) == [
        "loss(logp_BT, old_BT, adv_BT, mask_BT, clip_high=0.2)", "advantage(reward_B, group_B, scale=2.0)",
    ]  # fmt: skip
    assert own_formulas(AlgorithmConfig()) == {}
    with pytest.raises(ConfigError, match="loss module 'no_such_module_here' cannot be imported .*ModuleNotFoundError"):
        Loss(AlgorithmConfig(policy_loss="no_such_module_here:f"))


def test_its_numbers_are_the_same_ones_each_time(algorithm):
    loss = Loss(algorithm())
    ones_BT = torch.ones(1, 2)
    with pytest.raises(ConfigError, match=r"returned the numbers \[\], and before \['far'\]; return the same"):
        loss.stats(ones_BT, ones_BT, ones_BT.bool(), ones_BT, {})


def test_functions_of_a_python_program():
    """In the place of a name, also for a worker that gets the config as Ray sends it."""
    cloudpickle = pytest.importorskip("ray.cloudpickle")
    given = AlgorithmConfig(policy_loss=lambda logp_BT, old_BT, adv_BT, mask_BT: -2 * logp_BT * adv_BT)
    sent = cloudpickle.loads(cloudpickle.dumps(given))
    ones_BT = torch.ones(1, 2)
    for algorithm in (given, sent):
        assert Loss(algorithm)(ones_BT, ones_BT, ones_BT, ones_BT.bool())[0].tolist() == [[-2.0, -2.0]]
    with pytest.raises(ConfigError, match="loss 'python:lambda' was given from Python and is in no file; give it"):
        Loss(AlgorithmConfig(policy_loss="python:lambda"))
