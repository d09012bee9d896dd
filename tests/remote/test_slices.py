"""What travels: ranks are sent their own rows and nothing else, and compute what one process computes with all."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.config.algorithm import AlgorithmConfig
from rlhf_ray.config.schema import CriticConfig, LearnerConfig
from rlhf_ray.models.heads import ValueModel
from rlhf_ray.models.scratch import build_scratch
from rlhf_ray.models.torch_engine import TorchEngine
from rlhf_ray.remote.batch import gather_remote
from rlhf_ray.remote.calls import Deadline
from rlhf_ray.remote.crew import Group
from rlhf_ray.remote.handles import RemoteGenerators
from rlhf_ray.remote.packed import ROWS, TOKENS, pack, unpack
from rlhf_ray.remote.proxy import proxy
from rlhf_ray.roles.advantages import AdvantageEstimator
from rlhf_ray.roles.batch import Batch, batch_of, gather
from rlhf_ray.roles.critic import Critic
from rlhf_ray.roles.division import Division
from rlhf_ray.roles.learner import Learner
from rlhf_ray.roles.protocols import Critic as CriticProtocol
from rlhf_ray.roles.protocols import Learner as LearnerProtocol
from rlhf_ray.roles.protocols import Reference as ReferenceProtocol
from rlhf_ray.roles.protocols import Request, Reward, Sampling, Scores
from rlhf_ray.roles.reference import Reference
from rlhf_ray.sample import Sample
from rlhf_ray.sync.sender import InProcessSender
from tests.remote.in_process import DRIVER, InProcess, Ring, RingEngine
from tests.steps import one_step

SOON = Deadline(60, "ray.call_deadline_s")
VOCAB, TEXT = 11, "why? " * 400
SHAPE = {"vocab_size": VOCAB, "hidden_size": 8, "layers": 1, "heads": 2, "max_length": 64}


class Writing:
    """A generator whose answers are made of their seeds: what matters here is who holds them."""

    def generate(self, requests, sampling) -> Batch:
        samples = [self.sample(request, sampling) for request in requests]
        return batch_of(samples, [r.columns for r in requests], [r.chat for r in requests])

    def sample(self, r, sampling) -> Sample:
        draw = np.random.default_rng(r.seed)
        answer = draw.integers(2, VOCAB, size=draw.integers(0, sampling.max_new_tokens + 1))
        return Sample.answer(r.prompt_id, r.sample_id, r.token_ids, answer, -draw.random(len(answer)), 3, "stop")


class Writer(Writing):
    """One that hosts of generators hold: it ends two requests at a time, the shortest answers first."""

    def __init__(self) -> None:
        self.waiting: list[Sample] = []

    @property
    def open(self) -> int:
        return len(self.waiting)

    def submit(self, requests, sampling) -> None:
        assert all(not r.columns and r.chat is None for r in requests), "texts go to those who judge"
        self.waiting += [self.sample(request, sampling) for request in requests]
        self.waiting.sort(key=len)

    def collect(self) -> list[Sample]:
        ended, self.waiting = self.waiting[:2], self.waiting[2:]
        return ended

    def cancel(self, sample_ids) -> None:
        self.waiting = [sample for sample in self.waiting if sample.sample_id not in sample_ids]


class Judge:
    def score(self, batch: Batch, texts: int = 0) -> Scores:
        assert all(len(row["prompt"]) == len(TEXT) for row in batch.columns) and batch.chats[0] == "chat"
        sums = [float(row[mask].sum() % 7) for row, mask in zip(batch.tokens, batch.response_mask, strict=True)]
        return Scores(torch.tensor(sums), {}, ())


def requests_of(groups: int = 6, members: int = 4) -> list[Request]:
    return [
        Request(g, g * members + m, (2,) * (1 + g), seed=100 * g + m, columns={"prompt": TEXT}, chat="chat")
        for g in range(groups) for m in range(members)
    ]  # fmt: skip


def engine_of(module: torch.nn.Module, ring: Ring | None, rank: int) -> TorchEngine:
    return TorchEngine(module) if ring is None else RingEngine(module, ring, rank)


def learner_of(
    algorithm: AlgorithmConfig, share: bool, ring: Ring | None = None, rank: int = 0, minibatches: int = 2
) -> Learner:
    config = LearnerConfig(lr=0.01, tokens_per_microbatch=24, minibatches=minibatches, share_prompts=share)
    return Learner(
        engine_of(build_scratch("qwen2", seed=1, **SHAPE), ring, rank), config, algorithm, tokenizer=None,
        temperature=1.0, max_new_tokens=9, sender=InProcessSender(capacity=1 << 20), seed=0, total_steps=4,
    )  # fmt: skip


def critic_of(ring: Ring | None = None, rank: int = 0, minibatches: int = 3) -> Critic:
    model = ValueModel(build_scratch("qwen2", seed=2, **SHAPE).base_model)
    with torch.no_grad():
        model.value_head.weight.copy_(torch.linspace(-1, 1, 8)[None])
    config = CriticConfig(lr=0.01, tokens_per_microbatch=30, minibatches=minibatches)
    return Critic(engine_of(model, ring, rank), config, seed=0, total_steps=4)


def reference_of() -> Reference:
    return Reference(build_scratch("qwen2", seed=3, **SHAPE), temperature=1.0, tokens_per_microbatch=64)


@pytest.fixture
def world():
    made = InProcess()
    yield made
    made.close()


def hired(world: InProcess, protocol: Any, name: str, roles: list[Any], divides: bool = False) -> Any:
    names = [f"{name} rank {i}" if divides else name for i in range(len(roles))]
    workers = [world.hire(*place) for place in zip(names, roles, strict=True)]
    return proxy(protocol, Group(world, workers, SOON), divides=divides)


def generators_of(world: InProcess, count: int = 2) -> RemoteGenerators:
    workers = [world.hire(f"generator {i}", Writer()) for i in range(count)]
    return RemoteGenerators(world, workers, 5, workers_each=1, sync_deadline=SOON, deadline=SOON)


def two_steps(
    algorithm: AlgorithmConfig, generator: Any, reward: Any, reference: Any, critic: Any, learner: Any,
    estimator: AdvantageEstimator, together: Any,
) -> list[dict[str, float]]:  # fmt: skip
    """What the loop does, with rows of two rounds, of several temperatures, the second round's in another order."""
    found = []
    for step in range(2):
        requests = requests_of()
        batches = [generator.generate(part, Sampling(max_new_tokens=9)) for part in (requests[:12], requests[12:])]
        scores = [reward.score(batch) for batch in batches]
        rows = [list(range(12)), [8, 9, 10, 11, 3, 2, 1, 0]]
        score_B = torch.cat([s.score[r] for s, r in zip(scores, rows, strict=True)])
        heat_B = 0.5 + torch.arange(20) % 3
        batch = together(list(zip(batches, rows, strict=True))).replace(score=score_B, temperature=heat_B)
        if algorithm.advantage == "remax":
            batch = batch.replace(baseline=score_B.flip(0))
        batch = batch.replace(logp_ref=reference.logprobs(batch), logp_old=learner.logprobs(batch))
        if critic is not None:
            batch = batch.replace(values=critic.values(batch))
        estimate = estimator.estimate(batch, 0.1)
        batch = batch.replace(**estimate.columns)
        metrics = dict(estimate.stats)
        if critic is not None:
            metrics |= one_step(critic, batch, step)
        found.append(metrics | one_step(learner, batch, step, 0.1))
    return found


