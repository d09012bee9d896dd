"""An AI judge: scores one answer, or says which of two is better; for RL rewards, win rates and preference pairs.

The judge runs at an OpenAI-compatible endpoint (`judge_endpoint.py`) or as a local model (`judge_local.py`). A judge
that cannot be reached is a RewardError, a reply that cannot be read is a failure of its row: never a number that the
judge did not give.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pydantic import ValidationError

from rlhf_ray.config.judge import JudgeConfig
from rlhf_ray.errors import ConfigError, RewardError
from rlhf_ray.rewards.calling import run_coroutine
from rlhf_ray.rewards.failures import Failure, Outcome
from rlhf_ray.rewards.judge_questions import Choice, Opinion


@dataclass(frozen=True)
class Verdict:
    """Of one pair in both orders. `forward` saw the first answer as A, `backward` saw it as B.

    `margin` is how much more likely the winner was to be named, in nats, mean of both orders; None for an endpoint.
    """

    winner: Literal["first", "second", "tie"]
    forward: Choice
    backward: Choice
    margin: float | None = None

    @property
    def position_bias(self) -> bool:
        """Whether it named the same place both times, and so contradicted itself."""
        return self.forward == self.backward != "tie"


class Judge(Protocol):
    """Raises RewardError where it cannot be asked at all; a row that it could not judge is a Failure."""

    async def score(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float | Failure]:
        """One score a row, on the config's scale."""

    async def compare(self, prompts: Sequence[str], a: Sequence[str], b: Sequence[str]) -> list[Opinion | Failure]:
        """Which is better, in this one order."""


async def judge(prompts: Sequence[str], completions: Sequence[str], **settings: Any) -> Outcome:
    """The judge's score of each completion, on its scale; as a reward: `{function: judge, args: {model: ...}}`.

    The arguments are the fields of `JudgeConfig`.
    """
    try:
        config = JudgeConfig(**settings)
    except ValidationError as error:
        raise ConfigError(f"reward judge: {error}; its args are {', '.join(JudgeConfig.model_fields)}") from error
    scores = await open_judge(config).score(prompts, completions)
    failures = {row: score for row, score in enumerate(scores) if isinstance(score, Failure)}
    return Outcome(tuple(None if isinstance(score, Failure) else score for score in scores), failures)


# A function that takes any keyword is also given the dataset's columns: name the settings.
judge.__signature__ = inspect.Signature(
    [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("prompts", "completions")]
    + [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in JudgeConfig.model_fields]
)


def open_judge(config: JudgeConfig) -> Judge:
    """The judge that the config names; a local model is loaded once a process.

    Raises:
        ConfigError: the endpoint's client is not installed, or its key is not set.
        RewardError: the local model cannot be loaded.
    """
    if config.endpoint is not None:
        from rlhf_ray.rewards.judge_endpoint import EndpointJudge

        return EndpointJudge(config)
    return _local_judge(config)


@functools.lru_cache(maxsize=2)
def _local_judge(config: JudgeConfig) -> Judge:
    from rlhf_ray.rewards.judge_local import load_local_judge

    return load_local_judge(config)


def compare_both_orders(
    judge: Judge, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]
) -> list[Verdict | Failure]:
    """Each pair judged twice, with the answers swapped: a judge that only likes a place cannot decide anything.

    A pair is won by the answer that was named both times; anything else is a tie (Zheng et al., 2023, section 3.4).
    Raises RewardError if not one pair could be judged.
    """

    async def both() -> tuple[list[Opinion | Failure], list[Opinion | Failure]]:
        # One after the other: the judge's own limit of requests under way holds for each call.
        return await judge.compare(prompts, first, second), await judge.compare(prompts, second, first)

    verdicts = [verdict_of(f, b) for f, b in zip(*run_coroutine(both()), strict=True)]
    failures = [verdict for verdict in verdicts if isinstance(verdict, Failure)]
    if failures and len(failures) == len(verdicts):
        raise RewardError(f"the judge {failures[0].what} for any of {len(failures)} pairs; {failures[0].hint}")
    return verdicts


def verdict_of(forward: Opinion | Failure, backward: Opinion | Failure) -> Verdict | Failure:
    """From the opinions on (first as A, second as B) and on the swapped pair."""
    for opinion in (forward, backward):
        if isinstance(opinion, Failure):
            return opinion
    winner = {("A", "B"): "first", ("B", "A"): "second"}.get((forward.choice, backward.choice), "tie")
    margin = None
    if forward.gap is not None and backward.gap is not None:
        margin = abs(forward.gap - backward.gap) / 2
    return Verdict(winner, forward.choice, backward.choice, margin)
