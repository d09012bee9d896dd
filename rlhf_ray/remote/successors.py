"""A process in the seat of a lost generator gets no work before it has the weights, and answers like the others.

The weights are those that the learner sent last. Its process keeps them until it sends newer ones
(sync/shared_memory.py), and hands them on beside its computing: nobody waits for a step to end, no other rank hears of
it, and what comes out is what the lost one would have written.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_ray.remote.calls import Call, Deadline, Worker
from rlhf_ray.remote.crew import Crew, GoneError
from rlhf_ray.remote.failures import LostError
from rlhf_ray.remote.health import State
from rlhf_ray.remote.hosts import LearnerHost
from rlhf_ray.roles.protocols import Generator
from rlhf_ray.sync.canary import LogProbs, absdiff_max

# Until what has become of a worker is known.
LOOK_AGAIN_S = 0.1


@dataclass(frozen=True)
class Proof:
    """What a generator that holds these weights has answered: the canary's tokens and their log-probabilities."""

    version: int
    tokens: Sequence[Sequence[int]]
    logprobs: LogProbs


class Successors:
    """
    Args:
        learner: rank 0, which sends the weights.
        bound: largest accepted difference between two generators' log-probabilities, in nats.
        deadline: of a call of a generator; `sync_deadline`: of the way of the weights to one.
    Attributes:
        proof: the last answer of any generator to the canary.
    """

    def __init__(
        self, crew: Crew, learner: Worker | None, bound: float, deadline: Deadline, sync_deadline: Deadline
    ) -> None:
        self.crew = crew
        self.learner = learner
        self.bound = bound
        self.deadline = deadline
        self.sync_deadline = sync_deadline
        self.proof: Proof | None = None

    def begin(self, worker: Worker) -> Call:
        """Begin to send the weights to this stale process."""
        return self.learner.start(LearnerHost.send_again, worker, deadline=self.sync_deadline)

    def end(self, worker: Worker, sent: bool) -> bool:
        """`sent`: the result of that call. Returns whether the process can work now; else it is lost, or it will be
        stale still, and they must be sent again."""
        if not sent:
            time.sleep(LOOK_AGAIN_S)  # until its death is known
        elif self._answers_like_the_others(worker):
            self.crew.synced(worker)
        return self.crew.state(worker) is State.HEALTHY

    def sync(self, worker: Worker) -> bool:
        """Both, and the time between them."""
        return self.end(worker, self.crew.results([self.begin(worker)])[0])

    def _answers_like_the_others(self, worker: Worker) -> bool:
        """The canary's question, before it writes anything. Those that differ are replaced like lost ones. Without a
        canary nobody asks, and newer weights than the others were asked about wait for the next."""
        proof = self.proof
        # Weights that are broken are nobody's fault here: no two answers of theirs are equal, nor is one to itself.
        if proof is None or not all(math.isfinite(logp) for row in proof.logprobs for logp in row):
            return True
        calls = [
            worker.ask(method, *args, deadline=self.deadline)
            for method, args in ((Generator.logprobs, (proof.tokens,)), (Generator.version.fget, ()))
        ]
        try:
            found, version = self.crew.results(calls)
        except GoneError:
            return False
        difference = absdiff_max(found, proof.logprobs)
        if version != proof.version or difference <= self.bound:
            return True
        text = (
            f"{worker} holds version {version}, and its log-probabilities differ by {difference:.2g} nats, more than "
            f"{self.bound:.2g}, from those of others that hold it: its weights or its device are at fault; look "
            "there, then resume with --resume auto"
        )
        self.crew.supervisor.report(calls[0], LostError(text))
        while self.crew.state(worker) is State.STALE:
            self.crew.check()
            time.sleep(LOOK_AGAIN_S)
        return False