CASES = {
    "grpo": {"name": "grpo", "kl_coef": 0.1},
    "ppo": {"name": "ppo", "kl_coef": 0.1, "lam": 0.9},
    "KL of whole answers in the reward": {"name": "rloo", "kl_in": "reward", "kl_coef": 0.1, "kl_estimator": "k1"},
    "whitened returns": {"name": "reinforce_pp", "gamma": 0.9},
    "whitened answers": {"name": "grpo", "whiten_advantages": True},
    "remax": {"name": "remax"},
}


@pytest.mark.parametrize(("case", "ranks"), [
    *((case, 3) for case in CASES), ("grpo", 1), ("grpo", 2), ("ppo", 2),
])  # fmt: skip
def test_ranks_compute_what_one_process_computes(world, case, ranks):
    algorithm, share = AlgorithmConfig(**CASES[case]), case == "grpo"
    critic = critic_of() if algorithm.advantage == "gae" else None
    alone = two_steps(
        algorithm, Writing(), Judge(), reference_of(), critic, learner_of(algorithm, share),
        AdvantageEstimator(algorithm), gather,
    )  # fmt: skip

    def group(protocol: Any, name: str, make: Any) -> Any:
        ring = Ring(ranks)
        return hired(world, protocol, name, [make(ring, rank) for rank in range(ranks)], divides=True)

    learner = group(LearnerProtocol, "learner", lambda ring, rank: learner_of(algorithm, share, ring, rank))
    critic = critic and group(CriticProtocol, "critic", critic_of)
    many = two_steps(
        algorithm, generators_of(world), hired(world, Reward, "reward", [Judge()]),
        hired(world, ReferenceProtocol, "reference", [reference_of()]), critic, learner,
        AdvantageEstimator(algorithm, critic or learner), gather_remote,
    )  # fmt: skip
    for one, other in zip(alone, many, strict=True):
        names = {name for name in one if not name.startswith("perf/")}
        assert {n: other[n] for n in names} == pytest.approx({n: one[n] for n in names}, rel=1e-6, abs=1e-6)
        assert one["grad_norm"] > 0 and one["advantage/std"] > 0


