"""Rewards as groups end: judged in parcels, in whatever order they come, the scores are those of one call."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.config.algorithm import AlgorithmConfig
from rlhf_ray.config.schema import RolloutConfig
from rlhf_ray.errors import RewardError
from rlhf_ray.models.tokenizers import build_tokenizer
from rlhf_ray.rewards.calling import RewardFunction
from rlhf_ray.rewards.compose import RewardSet
from rlhf_ray.rewards.failures import FailurePolicy
from rlhf_ray.roles.batch import Batch, build_batch
from rlhf_ray.roles.protocols import Request, Sampling, Scores
from rlhf_ray.roles.reward import Reward
from rlhf_ray.rollout import groups
from rlhf_ray.rollout.groups import Judging, parcels_of
from rlhf_ray.rollout.source import Rollouts
from rlhf_ray.run.timer import Timer

WORDS = build_tokenizer("word", ["good bad"])
MEMBERS = 2


def batch_of(numbers: list[float]) -> Batch:
    """A row for each number, two to a prompt; NaN: one that the functions below fail on."""
    requests = [
        Request(i // MEMBERS, i, (5,), i, {"prompt": f"p{i // MEMBERS}", "worth": x}) for i, x in enumerate(numbers)
    ]
    answers = [[6 + i % 3] for i in range(len(numbers))]
    return build_batch(
        requests, answers, [[0.0]] * len(answers), truncated=[False] * len(answers), weight_version=0
    )  # fmt: skip


def judge(on_failure: str, retries: int = 0) -> Reward:
    """Two functions, of which one fails; that gives a row its number the second time it is asked."""
    asked: set[str] = set()

    def worth(prompts, worth):
        again = [prompt in asked for prompt in prompts]
        asked.update(prompts)
        return [7.0 if x != x and seen and retries else x for x, seen in zip(worth, again, strict=True)]

    policy = FailurePolicy(on_failure, retries, -1.0 if on_failure == "default" else None)
    odd = RewardFunction("odd", lambda prompts: [float(int(p[1:]) % 2) for p in prompts], weight=0.5)
    return Reward(RewardSet([RewardFunction("worth", worth, policy=policy), odd]), WORDS)


def in_parcels(reward: Reward, batch: Batch, order: list[int], texts: int = 3) -> Scores:
    """Judged in parcels that are written in this order."""
    cuts = parcels_of(len(batch) // MEMBERS, MEMBERS)
    with Judging(reward, cuts, texts, Timer()) as judging:
        for parcel in sorted(range(len(cuts)), key=lambda parcel: order[parcel]):
            judging.written(parcel, batch.select(cuts[parcel]))
        return judging.scores(batch)


def require_equal(one: Scores, other: Scores) -> None:
    for field in dataclasses.fields(Scores):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        elif field.name == "by_function":
            assert a.keys() == b.keys()
            for name, value_B in a.items():
                torch.testing.assert_close(value_B, b[name], rtol=0, atol=0, equal_nan=True)
        else:
            assert a == b, field.name


# ---- which rows share a call ------------------------------------------------------------------------------------


def test_parcels_of_a_step():
    assert parcels_of(6, 4) == [range(24)], "a small step is judged in one call"
    assert parcels_of(40, 4) == [range(80), range(80, 160)]
    assert parcels_of(64, 8) == [range(i, i + 128) for i in range(0, 512, 128)], "no more than four"
    assert len(parcels_of(64, 8, judges=3)) == 4 and len(parcels_of(64, 8, judges=8)) == 8, "one for each judge"
    assert parcels_of(40, 4, judges=8) == parcels_of(40, 4), "but none is too small"
    assert parcels_of(3, 100) == [range(100), range(100, 200), range(200, 300)], "groups are not cut"


@given(st.integers(1, 900), st.integers(1, 70))
def test_parcels_hold_every_row_once_in_order_and_whole_groups(count, members):
    cuts = parcels_of(count, members)
    assert [row for rows in cuts for row in rows] == list(range(count * members)) and all(cuts)
    assert all(rows.start % members == 0 for rows in cuts)
    sizes = [len(rows) // members for rows in cuts]
    assert max(sizes) - min(sizes) <= 1
    assert len(cuts) == 1 or min(map(len, cuts)) > groups.LEAST_ROWS - members


# ---- the same as one call ---------------------------------------------------------------------------------------


@given(
    st.lists(st.one_of(st.floats(-9, 9, width=32), st.just(float("nan"))), min_size=1, max_size=12),
    st.permutations(range(4)),
    st.sampled_from(["drop_group", "default"]),
    st.integers(0, 30),
)
@settings(max_examples=40, deadline=None)
def test_scores_texts_and_events_are_those_of_one_call(numbers, order, on_failure, texts):
    batch = batch_of([x for x in numbers for _ in range(MEMBERS)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "LEAST_ROWS", 2)
        found = in_parcels(judge(on_failure), batch, order, texts)
    require_equal(found, judge(on_failure).score(batch, texts=texts))


def test_what_is_said_of_failures_by_hand(monkeypatch):
    """Rows 3 and 5 fail, in two parcels of four rows."""
    monkeypatch.setattr(groups, "LEAST_ROWS", 4)
    batch = batch_of([1, 2, 3, float("nan"), 5, float("nan"), 7, 8])
    found = in_parcels(judge("drop_group"), batch, [1, 0])
    assert found.keep.tolist() == [True, True, False, False, False, False, True, True]
    (event,) = found.events
    assert (event["action"], event["rows"], event["retries"]) == ("drop_group", 2, 0)
    assert event["reason"].startswith("reward 'worth' gave nan for row 3;")
    assert found.stats["fault/dropped"] == 2
    asked_again = in_parcels(judge("drop_group", retries=1), batch, [0, 1])
    assert asked_again.score.tolist() == [1, 2, 3.5, 7.5, 5, 7, 7.5, 8.5], "prompts 1 and 3 are odd"
    assert asked_again.stats["fault/retries"] == 2, "calls: one of each parcel"
    assert [(e["action"], e["rows"], e["retries"]) for e in asked_again.events] == [("retry", 0, 2)]


def test_an_error_names_the_row_of_the_step_and_ends_the_writing(monkeypatch):
    monkeypatch.setattr(groups, "LEAST_ROWS", 4)
    batch = batch_of([1, 2, 3, 4, 5, float("nan"), 7, 8, 9, 9, 9, 9])
    cuts = parcels_of(6, MEMBERS)
    with Judging(judge("raise"), cuts, 0, Timer()) as judging:
        judging.written(1, batch.select(cuts[1]))
        while not judging._found[1].done():  # the test's time limit ends it
            time.sleep(0.001)
        with pytest.raises(RewardError, match="reward 'worth' gave nan for row 5"):
            judging.written(2, batch.select(cuts[2]))
        assert judging._found[2] is None, "nobody judges it any more"


def test_an_error_of_the_last_parcel_is_raised_too(monkeypatch):
    monkeypatch.setattr(groups, "LEAST_ROWS", 4)
    with pytest.raises(RewardError, match="reward 'worth' gave nan for row 6"):
        in_parcels(judge("raise"), batch_of([1, 2, 3, 4, 5, 6, float("nan"), 8]), [0, 1])


# ---- in a run ---------------------------------------------------------------------------------------------------


class Parcelled:
    """A generator that tells of parcels in an order of its own, and before the last of them waits for `judged`."""

    def __init__(self, generator, order: Callable[[int], list[int]], judged: threading.Event) -> None:
        self.generator, self.order, self.judged = generator, order, judged

    def __getattr__(self, name):
        return getattr(self.generator, name)

    def generate_parcels(self, requests, sampling, cuts, written):
        batch = self.generator.generate(requests, sampling)
        order = self.order(len(cuts))
        for parcel in order:
            if parcel == order[-1]:
                assert self.judged.wait(20), "rewards are computed while the last ones are being written"
            written(parcel, batch.select(cuts[parcel]))
        return batch


class Worth:
    """A row earns its prompt's answer and the parity of its sample_id; prompt 2 cannot be judged."""

    def __init__(self, judged: threading.Event) -> None:
        self.judged, self.calls = judged, []

    def score(self, batch, texts=0, first=0):
        self.calls.append(batch.sample_id.tolist())
        keep_B = torch.tensor([row["answer"] != "2" for row in batch.columns])
        score_B = torch.tensor([float(row["answer"]) for row in batch.columns]) + batch.sample_id % 2
        event = {"reward": "worth", "rows": int((~keep_B).sum()), "retries": 0, "reason": "-"}
        events = () if keep_B.all() else (event,)
        pairs = tuple(zip([row["prompt"] for row in batch.columns], map(str, batch.sample_id.tolist()), strict=True))
        self.judged.set()
        return Scores(
            torch.where(keep_B, score_B, torch.nan), {"worth": score_B}, pairs[:texts], keep_B,
            {"fault/dropped": float((~keep_B).sum() / 2)}, events, tuple((5, 6) for _ in range(texts)),
        )  # fmt: skip


