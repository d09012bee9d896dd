"""How good the policy is on held-out prompts, before, during and after training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_ray.data.prompts import PromptSet
from rlhf_ray.data.stream import by_turns
from rlhf_ray.evaluation.answers import requests_for
from rlhf_ray.evaluation.metrics import reward_metrics, text_metrics
from rlhf_ray.loops.best import BestPolicy
from rlhf_ray.roles.protocols import Generator, Reward, Sampling

SAMPLES_SHOWN = 10


class Evaluator:
    """One completion for each held-out prompt, judged by the run's own reward."""

    def __init__(
        self, generator: Generator, reward: Reward, prompts: PromptSet, sampling: Sampling, *, seed: int,
        right: str | None = None, best: BestPolicy | None = None,
    ) -> None:  # fmt: skip
        """`right`: the reward that says which answers are right. `best`: hears of every evaluation."""
        self.generator = generator
        self.reward = reward
        self.sampling = sampling
        self.requests = requests_for(prompts, seed)
        self.right = right
        self.best = best
        self.sources = [example.source for example in prompts.examples]

    def evaluate(self, step: int) -> dict[str, Any]:
        """`reward` (the weighted sum), `reward/<name>` of each function, `accuracy` (by the reward that says which
        answers are right), `response_len`, `truncated_frac`, `distinct_1`, `distinct_2`, `distinct_1_tokens`,
        `distinct_2_tokens`, and `samples` (prompt, completion, reward). Of several sources also
        `source/<name>/reward` and what belongs to it. `step`: how many the policy has learned in.
        """
        self.generator.wake()
        batch = self.generator.generate(self.requests, self.sampling)
        self.generator.sleep()
        scores = self.reward.score(batch, texts=len(self.requests))
        rows = batch.rows
        result: dict[str, Any] = {
            **reward_metrics(scores.score, scores.by_function, right=self.right),
            **text_metrics([completion for _, completion in scores.texts], scores.completion_ids, rows),
        }
        for name in dict.fromkeys(filter(None, self.sources)):
            own = scores.select([row for row, source in enumerate(self.sources) if source == name])
            found = reward_metrics(own.score, own.by_function, right=self.right)
            result |= {f"source/{name}/{metric}": value for metric, value in found.items()}
        result["samples"] = [
            {"prompt": scores.texts[i][0], "completion": scores.texts[i][1], "reward": float(scores.score[i])}
            for i in by_turns(self.sources)[:SAMPLES_SHOWN]
        ]
        if self.best is not None:
            self.best.consider(step, result)
        return result


def numbers_of(result: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """The numbers of an evaluation as metrics."""
    return {f"{prefix}{name}": value for name, value in result.items() if isinstance(value, float)}