@pytest.mark.parametrize("ranks", [1, 3])
def test_waves_are_divided_over_ranks_each_by_itself(world, ranks):
    """Groups come one after the other, as they end; one process that has them all computes the same step."""
    algorithm = AlgorithmConfig(name="grpo", kl_coef=0.1)

    def step_of(generator, reference, learner, critic, cuts) -> dict[str, float]:
        for role, more in ((critic, ()), (learner, (0.1,))):
            role.begin(0, *more, streamed=len(cuts) > 1)
        for rows in cuts:
            batch = generator.generate([requests_of()[row] for row in rows], Sampling(max_new_tokens=9))
            batch = batch.replace(logp_ref=reference.logprobs(batch), values=critic.values(batch))
            batch = batch.replace(advantages=torch.tensor([row % 5 - 2.0 for row in rows]), returns=batch.logp_ref)
            critic.learn(batch)
            learner.learn(batch)
        return critic.finish() | learner.finish()

    def group(protocol: Any, name: str, make: Any) -> Any:
        ring = Ring(ranks)
        return hired(world, protocol, name, [make(ring, rank) for rank in range(ranks)], divides=True)

    alone = step_of(Writing(), reference_of(), learner_of(algorithm, True, minibatches=1), critic_of(minibatches=1),
                    [range(24)])  # fmt: skip
    many = step_of(
        generators_of(world), hired(world, ReferenceProtocol, "reference", [reference_of()]),
        group(LearnerProtocol, "learner", lambda *rank: learner_of(algorithm, True, *rank, minibatches=1)),
        group(CriticProtocol, "critic", lambda *rank: critic_of(*rank, minibatches=1)),
        [range(8, 12), range(4), range(12, 24), range(4, 8)],
    )  # fmt: skip
    names = {name for name in alone if not name.startswith("perf/")}
    assert {n: many[n] for n in names} == pytest.approx({n: alone[n] for n in names}, rel=1e-6, abs=1e-6)
    assert alone["grad_norm"] > 0 and alone["loss/value"] > 0


class Keeper:
    """A rank that keeps what it is given."""

    def __init__(self) -> None:
        self.division, self.batch = Division(2, 24, seed=0, ranks=2), None

    def learn(self, batch: Batch) -> None:
        self.batch = batch


