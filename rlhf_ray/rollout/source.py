"""Where scored batches come from: prompts -> generator.generate -> reward.score -> the rows to learn from.

With `max_staleness` 0 a step is made when the loop asks for it. With n, a thread runs ahead, and step k is written with
weights of version k - n.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from rlhf_ray.algo.policy_losses import combine_stats
from rlhf_ray.config.algorithm import AlgorithmConfig
from rlhf_ray.config.schema import RolloutConfig
from rlhf_ray.data.prompts import PromptSet
from rlhf_ray.errors import RewardError, WorkerError
from rlhf_ray.roles.batch import gather
from rlhf_ray.roles.protocols import HERE, BatchStore, Gather, Generator, Reward, Sampling
from rlhf_ray.rollout.ahead import Ahead
from rlhf_ray.rollout.choose import Asking, Choice, LearningRows
from rlhf_ray.rollout.groups import Answers, Judging, groups_of, joined, parcels_of
from rlhf_ray.rollout.kept import Scored, from_plain, plain
from rlhf_ray.rollout.ledger import Count, Ledger
from rlhf_ray.rollout.measures import rollout_metrics, source_metrics, staleness
from rlhf_ray.run.timer import Timer


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
        store: BatchStore = HERE,
        early_rewards: bool = False,
        judges: int = 1,
    ) -> None:
        """
        Args:
            steps: of the whole run.
            texts: so many completions of each call to the reward come with their texts.
            gather, store, early_rewards, judges: those of `roles.protocols.Roles`.
        """
        self.generator = generator
        self.reward = reward
        self.asking = Asking(prompts, config, algorithm, seed=seed, steps=steps)
        self.learning_rows = LearningRows(config, algorithm, sampling, gather)
        self.sampling = sampling
        self.prompts_per_step = config.prompts_per_step
        self.resample = algorithm.resample_rounds
        self.timer = timer
        self.texts = texts
        self.store = store
        self.gather = gather
        self.early_rewards = early_rewards
        self.judges = judges
        self.max_staleness, self.steps = config.max_staleness, steps
        self._lock = threading.Lock()  # of the ledger
        self._begin(Count())

    def _begin(self, sampled: Count) -> None:
        self.ledger = Ledger(self.max_staleness)
        self.ledger.leave(sampled)
        self._left = sampled
        self._kept: dict[int, Scored] = {}  # from the checkpoint, by step
        self._dropped = 0  # samples that were too old when the run went on
        self._version: int | None = None  # that the generator holds; nobody has pushed any yet
        self._ahead = Ahead(self._make, self.ledger.version_for, self.steps) if self.max_staleness else None

    def go_back(self) -> None:
        """The run leaves its weights: no step is under way or ready any more, and what has been sampled is lost, but
        for what `load_state_dict` knows of. Raises WorkerError if a step that is being made does not end."""
        if self._ahead is not None and not self._ahead.close():
            raise WorkerError("the step that is being written ahead does not end; resume with --resume auto")
        self._begin(self.ledger.sampled)

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
        dropped, self._dropped = self._dropped, 0
        return replace(scored, metrics=scored.metrics | {"dropped_stale": float(dropped)}) if dropped else scored

    def _make(self, step: int, written: Callable[[], None]) -> Scored:
        """One step. `written` is called when the generator is done with it."""
        choice = Choice(self.prompts_per_step, self.resample)
        while choice.missing:
            last = len(choice.rounds) == self.resample
            choice = choice.after(self._answers(choice.missing, step, written if last else lambda: None))
        written()
        if not choice.usable:
            choice.require_finite(step)
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
        with Judging(self.reward, self._parcels(count), self.texts, self.timer, self.judges) as judging:
            early = self.early_rewards and len(judging.parcels) > 1
            with self.timer("generate"):
                self.generator.wake()
                if early:
                    batch = self.generator.generate_parcels(requests, self.sampling, judging.parcels, judging.written)
                else:
                    batch = self.generator.generate(requests, self.sampling)
                self.generator.sleep()
            if not early and len(judging.parcels) > 1:
                for parcel, own in enumerate(judging.parcels):
                    judging.written(parcel, self.gather([(batch, own)]))
            groups, rows = groups_of(requests, asking.members, version), batch.rows
            with self._lock:
                for position, tokens in groups.tokens(rows):
                    self.ledger.finish(position, **tokens)
            written()
            answers = Answers(requests, groups, batch, rows, judging.scores(batch))
        events = (*answers.scores.events, *answers.broken_events())
        return replace(answers, scores=replace(answers.scores, events=events))

    def _parcels(self, count: int) -> list[range]:
        """Locally one: what judges and writes in one process does it one after the other, and each call has a cost."""
        members = self.asking.members
        if not self.early_rewards and self.judges == 1:
            return [range(count * members)]
        return parcels_of(count, members, self.judges)

    def _metrics(self, choice: Choice, step: int) -> dict[str, float]:
        """Of all sampled answers that were judged, learned from or not: they describe the policy."""
        rows, scores = joined(choice.rounds, choice.usable)
        metrics = rollout_metrics(rows, scores, step)
        if names := self.asking.sources_of(rows):
            parts, position = self.asking.prompts.parts, 1 + max(choice.asked)
            metrics |= source_metrics(parts, self.asking.stream.epochs(position), names, rows, scores, step)
        return metrics | combine_stats(answers.scores.stats for answers in choice.rounds) | choice.stats()

    def state_dict(self) -> dict[str, Any]:
        """The books, and the steps that are ready: what a run that goes on from here needs to lose nothing, to repeat
        nothing, and to be the same run."""
        ready = {}
        if self._ahead is not None and self._version is not None:
            ready = self._ahead.due_before(self._version)
        steps = {step: plain(replace(made, batch=self.store.fetch(made.batch))) for step, made in ready.items()}
        with self._lock:
            return {**self.ledger.state_dict(before=self._version), "ready": steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there. Steps that are too old under today's `max_staleness` are dropped, and what the books call
        open and the state does not hold is lost, so that its prompts go out again."""
        self.ledger.load_state_dict(state)
        self.ledger.leave(self._left)
        before, fresh = self.ledger.counts()["stale"].samples, True
        for step, made in sorted(state.get("ready", {}).items()):
            # The steps after one that is written anew come after it in the stream, too.
            fresh = fresh and not any(self.ledger.too_old(position, step) for position in made["outcomes"])
            if fresh:
                self._kept[step] = self._restored(made)
                continue
            for position in made["outcomes"]:
                self.ledger.settle(position, "stale")
        self._dropped = self.ledger.counts()["stale"].samples - before
        kept = {position for scored in self._kept.values() for position in scored.outcomes}
        for position in self.ledger.open.keys() - kept:
            self.ledger.lose(position)

    def _restored(self, made: Mapping[str, Any]) -> Scored:
        prompts = {position: self.asking.requests([position])[0] for position in made["outcomes"]}
        scored = from_plain(made, [prompts[position] for position in made["batch"]["prompt_id"].tolist()])
        return replace(scored, batch=self.store.place(scored.batch))

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
            if first:
                self._ahead.start(version, self._kept)
            else:
                self._ahead.changed(version)
        return metrics

    def close(self) -> None:
        """Stop generating ahead."""
        if self._ahead is not None:
            self._ahead.close()
