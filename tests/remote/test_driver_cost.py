"""What the process of the loop computes for a step on Ray: something for each prompt, and next to nothing for a row."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from rlhf_ray.config.algorithm import AlgorithmConfig
from rlhf_ray.config.schema import RolloutConfig
from rlhf_ray.data.prompts import Example, PromptSet
from rlhf_ray.remote.batch import gather_remote
from rlhf_ray.remote.calls import Deadline
from rlhf_ray.remote.crew import Group
from rlhf_ray.remote.handles import RemoteGenerators
from rlhf_ray.remote.proxy import proxy
from rlhf_ray.roles.advantages import AdvantageEstimator
from rlhf_ray.roles.batch import Batch
from rlhf_ray.roles.division import Division
from rlhf_ray.roles.protocols import Learner, Reference, Reward, Sampling, Scores
from rlhf_ray.rollout.source import Rollouts
from rlhf_ray.run.timer import Timer
from rlhf_ray.sample import Sample
from tests.remote.in_process import InProcess

SOON = Deadline(60, "ray.call_deadline_s")
GROUPS = 32


class Writer:
    """Writes all that it has at once, answers of 1 to 5 tokens."""

    def __init__(self) -> None:
        self.waiting: list[Sample] = []

    @property
    def open(self) -> int:
        return len(self.waiting)

    def submit(self, requests: Any, sampling: Sampling) -> None:
        for r in requests:
            answer = [2] * (1 + r.seed % 5)
            self.waiting.append(
                Sample.answer(r.prompt_id, r.sample_id, r.token_ids, answer, [-1.0] * len(answer), 0, "stop")
            )

    def collect(self) -> list[Sample]:
        ended, self.waiting = self.waiting, []
        return ended

    def cancel(self, sample_ids: Any) -> None:
        self.waiting = []

    def wake(self) -> None: ...
    def sleep(self) -> None: ...


class Idle:
    """A judge, a reference, and one of two ranks of a learner, that compute nothing."""

    division = Division(minibatches=2, max_tokens=1024, seed=0, ranks=2)

    def score(self, batch: Batch, texts: int = 0) -> Scores:
        assert batch.columns[0]["prompt"].startswith("prompt")
        score_B = (batch.response_mask.sum(1) % 3).float()
        return Scores(score_B, {"own": score_B}, (("?", "!"),) * texts)

    def logprobs(self, batch: Batch) -> torch.Tensor:
        return torch.zeros(batch.tokens.shape)

    def learn(self, batch: Batch) -> None:
        assert batch.own and batch.advantages is not None


class Calls:
    """Counts what this thread calls, Python's functions and C's."""

    def __enter__(self) -> Calls:
        self.count = 0
        sys.setprofile(self._seen)
        return self

    def __exit__(self, *error: Any) -> None:
        sys.setprofile(None)

    def _seen(self, frame: Any, event: str, argument: Any) -> None:
        self.count += event in ("call", "c_call")


def calls_of_a_step(members: int, name: str) -> int:
    world = InProcess()

    def group(role: str, protocol: Any, count: int = 1) -> Any:
        seats = [world.hire(f"{role} rank {i}", Idle()) for i in range(count)]
        return proxy(protocol, Group(world, seats, SOON), divides=count > 1)

    settings = AlgorithmConfig(name=name)
    writers = [world.hire(f"generator {i}", Writer()) for i in range(2)]
    generators = RemoteGenerators(world, writers, 10_000, workers_each=1, sync_deadline=SOON, deadline=SOON)
    learner, reference = group("learner", Learner, 2), group("reference", Reference)
    prompts = PromptSet(
        tuple(Example(f"prompt {i}", {}) for i in range(2 * GROUPS)), tuple((3, 4, i) for i in range(2 * GROUPS)), {}
    )
    rollouts = Rollouts(
        generators, group("reward", Reward), prompts, RolloutConfig(prompts_per_step=GROUPS, group_size=members),
        Sampling(5), algorithm=settings, steps=9, seed=1, timer=Timer(), texts=3, gather=gather_remote,
    )  # fmt: skip
    estimator = AdvantageEstimator(settings, learner)
    rollouts.weights_changed(0)

    def step(number: int) -> None:
        batch = rollouts.next(number).batch
        batch = batch.replace(logp_ref=reference.logprobs(batch))
        learner.learn(batch.replace(**estimator.estimate(batch, 0.1).columns))

    step(0)  # whatever is made only once
    with Calls() as calls:
        step(1)
    world.close()
    return calls.count


@pytest.mark.parametrize("name", ["grpo", "remax"])
def test_a_step_of_more_answers_makes_hardly_more_calls(name):
    """A row costs its place among some rank's rows, which is a turn of a loop of two calls. A `Request` alone would be
    six: itself, its seed, and what that is hashed of."""
    few, many = (calls_of_a_step(members, name) for members in (4, 36))
    rows = GROUPS * (36 - 4)
    assert rows < many - few < 2.5 * rows, (few, many)