@given(st.integers(1, 4), st.integers(1, 30), st.lists(st.integers(1, 5), min_size=5, max_size=9), st.randoms())
@settings(max_examples=15, deadline=None)
def test_who_wrote_what_and_when_changes_nothing_in_a_ranks_batch(count, room, sizes, dice):
    """The composition rule: the same rows side by side, and in the same order, whoever held them.

    Of groups of several sizes, by one generator that gets everything and by several that answer in any order.
    """
    requests, found = [], []
    for group, size in enumerate(sizes):
        requests += [Request(group, 10 * group + m, (2,) * (1 + group), seed=10 * group + m) for m in range(size)]
    picked = [0, len(requests) - 1, *range(1, len(requests) - 1, 2)]
    for generators, order in ((1, lambda calls: 0), (count, lambda calls: dice.randrange(calls))):
        world = InProcess(order)
        writers = [world.hire(f"generator {i}", Writer()) for i in range(generators)]
        ranks = [Keeper(), Keeper()]
        batch = RemoteGenerators(
            world, writers, room, workers_each=1, sync_deadline=SOON, deadline=SOON
        ).generate(requests, Sampling(max_new_tokens=9))  # fmt: skip
        assert batch.rows == Writing().generate(requests, Sampling(max_new_tokens=9)).rows
        assert len({part.worker.name for part in batch.parts}) <= generators
        batch = gather_remote([(batch, picked)]).replace(advantages=torch.arange(float(len(picked))))
        hired(world, LearnerProtocol, "learner", ranks, divides=True).learn(batch)
        found.append([rank.batch for rank in ranks])
        world.close()
    for one, other in zip(*found, strict=True):
        for field in dataclasses.fields(one):
            a, b = getattr(one, field.name), getattr(other, field.name)
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name


# ---- what it costs ----------------------------------------------------------------------------------------------


