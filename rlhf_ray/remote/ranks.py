"""Ranks: processes that meet to train one network, at the start of a run and when others take their seats."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from rlhf_ray.remote.calls import Worker
from rlhf_ray.remote.host import Place
from rlhf_ray.remote.processes import Step
from rlhf_ray.roles.factory import Rank

RankSteps = Callable[[Mapping[str, Place]], Sequence[Step]]


def rank_steps(
    ranks: Sequence[Worker], build: Callable[..., Any], given: Sequence[Any], deadline_s: float
) -> dict[str, RankSteps]:  # fmt: skip
    """By name of the seat: what its process must do, given where all of them are. They meet at the first one's.

    Args:
        build: of their host; called with `given`, and then the rank.
        deadline_s: of their collectives.
    """
    names = [rank.name for rank in ranks]

    def steps(number: int, places: Mapping[str, Place]) -> Sequence[Step]:
        first = places[names[0]]
        return [(build, (*given, Rank(number, len(names), first.node, first.port, deadline_s)))]

    return {name: partial(steps, number) for number, name in enumerate(names)}
