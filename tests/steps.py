"""A step of a learner or critic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf_ray.roles.batch import Batch


def one_step(
    role: Any, batch: Batch, step: int, *kl_coef: float, waves: Sequence[Sequence[int]] = ()
) -> dict[str, float]:
    """With all rows at once, or streamed, with these rows in each wave."""
    role.begin(step, *kl_coef, streamed=bool(waves))
    for part in [batch.select(rows) for rows in waves] or [batch]:
        role.learn(part)
    return role.finish()