class Long(Writer):
    """256 answers to prompts of 40 tokens: about 1,700 tokens on average, and one of 16k; `scale` times as long."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def sample(self, r, sampling) -> Sample:
        draw = np.random.default_rng(r.seed)
        length = int(self.scale * (16_000 if r.sample_id == 77 else draw.lognormal(7.1, 0.7)))
        answer = draw.integers(2, 1000, size=length)
        return Sample.answer(r.prompt_id, r.sample_id, r.token_ids, answer, -draw.random(length), 3, "stop")


class Rank:
    """A rank that computes nothing, and remembers what it was given to learn from."""

    def __init__(self, ranks: int) -> None:
        self.division, self.needed = Division(2, 8192, seed=0, ranks=ranks), 0

    def logprobs(self, batch: Batch) -> torch.Tensor:
        return -torch.ones(batch.tokens.shape)

    def learn(self, batch: Batch) -> None:
        own, mask_BT = batch.select(range(batch.own)), batch.response_mask[: batch.own]
        assert own.advantages.dim() == 1 and (own.logp_ref[own.response_mask] == -1).all()
        assert (own.weight_version[own.response_mask] == 3).all() and own.columns[0] is None
        # A token id and whether the policy wrote it; of those it wrote, three columns that others have computed.
        self.needed += int(own.attention_mask.sum()) * (4 + 1) + int(mask_BT.sum()) * (4 + 4 + 4)


def travelled(ranks: int, scale: float = 1.0) -> tuple[InProcess, list[Rank]]:
    """A step of 256 rows, written by two generators: what everyone was sent."""
    world, roles = InProcess(), [Rank(ranks) for _ in range(ranks)]
    writers = [world.hire(f"generator {i}", Long(scale)) for i in range(2)]
    generators = RemoteGenerators(world, writers, 64, workers_each=1, sync_deadline=SOON, deadline=SOON)
    learner = hired(world, LearnerProtocol, "learner", roles, divides=True)
    reference = hired(world, ReferenceProtocol, "reference", [Rank(1)])
    requests = [Request(i // 8, i, (5,) * 40, seed=i, columns={"prompt": TEXT}) for i in range(256)]
    batch = generators.generate(requests, Sampling(max_new_tokens=20_000))
    batch = batch.replace(logp_ref=reference.logprobs(batch), logp_old=learner.logprobs(batch))
    learner.learn(batch.replace(advantages=torch.ones(256)))
    world.close()
    return world, roles


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_rank_is_sent_its_own_tokens_and_nothing_else(ranks):
    world, roles = travelled(ranks)
    received = [world.received[f"learner rank {i}"] for i in range(ranks)]
    for sent, role in zip(received, roles, strict=True):
        assert role.needed < sent < 1.05 * role.needed, (received, role.needed)
    assert 7e6 < sum(received) < 9e6, "padded to the longest it would be ten times as much, to each rank"


def test_what_passes_the_driver_does_not_grow_with_the_answers():
    small, large = (travelled(2, scale)[0].received for scale in (0.25, 0.75))
    assert large["learner rank 0"] > 2.5 * small["learner rank 0"]
    for name in (DRIVER, f"{DRIVER}: sends"):
        assert large[name] < 1.03 * small[name], name
    assert large[DRIVER] + large[f"{DRIVER}: sends"] < 256 * 400


# ---- by hand ----------------------------------------------------------------------------------------------------


def three_rows() -> Batch:
    samples = [
        Sample.answer(7, 14, (5, 6), (8,), (-0.5,), 3, "stop"),
        Sample(7, 15, np.array([5, 9, 8, 4], np.int32), ((1, 2), (3, 4)), np.array([-1, -2], np.float32),
               np.array([3, 4], np.int32), "length"),
        Sample.answer(8, 16, (2, 2), (), (), 3, "stop"),
    ]  # fmt: skip
    return batch_of(samples, [{}] * 3, [None] * 3)


def test_a_packed_batch_holds_real_tokens_only_and_comes_back_whole():
    batch = three_rows().replace(logp_ref=torch.tensor([[0, 0, -3, 0], [0, -4, 0, -5], [0, 0, 0, 0.0]]))
    packed = pack(batch)
    assert packed.ragged["tokens"].values.tolist() == [5, 6, 8, 5, 9, 8, 4, 2, 2]
    column = packed.ragged["logp_ref"]
    assert column.values.tolist() == [-3, -4, -5] and column.lengths.tolist() == [1, 2, 0], "where the policy wrote"
    back = unpack(packed, {}, {"columns": batch.columns, "chats": batch.chats})
    for field in dataclasses.fields(Batch):
        one, other = getattr(batch, field.name), getattr(back, field.name)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, field.name


def test_rows_are_cut_out_in_any_order():
    cut = pack(three_rows()).select(np.array([2, 1]), [*TOKENS, *ROWS])
    assert cut.ragged["tokens"].values.tolist() == [2, 2, 5, 9, 8, 4] and "logp_gen" not in cut.ragged
    assert cut.ragged["response_mask"].values.tolist() == [0, 0, 0, 1, 0, 1]
    assert cut.rows["sample_id"].tolist() == [16, 15]
    assert pack(three_rows()).select(np.array([], np.int64)).ragged["tokens"].values.tolist() == []


def test_a_rank_without_rows_repeats_an_empty_one():
    """Three rows of 3, 4 and 2 tokens on 4 ranks, a row a pass: the fourth has a dummy as long as the shortest row."""
    parts = Division(1, 4, seed=0, ranks=4).parts(three_rows().rows)
    assert [part.rows.tolist() for part in parts] == [[1], [0], [2], []]
    assert [part.dummies for part in parts] == [(), (), (), (2,)]
    (share,) = (passes.share() for passes in parts[3].passes)
    assert share.microbatches == (((0,),),) and share.real == 0
    assert (share.total_tokens, share.total_sequences) == (3, 2), "of the whole minibatch"
    assert [part.passes[0].share().microbatches for part in parts[:3]] == [(((0,),),)] * 3
