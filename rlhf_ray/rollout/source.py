"""Where scored batches come from: prompts -> generator.generate -> reward.score -> the rows to learn from.

With `max_staleness` 0 a step is made when the loop asks for it. With n, a thread runs ahead, and step k is written with
weights of version k - n.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rlhf_ray.algo.policy_losses import combine_stats
from rlhf_ray.batch import Batch, gather
from rlhf_ray.config.algorithm import AlgorithmConfig
from rlhf_ray.config.schema import RolloutConfig
from rlhf_ray.data.prompts import PromptSet
from rlhf_ray.errors import RewardError
from rlhf_ray.roles.protocols import Gather, Generator, Reward, Sampling, Scores
from rlhf_ray.rollout.ahead import Ahead
from rlhf_ray.rollout.choose import Asking, Choice, LearningRows
from rlhf_ray.rollout.groups import Answers, groups_of, joined
from rlhf_ray.rollout.ledger import Ledger, Outcome
from rlhf_ray.rollout.measures import rollout_metrics, source_metrics, staleness
from rlhf_ray.run.timer import Timer


@dataclass(frozen=True)
class Scored:
    """One step's rollouts with their rewards attached."""

    batch: Batch
    scores: Scores
    metrics: dict[str, float]
    outcomes: Mapping[int, Outcome]  # what becomes of each prompt that was asked, by its position
    sources: tuple[str, ...] = ()  # each row's, where there are several


class Rollouts:
    """The steps of a run, in order. The ledger is all that it remembers of those that were taken."""

    def __init__(
        self,
        generator: Generator,
        reward: Reward,
        prompts: PromptSet,
        config: RolloutConfig,
        sampling: Sampling,
        *,
        algorithm: AlgorithmConfig,
        steps: int,
        seed: int,
        timer: Timer,
        texts: int,
        gather: Gather = gather,
    ) -> None:
        """`steps`: of the whole run. `texts`: so many completions of each call to the reward come with their texts."""
        self.generator = generator
        self.reward = reward
        self.asking = Asking(prompts, config, algorithm, seed=seed, steps=steps)
        self.learning_rows = LearningRows(config, algorithm, sampling, gather)
        self.sampling = sampling
        self.prompts_per_step = config.prompts_per_step
        self.resample = algorithm.resample_rounds
        self.timer = timer
        self.texts = texts
        self.ledger = Ledger(config.max_staleness)
        self._version: int | None = None  # that the generator holds; nobody has pushed any yet
        self._lock = threading.Lock()  # of the ledger
        self._ahead = Ahead(self._make, self.ledger.version_for, steps) if config.max_staleness else None

    def next(self, step: int) -> Scored:
        """The next batch. Its prompts and seeds are functions of the position in the stream alone."""
        if self._ahead is None:
            scored = self._make(step, lambda: None)
        else:
            with self.timer("wait"):
                scored = self._ahead.take(step)
            scored = replace(scored, metrics={**scored.metrics, **staleness(scored.batch.rows, step)})
        with self._lock:
            for position, outcome in scored.outcomes.items():
                self.ledger.settle(position, outcome)
        return scored

    def _make(self, step: int, written: Callable[[], None]) -> Scored:
        """One step. `written` is called when the generator is done with it."""
        choice = Choice(self.prompts_per_step, self.resample)
        while choice.missing:
            last = len(choice.rounds) == self.resample
            choice = choice.after(self._answers(choice.missing, step, written if last else lambda: None))
        written()
        if not choice.usable:
            reasons = [str(event["reason"]) for answers in choice.rounds for event in answers.scores.events]
            raise RewardError(
                f"step {step + 1}: no group of answers was judged in full, so there is nothing to learn from; "
                f"mend the reward functions, or set another failure policy ({'; '.join(reasons)})"
            )
        metrics = self._metrics(choice, step)
        choice = choice.filled()
        batch, scores = self.learning_rows.of(choice)
        if "overlong_penalty" in scores.by_function:
            metrics["reward/overlong_penalty"] = float(scores.by_function["overlong_penalty"].mean())
        return Scored(batch, scores, metrics, choice.outcomes(), self.asking.sources_of(batch.rows))

    def _answers(self, count: int, step: int, written: Callable[[], None]) -> Answers:
        """The answers to the next `count` prompts of the stream, and their rewards."""
        asking = self.asking
        with self._lock:
            positions = self.ledger.dispatch(
                count, step=step, sampled=asking.sampled, greedy=asking.greedy, given=asking.given
            )
            version = self.ledger.version_for(step)
        requests = asking.requests(positions, step)
        with self.timer("generate"):
            self.generator.wake()
            batch = self.generator.generate(requests, self.sampling)
            self.generator.sleep()
        groups, rows = groups_of(requests, asking.members, version), batch.rows
        with self._lock:
            for group in groups:
                self.ledger.finish(group.position, **group.tokens(rows))
        written()
        with self.timer("reward"):
            return Answers(requests, groups, batch, rows, self.reward.score(batch, texts=self.texts))

    def _metrics(self, choice: Choice, step: int) -> dict[str, float]:
        """Of all sampled answers that were judged, learned from or not: they describe the policy."""
        rows, scores = joined(choice.rounds, choice.usable)
        metrics = rollout_metrics(rows, scores, step)
        if names := self.asking.sources_of(rows):
            parts, position = self.asking.prompts.parts, 1 + max(choice.asked)
            metrics |= source_metrics(parts, self.asking.stream.epochs(position), names, rows, scores, step)
        return metrics | combine_stats(answers.scores.stats for answers in choice.rounds) | choice.stats()

    def state_dict(self) -> dict[str, Any]:
        """What the prompts of the next batch depend on, and the books."""
        with self._lock:
            return self.ledger.state_dict(before=self._version)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there. Answers that were ready for later steps are not part of it: they are lost, and their
        prompts go out again."""
        self.ledger.load_state_dict(state)
        for position in list(self.ledger.open):
            self.ledger.lose(position)

    def finish_writing(self) -> None:
        """Until `weights_changed` nothing is written any more: the moment to change the generator's weights."""
        if self._ahead is not None:
            with self.timer("wait"):
                self._ahead.finish_writing()

    def weights_changed(self, version: int) -> dict[str, float]:
        """The generator now holds `version`. Returns the ledger's metrics at this moment."""
        first, self._version = self._version is None, version
        if first:
            self.ledger.first_version = version
        with self._lock:
            metrics = self.ledger.metrics(before=version)
        if self._ahead is not None:
            self._ahead.start(version, version) if first else self._ahead.changed(version)
        return metrics

    def close(self) -> None:
        """Stop generating ahead."""
        if self._ahead is not None:
            self._ahead.close()
