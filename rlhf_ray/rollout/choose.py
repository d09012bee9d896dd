"""Which prompts are asked, what is asked of each member of a group, and which answers the learner sees.

Prompts come from the stream in order, each once. Groups that nobody could judge are left out, and with dynamic sampling
groups whose answers all earn the same make room for others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from rlhf_ray.algo.schedules import linear
from rlhf_ray.algo.shaping import overlong_penalty
from rlhf_ray.config.algorithm import AlgorithmConfig
from rlhf_ray.config.schema import RolloutConfig
from rlhf_ray.data.prompts import PromptSet
from rlhf_ray.errors import DivergenceError
from rlhf_ray.roles.batch import Batch, Rows, gather
from rlhf_ray.roles.protocols import Gather, Sampling, Scores
from rlhf_ray.roles.requests import Requests
from rlhf_ray.rollout.groups import Answers, gathered
from rlhf_ray.rollout.ledger import Outcome
from rlhf_ray.rollout.order import prompt_stream
from rlhf_ray.sample import SampleSeeds


class Asking:
    """Requests for the prompts of the stream: functions of the position in it, of the seed and of the step alone."""

    def __init__(
        self, prompts: PromptSet, config: RolloutConfig, algorithm: AlgorithmConfig, *, seed: int, steps: int
    ) -> None:
        self.prompts = prompts
        self.config = config
        self.stream = prompt_stream(prompts, config.order, seed)
        self.greedy = algorithm.advantage_facts.baseline == "greedy"
        self.seed = seed
        self.steps = steps

    @property
    def members(self) -> int:
        """Answers to each prompt: the group, and for ReMax the greedy one."""
        return self.config.group_size + self.greedy

    @property
    def sampled(self) -> int:
        """Those of them that the policy writes and the learner sees."""
        return self.config.group_size - self.given

    @property
    def given(self) -> int:
        """Those of them that come from the data."""
        return self.config.reference_answers

    def requests(self, positions: Sequence[int], step: int = 0) -> Requests:
        """`members` requests for each position of the prompt stream."""
        asked, members = [self.stream[position] for position in positions], self.members
        examples = [self.prompts.examples[index] for _, index in asked]
        position_N = np.repeat(np.asarray(positions, np.int64), members)
        member_N = np.tile(np.arange(members), len(positions))
        own = self._temperatures(step)
        return Requests(
            tokens=tuple(self.prompts.token_ids[index] for _, index in asked),
            texts=tuple(({**example.columns, "prompt": example.prompt}, example.chat) for example in examples),
            prompt=np.repeat(np.arange(len(positions), dtype=np.int32), members),
            prompt_id=position_N,
            sample_id=position_N * members + member_N,
            seed=SampleSeeds(self.seed, position_N, member_N),
            temperature=None if own.count(None) == members else np.tile(np.asarray(own, np.float64), len(positions)),
            answers={
                group * members + member: self._answer(epoch, index, member)
                for group, (epoch, index) in enumerate(asked)
                for member in range(self.sampled, self.config.group_size)
            },
        )

    def _temperatures(self, step: int) -> list[float | None]:
        """Of each member; None: the one that all are sampled at."""
        config = self.config
        moved = config.temperature_end and linear(config.temperature, config.temperature_end, step, self.steps)
        heat = [config.temperatures[i % len(config.temperatures)] if config.temperatures else moved
                for i in range(self.sampled)]  # fmt: skip
        return heat + [moved] * self.given + [0.0] * self.greedy

    def _answer(self, epoch: int, index: int, member: int) -> tuple[int, ...]:
        """That this member is given."""
        # Every epoch goes on where the last one stopped in the pool.
        pool = self.prompts.answers[index]
        return pool[(epoch * self.given + member - self.sampled) % len(pool)]

    def sources_of(self, rows: Rows) -> tuple[str, ...]:
        """The name of each row's source; empty where there is only one path."""
        if not any(part.name for part in self.prompts.parts):
            return ()
        return tuple(self.prompts.examples[self.stream[prompt][1]].source for prompt in rows.prompt_id.tolist())


