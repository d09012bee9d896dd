"""Where scored batches come from: prompts -> generator.generate -> reward.score.

With `max_staleness` 0 a batch is generated when the loop asks for it. With n, a thread runs ahead: the batch of
step k is generated with weights of version k-n or newer, never older.

Prompts come from the stream in order, each once. Here it is decided which answers the learner sees: groups that nobody
could judge are left out, and with dynamic sampling groups whose answers all earn the same make room for others.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from statistics import fmean, pstdev
from typing import Any

import torch

from rlhf_ray.algo.groups import informative_groups
from rlhf_ray.algo.policy_losses import combine_stats
from rlhf_ray.algo.schedules import linear
from rlhf_ray.algo.shaping import overlong_penalty
from rlhf_ray.batch import Batch, Rows, gather
from rlhf_ray.config.algorithm import AlgorithmConfig
from rlhf_ray.config.schema import RolloutConfig
from rlhf_ray.data.prompts import PromptSet
from rlhf_ray.data.stream import stream_over
from rlhf_ray.errors import RewardError
from rlhf_ray.evaluation.metrics import function_means
from rlhf_ray.roles.protocols import Gather, Generator, Request, Reward, Sampling, Scores
from rlhf_ray.roles.seeds import sample_seed
from rlhf_ray.run.timer import Timer

# How long a healthy generator thread may take to notice that it should end.
_STOP_SECONDS = 60.0


@dataclass(frozen=True)
class Scored:
    """One step's rollouts with their rewards attached."""

    batch: Batch
    scores: Scores
    metrics: dict[str, float]
    position: int  # in the prompt stream, behind this step's prompts
    sources: tuple[str, ...] = ()  # each row's, where there are several


@dataclass(frozen=True)
class Judged:
    """All the answers to some prompts, before anyone chooses among them."""

    requests: Sequence[Request]
    batch: Batch
    rows: Rows
    scores: Scores

    def rows_of(self, prompts: set[int]) -> list[int]:
        """Rows to learn from: the answers to these prompts without the greedy ones."""
        return [row for row, r in enumerate(self.requests) if r.prompt_id in prompts and r.temperature != 0]

    def greedy_scores(self, rows: Sequence[int]) -> torch.Tensor:
        """The reward of the greedy answer to each row's prompt."""
        greedy = {r.prompt_id: row for row, r in enumerate(self.requests) if r.temperature == 0}
        return self.scores.score[[greedy[self.requests[row].prompt_id] for row in rows]]

    def judged_prompts(self) -> set[int]:
        """Those all of whose answers have a reward."""
        prompts, keep_B = {r.prompt_id for r in self.requests}, self.scores.keep
        if keep_B is None:
            return prompts
        return prompts - {r.prompt_id for r, keep in zip(self.requests, keep_B.tolist(), strict=True) if not keep}

    def informative_prompts(self) -> set[int]:
        """Those whose answers earn different rewards."""
        rows = self.rows_of(self.judged_prompts())
        prompts = [self.requests[row].prompt_id for row in rows]
        keep_B = informative_groups(self.scores.score[rows], torch.tensor(prompts, dtype=torch.long))
        return {prompt for prompt, keep in zip(prompts, keep_B.tolist(), strict=True) if keep}


