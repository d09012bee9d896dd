"""A generator and a reward that answer at once, and prompts for them."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
import torch

from rlhf_ray.data.prompts import Example, PromptSet
from rlhf_ray.roles.batch import Batch, build_batch
from rlhf_ray.roles.protocols import Request, Sampling, Scores


class FakeGenerator:
    """Completion = one token, the version of the weights that were set last."""

    def __init__(self) -> None:
        self.version = 0
        self.asked: list[list[Request]] = []
        self.sampling: list[Sampling] = []
        self.fail_at: int | None = None
        self.gate: threading.Event | None = None
        self.generating = False
        self.awake = 0

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Batch:
        assert self.awake == 1
        self.generating, version = True, self.version
        if self.gate is not None:
            self.gate.wait(20)
        if self.fail_at == len(self.asked):
            raise RuntimeError("the generator fell over")
        self.asked.append(list(requests))
        self.sampling.append(sampling)
        assert self.version == version, "the weights changed while it was writing"
        self.generating = False
        return build_batch(
            requests, [[version]] * len(requests), [[-1.0]] * len(requests), truncated=[False] * len(requests),
            weight_version=version,
        )  # fmt: skip

    def wake(self) -> None:
        self.awake += 1

    def sleep(self) -> None:
        self.awake -= 1


class FakeReward:
    """Scores 0, 1, 2, ... by row."""

    def __init__(self) -> None:
        self.gate: threading.Event | None = None

    def score(self, batch: Batch, texts: int = 0) -> Scores:
        if self.gate is not None:
            self.gate.wait(20)
        score_B = torch.arange(len(batch), dtype=torch.float32)
        pairs = tuple((row["prompt"], f"answer {i}") for i, row in enumerate(batch.columns))
        ids = tuple((5, 6 + i % 2) for i in range(texts))
        return Scores(score_B, {"row": score_B, "half": score_B / 2}, pairs[:texts], completion_ids=ids)


@pytest.fixture
def generator() -> FakeGenerator:
    return FakeGenerator()


@pytest.fixture
def reward() -> FakeReward:
    return FakeReward()


@pytest.fixture
def prompts() -> PromptSet:
    """Five prompts p0 .. p4 with token ids (10,), (11, 11), ..."""
    return PromptSet(
        tuple(Example(f"p{i}", {"answer": str(i)}) for i in range(5)),
        tuple((10 + i,) * (i + 1) for i in range(5)),
        {},
    )
