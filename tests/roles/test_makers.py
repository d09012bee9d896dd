"""What each role is made from: its own part of the config, and nothing of the others'."""

from __future__ import annotations

import pickle

import torch

from rlhf_ray.config.schema import RunConfig
from rlhf_ray.models.devices import Hardware
from rlhf_ray.roles.factory import Assets, Course
from rlhf_ray.roles.makers import Makers

ASSETS = Assets("policy", "tokenizer", Hardware("cpu", torch.float32))


def makers(**changes) -> Makers:
    tree = {
        "model": {"path": "m", "lora": {"target_modules": "of_the_learner"}},
        "data": {"path": "of_nobody"},
        "rewards": [{"function": "keyword", "args": {"words": ["of_the_reward"]}}],
        "generator": {"engine_args": {"of_the_generator": 1}},
        "critic": {"path": "of_the_critic", "warmup_steps": 7},
        "algorithm": {"name": "ppo"},
        "steps": 20,
        **changes,
    }
    return Makers.of(RunConfig.model_validate(tree), ASSETS, "shared_memory")


def test_a_role_is_sent_no_settings_of_another():
    made = makers()
    sent = {name: pickle.dumps(getattr(made, name)) for name in ("generator", "reward", "learner", "critic")}
    for name, message in sent.items():
        others = [other for other in (*sent, "nobody") if other != name]
        assert f"of_the_{name}".encode() in message
        assert not [other for other in others if f"of_the_{other}".encode() in message or b"of_nobody" in message]


def test_only_the_roles_that_a_run_has_can_be_made():
    made = makers()
    assert made.reference is None, "a LoRA policy without its adapter is its own reference"
    made = makers(model={"path": "m"}, algorithm={"name": "grpo", "kl_coef": 0.1})
    assert made.critic is None and made.reference is not None


def test_while_the_critic_learns_alone_the_policys_schedule_waits():
    made = makers()
    assert Course(0, 20, first=7) in made.learner.args and Course(0, 20) in made.critic.args
    alone = makers(algorithm={"name": "grpo"})
    assert Course(0, 20) in alone.learner.args, "without a critic nobody waits for it"