@dataclass(frozen=True)
class Choice:
    """The answers of a step, chosen round by round. Each prompt is asked once, also one that is not learned from."""

    wanted: int  # prompts of a step
    resample: int  # rounds in which groups without signal may be replaced; 0: all that were judged are learned from
    rounds: tuple[Answers, ...] = ()
    usable: frozenset[int] = frozenset()  # prompts that were judged in full
    chosen: frozenset[int] = frozenset()

    @property
    def missing(self) -> int:
        """How many prompts the next round asks; 0: there is none."""
        return self.wanted - len(self.chosen) if len(self.rounds) <= self.resample else 0

    def after(self, answers: Answers) -> Choice:
        """With the answers of one more round."""
        judged = answers.judged()
        chosen = answers.informative() if self.resample else judged
        return replace(
            self, rounds=(*self.rounds, answers), usable=self.usable | judged, chosen=self.chosen | chosen
        )

    def filled(self) -> Choice:
        """Out of rounds the step keeps its size, and the groups that fill it have advantage 0."""
        if not self.resample:
            return self
        rest = sorted(self.usable - self.chosen)[: self.wanted - len(self.chosen)]
        return replace(self, chosen=self.chosen | set(rest))

    @property
    def asked(self) -> list[int]:
        """Every prompt of every round."""
        return [position for answers in self.rounds for position in answers.groups.positions.tolist()]

    def outcomes(self) -> dict[int, Outcome]:
        """What becomes of each of them."""
        found: dict[int, Outcome] = dict.fromkeys(self.asked, "failed")
        return found | dict.fromkeys(self.usable, "filtered") | dict.fromkeys(self.chosen, "learned")

    def require_finite(self, step: int) -> None:
        """Raises DivergenceError if no group is usable because all have log-probabilities that are not finite."""
        if all(answers.broken() == set(answers.groups.positions.tolist()) for answers in self.rounds):
            reasons = [event["reason"] for answers in self.rounds for event in answers.broken_events()]
            raise DivergenceError(
                f"step {step + 1}: every group has answers whose log-probabilities are not finite, so the weights are "
                "broken; go on from an earlier checkpoint with a lower learner.lr or learner.max_grad_norm "
                f"({'; '.join(reasons)})"
            )

    def stats(self) -> dict[str, float]:
        """Of groups that are left out, and of dynamic sampling, before `filled`."""
        left_out = {"fault/not_finite": float(sum(len(answers.broken()) for answers in self.rounds))}
        if not self.resample:
            return left_out
        informative = len(self.chosen) / self.wanted
        return {**left_out, "groups/asked": float(len(self.asked)), "groups/informative": informative}


class LearningRows:
    """The rows of the chosen prompts, with what the driver knows of them as columns."""

    def __init__(
        self, config: RolloutConfig, algorithm: AlgorithmConfig, sampling: Sampling, gather: Gather = gather
    ) -> None:
        self.algorithm = algorithm
        self.sampling = sampling
        self.gather = gather
        self.own_temperatures = bool(config.temperatures or config.temperature_end)

    def of(self, choice: Choice) -> tuple[Batch, Scores]:
        """(columns `score`, `baseline` and `temperature` included, the rewards with the penalty for length)"""
        chosen = choice.chosen
        parts = [(answers, rows) for answers in choice.rounds if len(rows := answers.rows_of(chosen))]
        scores = Scores.cat([answers.scores.select(rows) for answers, rows in parts])
        scores = replace(scores, events=tuple(event for answers in choice.rounds for event in answers.scores.events))
        if self.algorithm.overlong_buffer:
            lengths = np.concatenate([answers.rows.response_lengths[rows] for answers, rows in parts])
            scores = self._with_overlong_penalty(scores, torch.from_numpy(lengths))
        columns = {"score": scores.score}
        if self.algorithm.advantage_facts.baseline == "greedy":
            columns["baseline"] = torch.cat([answers.greedy_scores(chosen) for answers, _ in parts])
        if self.own_temperatures:
            own_B = np.concatenate([answers.requests.temperature[rows] for answers, rows in parts])
            heat_B = np.where(np.isnan(own_B), self.sampling.temperature, own_B)
            columns["temperature"] = torch.from_numpy(heat_B.astype(np.float32))
        return gathered(choice.rounds, chosen, self.gather).replace(**columns), scores

    def _with_overlong_penalty(self, scores: Scores, length_B: torch.Tensor) -> Scores:
        longest = self.sampling.max_new_tokens
        penalty_B = overlong_penalty(length_B, longest, max(1, round(longest * self.algorithm.overlong_buffer)))
        named = {**scores.by_function, "overlong_penalty": penalty_B}
        return replace(scores, score=scores.score + penalty_B, by_function=named)
