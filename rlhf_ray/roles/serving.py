"""A batch of answers from an engine that writes them one by one, and answers that nobody writes."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_ray.errors import RlhfRayError
from rlhf_ray.roles.batch import Batch, batch_of
from rlhf_ray.roles.protocols import Engine, Request, Sampling
from rlhf_ray.sample import GIVEN, Sample


def generate(engine: Engine, requests: Sequence[Request], sampling: Sampling, pad_token_id: int) -> Batch:
    """One row a request, in order: what the engine writes, and the answers that requests bring along.

    Raises RlhfRayError if other requests are open, for their answers would be lost here.
    """
    if engine.open:
        raise RlhfRayError(f"generate: {engine.open} requests are open; collect or cancel them first")
    engine.submit([request for request in requests if request.answer is None], sampling)
    found = {request.sample_id: given_answer(request, sampling) for request in requests if request.answer is not None}
    try:
        while engine.open:
            found |= {sample.sample_id: sample for sample in engine.collect()}
    except BaseException:  # also somebody's ctrl-C: what is left open would stand in the way of the next call
        engine.cancel([request.sample_id for request in requests])
        raise
    samples = [found[request.sample_id] for request in requests]
    columns, chats = [request.columns for request in requests], [request.chat for request in requests]
    return batch_of(samples, columns, chats, pad_token_id=pad_token_id)


def given_answer(request: Request, sampling: Sampling) -> Sample:
    """The answer that the request brings along, cut at `max_new_tokens`: no weights wrote it, and its
    log-probabilities say nothing."""
    answer = request.answer[: sampling.max_new_tokens]
    ended = "stop" if answer[-1] in sampling.stop_token_ids else "length"
    return Sample.answer(
        request.prompt_id, request.sample_id, request.token_ids, answer, [0.0] * len(answer), GIVEN, ended
    )
