"""Who generates what: a step's requests cut into pieces, without changing what is sampled."""

from __future__ import annotations

import numpy as np

from rlhf_ray.roles.requests import Requests


def fixed_pieces(requests: Requests, size: int) -> list[Requests]:
    """For the hf engine: the very batches that a single generator would form, so the sums inside are the same."""
    return [requests[i : i + size] for i in range(0, len(requests), size)]


def even_pieces(requests: Requests, count: int, new_tokens: int) -> list[Requests]:
    """For vllm, which batches by itself: `count` pieces (fewer if there are fewer groups), equal in tokens.

    A group stays together, for its members share the prompt's cache. `new_tokens` each answer may have.
    """
    groups = [0, *(1 + np.flatnonzero(np.diff(requests.prompt_id))).tolist()]
    ends = [*groups[1:], len(requests)]
    prompts = requests.prompt[groups].tolist()
    costs = [
        (end - group) * (len(requests.tokens[prompt]) + new_tokens)
        for group, end, prompt in zip(groups, ends, prompts, strict=True)
    ]
    total, so_far, starts = sum(costs), 0, [0]
    for group, cost in zip(groups, costs, strict=True):
        # A group begins the next piece where its middle has passed the next even share.
        if group > starts[-1] and len(starts) < count and so_far + cost / 2 >= total * len(starts) / count:
            starts.append(group)
        so_far += cost
    return [requests[a:b] for a, b in zip(starts, [*starts[1:], len(requests)], strict=True)]