class Rollouts:
    """Generates on demand. Its only state is the position in the prompt stream."""

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
        self.generator = generator
        self.reward = reward
        self.prompts = prompts
        self.stream = stream_over(prompts.parts, seed)
        self.config = config
        self.sampling = sampling
        self.algorithm = algorithm
        self.steps = steps
        self.seed = seed
        self.timer = timer
        self.texts = texts
        self.gather = gather
        self.position = 0

    def next(self, step: int) -> Scored:
        """The next batch. Its prompts and seeds are functions of the position in the stream alone."""
        scored = self._sample(step, self.position)
        self.position = scored.position
        return scored

    def _sample(self, step: int, position: int) -> Scored:
        """The batch that begins at `position`. Each prompt is asked once, also one that is not learned from."""
        wanted, resample = self.config.prompts_per_step, self.algorithm.resample_rounds
        rounds: list[Judged] = []
        usable: set[int] = set()
        chosen: set[int] = set()
        while len(chosen) < wanted and len(rounds) <= resample:
            missing = wanted - len(chosen)
            judged = self._judge(range(position, position + missing), step)
            position += missing
            rounds.append(judged)
            usable |= judged.judged_prompts()
            chosen |= judged.informative_prompts() if resample else judged.judged_prompts()
        if not usable:
            reasons = [str(event["reason"]) for judged in rounds for event in judged.scores.events]
            raise RewardError(
                f"step {step + 1}: no group of answers was judged in full, so there is nothing to learn from; "
                f"mend the reward functions, or set another failure policy ({'; '.join(reasons)})"
            )
        rows, scores = _joined(rounds, usable)
        metrics = rollout_metrics(rows, scores, step) | self._by_source(rows, scores, step, position)
        metrics |= combine_stats(judged.scores.stats for judged in rounds)
        if resample:
            metrics["groups/asked"] = float(sum(len(judged.requests) for judged in rounds) // self.members)
            metrics["groups/informative"] = len(chosen) / wanted
            # Out of rounds: the step keeps its size, and the groups that fill it have advantage 0.
            chosen |= set(sorted(usable - chosen)[: wanted - len(chosen)])
        batch, scores = self._to_learn_from(rounds, chosen)
        if self.algorithm.overlong_buffer:
            metrics["reward/overlong_penalty"] = float(scores.by_function["overlong_penalty"].mean())
        return Scored(batch, scores, metrics, position, self._sources_of(batch.rows))

    def _judge(self, positions: Sequence[int], step: int) -> Judged:
        """Answers to these prompts of the stream, and their rewards."""
        requests = self.requests(positions, step)
        with self._generating(), self.timer("generate"):
            self.generator.wake()
            batch = self.generator.generate(requests, self.sampling)
            self.generator.sleep()
        with self.timer("reward"):
            return Judged(requests, batch, batch.rows, self.reward.score(batch, texts=self.texts))

    def _by_source(self, rows: Rows, scores: Scores, step: int, position: int) -> dict[str, float]:
        """The same metrics of each source that has a name; how often its prompts have been gone through so far."""
        names = self._sources_of(rows)
        if not names:
            return {}
        metrics: dict[str, float] = {}
        for part, epochs in zip(self.prompts.parts, self.stream.epochs(position), strict=True):
            own = [row for row, name in enumerate(names) if name == part.name]
            found = {"count": float(len(own)), "epochs": epochs}
            if own:
                found |= rollout_metrics(rows.select(own), scores.select(own), step)
            metrics |= {f"source/{part.name}/{name}": x for name, x in found.items() if not name.startswith("stale")}
        return metrics

    def _sources_of(self, rows: Rows) -> tuple[str, ...]:
        """The name of each row's source; empty where there is only one path."""
        if not any(part.name for part in self.prompts.parts):
            return ()
        return tuple(self.prompts.examples[self.stream[prompt][1]].source for prompt in rows.prompt_id)

    def _to_learn_from(self, rounds: Sequence[Judged], chosen: set[int]) -> tuple[Batch, Scores]:
        """The rows of the chosen prompts, with what the driver knows of them as columns."""
        parts = [(judged, rows) for judged in rounds if (rows := judged.rows_of(chosen))]
        scores = Scores.cat([judged.scores.select(rows) for judged, rows in parts])
        scores = replace(scores, events=tuple(event for judged in rounds for event in judged.scores.events))
        if self.algorithm.overlong_buffer:
            lengths = [judged.rows.response_lengths[row] for judged, rows in parts for row in rows]
            scores = self._with_overlong_penalty(scores, torch.tensor(lengths))
        columns = {"score": scores.score}
        if self.algorithm.advantage == "remax":
            columns["baseline"] = torch.cat([judged.greedy_scores(rows) for judged, rows in parts])
        if self.config.temperatures or self.config.temperature_end:
            own = [judged.requests[row].temperature for judged, rows in parts for row in rows]
            columns["temperature"] = torch.tensor([self.sampling.temperature if t is None else t for t in own])
        judged, rows = parts[0]
        if len(parts) == 1 and len(rows) == len(judged.requests):
            return judged.batch.replace(**columns), scores
        return self.gather([(judged.batch, rows) for judged, rows in parts]).replace(**columns), scores

    def _with_overlong_penalty(self, scores: Scores, length_B: torch.Tensor) -> Scores:
        longest = self.sampling.max_new_tokens
        penalty_B = overlong_penalty(length_B, longest, max(1, round(longest * self.algorithm.overlong_buffer)))
        named = {**scores.by_function, "overlong_penalty": penalty_B}
        return replace(scores, score=scores.score + penalty_B, by_function=named)

    @property
    def members(self) -> int:
        """Answers to each prompt: the group, and for ReMax the greedy one."""
        return self.config.group_size + (self.algorithm.advantage == "remax")

    def requests(self, positions: Sequence[int], step: int = 0) -> list[Request]:
        """`members` requests for each position of the prompt stream."""
        config = self.config
        moved = config.temperature_end and linear(config.temperature, config.temperature_end, step, self.steps)
        return [self._request(position, member, moved) for position in positions for member in range(self.members)]

    def _request(self, position: int, member: int, temperature: float | None) -> Request:
        config = self.config
        epoch, index = self.stream[position]
        example = self.prompts.examples[index]
        sampled = config.group_size - config.reference_answers
        answer = None
        if member == config.group_size:
            temperature = 0.0
        elif member >= sampled:
            # Every epoch goes on where the last one stopped in the pool.
            pool = self.prompts.answers[index]
            answer = pool[(epoch * config.reference_answers + member - sampled) % len(pool)]
        elif config.temperatures:
            temperature = config.temperatures[member % len(config.temperatures)]
        return Request(
            prompt_id=position,
            sample_id=position * self.members + member,
            token_ids=self.prompts.token_ids[index],
            seed=sample_seed(self.seed, position, member),
            columns={**example.columns, "prompt": example.prompt},
            chat=example.chat,
            temperature=temperature,
            answer=answer,
        )

    def state_dict(self) -> dict[str, Any]:
        """Where the prompts of the next batch begin."""
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.position = state["position"]

    def paused(self) -> AbstractContextManager[Any]:
        """No generation is under way inside: the moment to change the generator's weights."""
        return nullcontext()

    def _generating(self) -> AbstractContextManager[Any]:
        """The weights do not change inside."""
        return nullcontext()

    def weights_changed(self, version: int) -> None:
        """The generator now holds `version`."""

    def close(self) -> None:
        """Stop generating ahead."""


class OverlappedRollouts(Rollouts):
    """Generates ahead in a thread, at most `max_staleness` weight versions behind the learner."""

    def __init__(self, *args: Any, start: int, steps: int, **kwargs: Any) -> None:
        super().__init__(*args, steps=steps, **kwargs)
        # Nothing yet: until the first sync the generator holds the weights it was loaded with, and a resumed run
        # would learn from those.
        self._version: int | None = None
        self._changed = threading.Condition()
        self._generator_lock = threading.Lock()
        self._ready: queue.Queue[Scored | BaseException] = queue.Queue()
        self._stopping = False
        self._thread = threading.Thread(target=self._produce, args=(start, steps), name="rollouts", daemon=True)
        self._thread.start()

    def _produce(self, start: int, steps: int) -> None:
        try:
            position = None
            for step in range(start, steps):
                if not self._wait_for_version(step - self.config.max_staleness):
                    return
                # A resumed run's position is loaded before its first weights arrive, so now it is known.
                scored = self._sample(step, self.position if position is None else position)
                position = scored.position
                self._ready.put(scored)
        except BaseException as error:  # the loop must hear of it, whatever it is
            self._ready.put(error)

    def _wait_for_version(self, oldest: int) -> bool:
        """Wait until the generator holds `oldest` or newer weights; False if the run is ending instead."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or (self._version is not None and self._version >= oldest))
            return not self._stopping

    def next(self, step: int) -> Scored:
        with self.timer("wait"):
            scored = self._ready.get()
        if isinstance(scored, BaseException):
            raise scored
        self.position = scored.position
        return replace(scored, metrics={**scored.metrics, **staleness(scored.batch.rows, step)})

    # One lock for both: new weights wait for the sequences that are being written, but not for their rewards.
    @contextmanager
    def paused(self) -> Iterator[None]:
        with self.timer("wait"):
            self._generator_lock.acquire()
        try:
            yield
        finally:
            self._generator_lock.release()

    def _generating(self) -> AbstractContextManager[Any]:
        return self._generator_lock

    def weights_changed(self, version: int) -> None:
        with self._changed:
            self._version = version
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join(_STOP_SECONDS)


def _joined(rounds: Sequence[Judged], prompts: set[int]) -> tuple[Rows, Scores]:
    """All sampled answers to these prompts, learned from or not: the metrics describe the policy."""
    picked = [(judged, judged.rows_of(prompts)) for judged in rounds]
    rows = Rows.cat([judged.rows.select(rows) for judged, rows in picked])
    return rows, Scores.cat([judged.scores.select(rows) for judged, rows in picked])


def staleness(rows: Rows, step: int) -> dict[str, float]:
    """Weight versions between the policy that wrote each row and the one that learns from it."""
    behind = [step - version for version in rows.weight_version if version >= 0]
    return {
        "staleness/mean": sum(behind) / max(1, len(behind)),
        "staleness/max": float(max(behind, default=0)),
    }


def rollout_metrics(rows: Rows, scores: Scores, step: int) -> dict[str, float]:
    """What the completions and their rewards look like, by the metrics' final names."""
    score_B, response_B = scores.score, torch.tensor(rows.response_lengths, dtype=torch.float32)
    metrics = {
        "reward/mean": float(score_B.mean()),
        "reward/std": float(score_B.std(correction=0)),
        "reward/min": float(score_B.min()),
        "reward/max": float(score_B.max()),
        "response_len/mean": float(response_B.mean()),
        "response_len/max": float(response_B.max()),
        "truncated_frac": sum(rows.truncated) / len(rows),
        **staleness(rows, step),
    }
    return metrics | function_means(scores.by_function) | _group_metrics(rows.prompt_id, score_B.tolist())


def _group_metrics(prompt_ids: Sequence[int], scores: Sequence[float]) -> Mapping[str, float]:
    """Shares of groups in which every answer earns 1 or more, every answer 0 or less, or neither; in which all earn the
    same; and how far a group's answers differ.
    """
    groups: dict[int, list[float]] = {}
    for prompt, score in zip(prompt_ids, scores, strict=True):
        groups.setdefault(prompt, []).append(score)
    correct = sum(min(group) >= 1 for group in groups.values()) / len(groups)
    wrong = sum(max(group) <= 0 for group in groups.values()) / len(groups)
    return {
        "groups/all_correct": correct,
        "groups/all_wrong": wrong,
        "groups/mixed": 1 - correct - wrong,
        "groups/same": sum(min(group) == max(group) for group in groups.values()) / len(groups),
        "reward/std_in_group": fmean(pstdev(group) for group in groups.values()),
    }
