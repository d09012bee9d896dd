"""The worker that handles whole batches and needs no model: puts pieces together, estimates advantages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from torch import Tensor

from rlhf_ray.batch import Batch, gather
from rlhf_ray.config.algorithm import AlgorithmConfig
from rlhf_ray.remote.batch import joined
from rlhf_ray.remote.failures import reported
from rlhf_ray.remote.host import Host
from rlhf_ray.roles.advantages import AdvantageEstimator


@dataclass(frozen=True)
class Estimated:
    """The small part of `Estimate`, and the estimator's state after it."""

    names: tuple[str, ...]
    stats: Mapping[str, float]
    state: Mapping[str, Any]


class BatchHost(Host):
    @reported
    @ray.method(num_returns=2)
    def concatenate(self, *pieces: Batch) -> tuple[Batch, None]:
        return Batch.cat(pieces), None

    @reported
    @ray.method(num_returns=2)
    def gather(self, rows: Sequence[Sequence[int]], *batches: Batch) -> tuple[Batch, None]:
        return gather(list(zip(batches, rows, strict=True))), None

    @reported
    @ray.method(num_returns=2)
    def estimate(
        self, algorithm: AlgorithmConfig, state: Mapping[str, Any], kl_coef: float, *batch: Any
    ) -> tuple[dict[str, Tensor], Estimated]:
        estimator = AdvantageEstimator(algorithm)
        estimator.load_state_dict(state)
        estimate = estimator.estimate(joined(*batch), kl_coef)
        return estimate.columns, Estimated(tuple(estimate.columns), estimate.stats, estimator.state_dict())
