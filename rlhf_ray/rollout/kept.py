"""Steps that are ready and that nobody has learned from, as plain data for a checkpoint.

What a batch's prompts say is not part of it: the prompt stream has it again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rlhf_ray.roles.batch import Batch
from rlhf_ray.roles.protocols import Request, Scores
from rlhf_ray.rollout.ledger import Outcome


@dataclass(frozen=True)
class Scored:
    """One step's rollouts with their rewards attached."""

    batch: Batch
    scores: Scores
    metrics: dict[str, float]
    outcomes: Mapping[int, Outcome]  # what becomes of each prompt that was asked, by its position
    sources: tuple[str, ...] = ()  # each row's, where there are several


def plain(scored: Scored) -> dict[str, Any]:
    """Tensors, numbers and texts; `from_plain` reads them."""
    batch = {name: value for name, value in _fields(scored.batch).items() if isinstance(value, Tensor)}
    scores = {**_fields(scored.scores), "events": [dict(event) for event in scored.scores.events]}
    rest = {"metrics": dict(scored.metrics), "outcomes": dict(scored.outcomes), "sources": scored.sources}
    return {"batch": batch, "scores": scores, **rest}


def from_plain(state: Mapping[str, Any], requests: Sequence[Request]) -> Scored:
    """`requests`: one for each row, for what its prompt says."""
    texts = {"columns": tuple(r.columns for r in requests), "chats": tuple(r.chat for r in requests)}
    scores = Scores(**{**state["scores"], "events": tuple(state["scores"]["events"])})
    rest = {name: state[name] for name in ("metrics", "outcomes", "sources")}
    return Scored(Batch(**state["batch"], **texts), scores, **rest)


def _fields(record: Any) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
