"""Rewards and references that stand alone: any number of them gives the bits of one. Workers are threads."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import pytest
import torch

from rlhf_ray.models.scratch import build_scratch
from rlhf_ray.remote.calls import Worker
from rlhf_ray.remote.crew import Group
from rlhf_ray.remote.proxy import proxy
from rlhf_ray.remote.replicas import Replicas
from rlhf_ray.roles.batch import Batch
from rlhf_ray.roles.division import Division, RankBatch
from rlhf_ray.roles.protocols import Learner, Reference, Reward, Sampling, Scores
from rlhf_ray.roles.reference import Reference as LocalReference
from tests.remote.in_process import InProcess
from tests.remote.test_slices import SHAPE, SOON, Judge, Keeper, Writing, generators_of, hired, requests_of

SAMPLING = Sampling(max_new_tokens=9)


@pytest.fixture
def world():
    made = InProcess()
    yield made
    made.close()


def replicas_of(world: InProcess, protocol: Any, name: str, roles: list[Any], divides: bool = False) -> Any:
    workers = [world.hire(f"{name} {i}", role) for i, role in enumerate(roles)]
    return proxy(protocol, Replicas(world, [[worker] for worker in workers], SOON), divides=divides)


def reference(share: bool = False) -> LocalReference:
    model = build_scratch("qwen2", seed=3, **SHAPE)
    return LocalReference(model, temperature=0.7, tokens_per_microbatch=30, share_prompts=share)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("share", [False, True], ids=["rows", "shared prompts"])
def test_any_number_of_references_gives_the_bits_of_a_local_one(count, share):
    """Calls end in any order; the micro-batches are those of the whole step."""
    dice = random.Random(count)
    world = InProcess(lambda calls: dice.randrange(calls))
    expected = reference(share).logprobs(Writing().generate(requests_of(), SAMPLING))
    learner = Keeper()
    learner.division = Division(1, 24, seed=0)
    batch = generators_of(world).generate(requests_of(), SAMPLING)
    shared = replicas_of(world, Reference, "reference", [reference(share) for _ in range(count)], divides=True)
    column = shared.logprobs(batch)
    assert len(column.parts) > count and len({part.worker.name for part in column.parts}) == count
    batch = batch.replace(logp_ref=column, advantages=torch.ones(len(batch)))
    hired(world, Learner, "learner", [learner], divides=True).learn(batch)
    world.close()
    assert isinstance(learner.batch, RankBatch) and expected.count_nonzero() > 50
    assert torch.equal(learner.batch.logp_ref, expected)


class Together:
    """A judge that only answers while another one judges, too."""

    def __init__(self, barrier: threading.Barrier) -> None:
        self.barrier = barrier

    def score(self, batch: Batch, texts: int = 0, first: int = 0) -> Scores:
        self.barrier.wait()
        return Scores(torch.full((len(batch),), float(first)), {}, ())


def test_calls_of_several_threads_are_computed_at_the_same_time(world):
    barrier = threading.Barrier(2, timeout=60)
    reward = replicas_of(world, Reward, "reward", [Together(barrier), Together(barrier)])
    batch = generators_of(world).generate(requests_of(2), SAMPLING)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda first: reward.score(batch.replace(), first=first), range(4)))
    assert [scores.score.tolist() for scores in found] == [[float(first)] * 8 for first in range(4)]


def test_an_error_of_the_work_is_the_callers_and_the_replicas_go_on(world):
    class Fails(Judge):
        def score(self, batch: Batch, texts: int = 0) -> Scores:
            raise ValueError("no number")

    reward = replicas_of(world, Reward, "reward", [Fails()])
    batch = generators_of(world).generate(requests_of(2), SAMPLING)
    for _ in range(2):
        with pytest.raises(Exception, match="reward 0: score failed: ValueError: no number"):
            reward.score(batch)


class Named(Protocol):
    def told(self, first: int, second: int = 2, *, third: int, fourth: int = 4) -> list[int]: ...
    def seen(self, batch: Batch, *, width: int) -> list[int]: ...


class Telling:
    def told(self, first: int, second: int = 2, *, third: int, fourth: int = 4) -> list[int]:
        return [first, second, third, fourth]

    def seen(self, batch: Batch, *, width: int) -> list[int]:
        return [len(batch), width]


@pytest.mark.parametrize("alone", [True, False], ids=["replicas", "group"])
def test_arguments_by_name_arrive(world, alone):
    worker = world.hire("reward", Telling())
    role = proxy(Named, Replicas(world, [[worker]], SOON) if alone else Group(world, [worker], SOON))
    assert role.told(1, third=3) == [1, 2, 3, 4]
    assert role.told(second=20, third=30, first=10, fourth=40) == [10, 20, 30, 40]
    batch = generators_of(world).generate(requests_of(2), SAMPLING)
    assert role.seen(batch, width=7) == role.seen(width=7, batch=batch) == [8, 7]


@pytest.mark.parametrize(("ranks", "cuts"), [(1, 0), (2, 2)])
def test_what_references_computed_is_cut_once_for_ranks_and_not_at_all_for_one(world, monkeypatch, ranks, cuts):
    """However often a learner reads it: for the KL in the reward, and for what it measures."""
    asked, cut = [], Worker.cut

    def counted(worker, *given, **more):
        asked.append(worker.name)
        return cut(worker, *given, **more)

    monkeypatch.setattr(Worker, "cut", counted)
    batch = generators_of(world).generate(requests_of(), SAMPLING)
    shared = replicas_of(world, Reference, "reference", [reference(), reference()], divides=True)
    batch = batch.replace(logp_ref=shared.logprobs(batch), advantages=torch.ones(len(batch)))
    keepers = [Keeper() for _ in range(ranks)]
    for keeper in keepers:
        keeper.division = Division(1, 24, seed=0, ranks=ranks)
    learner = hired(world, Learner, "learner", keepers, divides=True)
    for _ in range(2):
        learner.learn(batch)
    assert len([name for name in asked if name.startswith("reference")]) == cuts
    assert all(keeper.batch.logp_ref.count_nonzero() for keeper in keepers)
    learner.learn(batch.replace(logp_ref=shared.logprobs(batch)))
    assert len([name for name in asked if name.startswith("reference")]) == 2 * cuts, "another column"


class OneOfTwo:
    """A rank of a network that two hold together: every pass waits for the other's."""

    world_size, device = 2, torch.device("cpu")

    def __init__(self, rank: int, model: torch.nn.Module, barrier: threading.Barrier) -> None:
        self.rank, self.model, self.barrier = rank, model, barrier

    def __call__(self, **inputs: Any) -> Any:
        self.barrier.wait()  # a rank with fewer passes would break it
        return self.model(**inputs)