@pytest.mark.parametrize("algorithm", [{}, {"resample_rounds": 2}], ids=["one round", "resampling"])
def test_steps_are_the_same_whatever_is_written_first(generator, prompts, monkeypatch, algorithm):
    monkeypatch.setattr(groups, "LEAST_ROWS", 2)
    orders = {"in order": lambda n: list(range(n)), "backwards": lambda n: list(range(n))[::-1]}
    runs = []
    # Two judges without an order: the parcels are judged when all has been written, as on shared GPUs.
    for order, judges in ((None, 1), (None, 2), *((order, 1) for order in orders.values()), (orders["backwards"], 2)):
        judged = threading.Event()
        reward, parcelled = Worth(judged), Parcelled(generator, order, judged)
        made = Rollouts(
            parcelled if order else generator, reward, prompts, RolloutConfig(prompts_per_step=4, group_size=2),
            Sampling(4), algorithm=AlgorithmConfig(**algorithm), seed=7, timer=Timer(), texts=5, steps=20,
            early_rewards=order is not None, judges=judges,
        )  # fmt: skip
        steps = [made.next(step) for step in range(3)]
        runs.append(steps)
        calls = [len(call) for call in reward.calls]
        assert max(calls) == (2 if order or judges > 1 else 8), "a group a call, against the whole step"
        assert {"time/generate", "time/reward"} <= made.timer.take().keys()
    for steps in runs[1:]:
        for one, other in zip(runs[0], steps, strict=True):
            assert other.metrics == one.metrics and other.outcomes == one.outcomes
            require_equal(other.scores, one.scores)
            for field in dataclasses.fields(Batch):
                a, b = getattr(one.batch, field.name), getattr(other.batch, field.name)
                assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name
