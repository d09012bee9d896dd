"""Where scored batches come from: prompts -> generator.generate -> reward.score.

With `max_staleness` 0 a batch is generated when the loop asks for it. With n, a thread runs ahead: the batch of
step k is generated with weights of version k-n or newer, never older.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from rlhf_ray.batch import Batch, Rows
from rlhf_ray.config.schema import RolloutConfig
from rlhf_ray.data.prompts import PromptSet, PromptStream
from rlhf_ray.roles.protocols import Generator, Request, Reward, Sampling, Scores
from rlhf_ray.run.timer import Timer

# How long a healthy generator thread may take to notice that it should end.
_STOP_SECONDS = 60.0


@dataclass(frozen=True)
class Scored:
    """One step's rollouts with their rewards attached."""

    batch: Batch
    scores: Scores
    metrics: dict[str, float]


class Rollouts:
    """Generates on demand. Its position in the prompt stream is a function of the step: nothing to checkpoint."""

    def __init__(
        self,
        generator: Generator,
        reward: Reward,
        prompts: PromptSet,
        config: RolloutConfig,
        sampling: Sampling,
        *,
        seed: int,
        timer: Timer,
        texts: int,
    ) -> None:
        self.generator = generator
        self.reward = reward
        self.prompts = prompts
        self.stream = PromptStream(len(prompts), seed)
        self.config = config
        self.sampling = sampling
        self.seed = seed
        self.timer = timer
        self.texts = texts

    def next(self, step: int) -> Scored:
        """The batch of `step`: its prompts and seeds are functions of the step alone."""
        count = self.config.prompts_per_step
        requests = self.requests(range(step * count, (step + 1) * count))
        with self._generating(), self.timer("generate"):
            self.generator.wake()
            batch = self.generator.generate(requests, self.sampling)
            self.generator.sleep()
        with self.timer("reward"):
            scores = self.reward.score(batch, texts=self.texts)
        return Scored(batch.replace(score=scores.score), scores, rollout_metrics(batch.rows, scores, step))

    def requests(self, positions: Sequence[int]) -> list[Request]:
        """`group_size` requests for each position of the prompt stream."""
        size = self.config.group_size
        requests = []
        for position in positions:
            _, index = self.stream[position]
            example = self.prompts.examples[index]
            for member in range(size):
                requests.append(
                    Request(
                        prompt_id=position,
                        sample_id=position * size + member,
                        token_ids=self.prompts.token_ids[index],
                        seed=sample_seed(self.seed, position, member),
                        columns={**example.columns, "prompt": example.prompt},
                    )
                )
        return requests

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
        super().__init__(*args, **kwargs)
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
            for step in range(start, steps):
                if not self._wait_for_version(step - self.config.max_staleness):
                    return
                self._ready.put(super().next(step))
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
        return Scored(scored.batch, scored.scores, {**scored.metrics, **staleness(scored.batch.rows, step)})

    # One lock for both: new weights wait for the sequences that are being written, but not for their rewards.
    def paused(self) -> AbstractContextManager[Any]:
        return self._generator_lock

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


def sample_seed(run_seed: int, position: int, member: int) -> int:
    """63 bits that depend on nothing but these three numbers."""
    digest = hashlib.blake2b(f"{run_seed}/{position}/{member}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


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
    metrics |= {f"reward/{name}": float(value_B.mean()) for name, value_B in scores.by_function.items()}
    return metrics | _group_metrics(rows.prompt_id, score_B.tolist())


def _group_metrics(prompt_ids: Sequence[int], scores: Sequence[float]) -> Mapping[str, float]:
    """Shares of groups in which every answer earns 1 or more, every answer 0 or less, or neither."""
    groups: dict[int, list[float]] = {}
    for prompt, score in zip(prompt_ids, scores, strict=True):
        groups.setdefault(prompt, []).append(score)
    correct = sum(min(group) >= 1 for group in groups.values()) / len(groups)
    wrong = sum(max(group) <= 0 for group in groups.values()) / len(groups)
    return {"groups/all_correct": correct, "groups/all_wrong": wrong, "groups/mixed": 1 - correct - wrong}