@pytest.mark.parametrize("groups", [1, 6], ids=["less than a row a rank", "many"])
def test_two_references_of_two_ranks_each_compute_every_row_once(world, groups):
    """Ranks of a replica make as many passes, also those that have no row in a piece."""
    requests = requests_of(groups, 1 if groups == 1 else 4)
    local = LocalReference(build_scratch("qwen2", seed=3, **SHAPE), temperature=0.7, tokens_per_microbatch=30)
    expected = local.logprobs(Writing().generate(requests, SAMPLING))
    workers = []
    for replica in range(2):
        barrier = threading.Barrier(2, timeout=60)
        for rank in range(2):
            model = build_scratch("qwen2", seed=3, **SHAPE)
            role = LocalReference(
                model, temperature=0.7, tokens_per_microbatch=30, sharded=OneOfTwo(rank, model, barrier)
            )  # fmt: skip
            workers.append(world.hire(f"reference {replica} rank {rank}", role))
    shared = proxy(Reference, Replicas(world, [workers[:2], workers[2:]], SOON), divides=True)
    batch = generators_of(world).generate(requests, SAMPLING)
    column = shared.logprobs(batch)
    assert sorted(row for part in column.parts for row in part.rows.tolist()) == list(range(len(requests)))
    learner = Keeper()
    learner.division = Division(1, 24, seed=0)
    batch = batch.replace(logp_ref=column, advantages=torch.ones(len(batch)))
    hired(world, Learner, "learner", [learner], divides=True).learn(batch)
    torch.testing.assert_close(learner.batch.logp_ref, expected, atol=1e-5, rtol=0)
    assert expected.count_nonzero() > 0
