"""Answers that nobody samples: members of a group that come from the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rlhf_ray.batch import Batch, build_batch
from rlhf_ray.roles.protocols import Request, Sampling


def with_given_answers(
    generate: Callable[[Sequence[Request], Sampling], Batch],
    requests: Sequence[Request],
    sampling: Sampling,
    pad_token_id: int,
) -> Batch:
    """One row a request, in order: `generate`'s, and the answers that requests bring along.

    Such an answer is cut at `max_new_tokens`. No weights wrote it, so its `weight_version` is -1, and its `logp_gen`
    says nothing.
    """
    given = [i for i, request in enumerate(requests) if request.answer is not None]
    if not given:
        return generate(requests, sampling)
    sampled = [i for i, request in enumerate(requests) if request.answer is None]
    answers = [requests[i].answer[: sampling.max_new_tokens] for i in given]
    rows = build_batch(
        [requests[i] for i in given],
        answers,
        [[0.0] * len(answer) for answer in answers],
        truncated=[answer[-1] not in sampling.stop_token_ids for answer in answers],
        weight_version=-1,
        pad_token_id=pad_token_id,
    )
    parts = [generate([requests[i] for i in sampled], sampling), rows] if sampled else [rows]
    places = {request: place for place, request in enumerate([*sampled, *given])}
    return Batch.cat(parts).select([places[i] for i in range(len(requests))])
