"""Who generates what: a step's requests cut into pieces, without changing what is sampled."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_ray.roles.protocols import Request


def fixed_pieces(requests: Sequence[Request], size: int) -> list[Sequence[Request]]:
    """For the hf engine: the very batches that a single generator would form, so the sums inside are the same."""
    return [requests[i : i + size] for i in range(0, len(requests), size)]


def even_pieces(requests: Sequence[Request], count: int, new_tokens: int) -> list[Sequence[Request]]:
    """For vllm, which batches by itself: `count` pieces (fewer if there are fewer groups), equal in tokens.

    A group stays together, for its members share the prompt's cache. `new_tokens` each answer may have.
    """
    groups: list[int] = [i for i, r in enumerate(requests) if i == 0 or r.prompt_id != requests[i - 1].prompt_id]
    costs = [len(r.token_ids) + new_tokens for r in requests]
    total, so_far, starts = sum(costs), 0, [0]
    for group, end in zip(groups, [*groups[1:], len(requests)], strict=True):
        # A group begins the next piece where its middle has passed the next even share.
        middle = so_far + sum(costs[group:end]) / 2
        if group > starts[-1] and len(starts) < count and middle >= total * len(starts) / count:
            starts.append(group)
        so_far += sum(costs[group:end])
    return [requests[a:b] for a, b in zip(starts, [*starts[1:], len(requests)], strict=True)]
