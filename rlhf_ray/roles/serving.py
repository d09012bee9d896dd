"""A batch of answers from an engine that writes them one by one, and answers that nobody writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

from rlhf_ray.errors import EngineError, RlhfRayError
from rlhf_ray.roles.batch import Batch, batch_of
from rlhf_ray.roles.protocols import Engine, Request, Sampling
from rlhf_ray.sample import GIVEN, Sample


class WholeGroups:
    """Answers from an engine that writes them one by one, and those that nobody writes: a group at a time, whole."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._open: dict[int, _Group] = {}  # by sample_id
        self._whole: list[_Group] = []  # not yet handed over

    def submit(self, requests: Sequence[Request], sampling: Sampling) -> None:
        """Take requests on; those side by side that ask the same prompt are a group. See `Engine.submit`."""
        requests = list(requests)
        self.engine.submit([request for request in requests if request.answer is None], sampling)
        for _, side_by_side in groupby(requests, key=lambda request: request.prompt_id):
            members = list(side_by_side)
            group = _Group([request.sample_id for request in members])
            group.found = {r.sample_id: given_answer(r, sampling) for r in members if r.answer is not None}
            self._open |= dict.fromkeys([r.sample_id for r in members if r.answer is None], group)
            if group.whole:
                self._whole.append(group)

    def collect(self, least: int = 1) -> list[Sample]:
        """Run the engine until so many groups are whole, or nothing is open: all that are, in the order in which they
        became it, the members of each side by side. See `Engine.collect` for what is raised."""
        while len(self._whole) < least and self._open:
            samples = self.engine.collect()
            if not samples:
                raise EngineError(f"the generator knows nothing of {len(self._open)} open requests; start it again")
            for sample in samples:
                group = self._open.pop(sample.sample_id)
                group.found[sample.sample_id] = sample
                if group.whole:
                    self._whole.append(group)
        whole, self._whole = self._whole, []
        return [group.found[sample_id] for group in whole for sample_id in group.sample_ids]

    def cancel(self) -> None:
        """Drop everything that is open, and what has been written of it."""
        self.engine.cancel([*self._open])
        self._open, self._whole = {}, []


@dataclass(eq=False)
class _Group:
    sample_ids: list[int]
    found: dict[int, Sample] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        return len(self.found) == len(self.sample_ids)


def generate(engine: Engine, requests: Sequence[Request], sampling: Sampling, pad_token_id: int) -> Batch:
    """One row a request, in order: what the engine writes, and the answers that requests bring along.

    Raises RlhfRayError if other requests are open, for their answers would be lost here.
    """
    if engine.open:
        raise RlhfRayError(f"generate: {engine.open} requests are open; collect or cancel them first")
    groups, requests = WholeGroups(engine), list(requests)
    groups.submit(requests, sampling)
    try:
        samples = groups.collect(least=len(requests))
    except BaseException:  # also somebody's ctrl-C: what is left open would stand in the way of the next call
        groups.cancel()
        raise
    found = {sample.sample_id: sample for sample in samples}
    columns, chats = [request.columns for request in requests], [request.chat for request in requests]
    samples = [found[request.sample_id] for request in requests]
    return batch_of(samples, columns, chats, pad_token_id=pad_token_id)


def given_answer(request: Request, sampling: Sampling) -> Sample:
    """The answer that the request brings along, cut at `max_new_tokens`: no weights wrote it, and its
    log-probabilities say nothing."""
    answer = request.answer[: sampling.max_new_tokens]
    ended = "stop" if answer[-1] in sampling.stop_token_ids else "length"
    return Sample.answer(
        request.prompt_id, request.sample_id, request.token_ids, answer, [0.0] * len(answer), GIVEN, ended
    )
