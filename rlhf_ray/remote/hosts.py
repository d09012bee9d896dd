"""What runs inside the actors: one host class a role, each holding the very object that a local run would use.

Batches arrive as `RemoteBatch.arguments()`. Per-token results are returned as the first of two values, so that
the driver can wait for the second without ever touching the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from torch import Tensor

from rlhf_ray.batch import Batch, Rows
from rlhf_ray.config.schema import RunConfig
from rlhf_ray.remote.batch import joined
from rlhf_ray.remote.failures import reported
from rlhf_ray.remote.host import Host
from rlhf_ray.roles.factory import (
    Assets,
    Rank,
    make_critic,
    make_generator,
    make_learner,
    make_reference,
    make_reward,
)
from rlhf_ray.roles.protocols import Request, Sampling, Scores
from rlhf_ray.roles.sft_term import SFTRows

if TYPE_CHECKING:
    from rlhf_ray.sync.sender import WeightClient

Kept = tuple[Tensor | None, None]


class GeneratorHost(Host):
    @reported
    def build(self, config: RunConfig, assets: Assets, transport: str) -> None:
        self.role = make_generator(config, assets, transport)

    @reported
    @ray.method(num_returns=2)
    def generate(self, requests: Sequence[Request], sampling: Sampling) -> tuple[Batch, Rows]:
        batch = self.role.generate(requests, sampling)
        return batch, batch.rows

    @reported
    def logprobs(self, tokens: Sequence[Sequence[int]]) -> list[list[float]]:
        return self.role.logprobs(tokens)

    @reported
    def version(self) -> int:
        return self.role.version

    @reported
    def sleep(self) -> None:
        self.role.sleep()

    @reported
    def wake(self) -> None:
        self.role.wake()

    @reported
    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.role.init_weight_transfer_engine(init_info)

    @reported
    def start_weight_update(self) -> None:
        self.role.start_weight_update()

    @reported
    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.role.update_weights(update_info)

    @reported
    def finish_weight_update(self, weight_version: str | None) -> None:
        self.role.finish_weight_update(weight_version)

    @reported
    def shut_down(self) -> None:
        self.role.close()


class TrainerHost(Host):
    """A rank of a training group. Collective: every rank gets every call, with the whole batch."""

    rank: Rank

    def kept(self, values_BT: Tensor) -> Kept:
        """All ranks hold the same sum: one copy is enough."""
        return (values_BT if self.rank.rank == 0 else None), None

    @reported
    def save(self, folder: Path) -> None:
        self.role.save(folder)

    @reported
    def load(self, folder: Path) -> None:
        self.role.load(folder)

    @reported
    def shut_down(self) -> None:
        self.role.engine.close()


class LearnerHost(TrainerHost):
    @reported
    def build(
        self, config: RunConfig, assets: Assets, transport: str, sft: SFTRows | None, rank: Rank
    ) -> None:
        self.rank = rank
        self.release_port()
        self.role = make_learner(config, assets, transport, sft, rank)

    @reported
    def connect(self, generators: WeightClient) -> None:
        self.role.connect(generators)

    @reported
    @ray.method(num_returns=2)
    def logprobs(self, *batch: Any) -> Kept:
        return self.kept(self.role.logprobs(joined(*batch)))

    @reported
    @ray.method(num_returns=2)
    def reference_logprobs(self, *batch: Any) -> Kept:
        return self.kept(self.role.reference_logprobs(joined(*batch)))

    @reported
    def update(self, step: int, kl_coef: float, *batch: Any) -> dict[str, float]:
        return self.role.update(joined(*batch), step, kl_coef)

    @reported
    def push_weights(self, version: int) -> dict[str, float]:
        return self.role.push_weights(version)

    @reported
    def canary_logprobs(self, tokens: Sequence[Sequence[int]]) -> list[list[float]]:
        return self.role.canary_logprobs(tokens)

    @reported
    def export_model(self, folder: Path) -> None:
        self.role.export_model(folder)

    @reported
    def export_adapter(self, folder: Path) -> None:
        self.role.export_adapter(folder)

    @reported
    def shut_down(self) -> None:
        self.role.sender.close()
        self.role.engine.close()


class CriticHost(TrainerHost):
    @reported
    def build(self, config: RunConfig, assets: Assets, rank: Rank) -> None:
        self.rank = rank
        self.release_port()
        self.role = make_critic(config, assets, rank)

    @reported
    @ray.method(num_returns=2)
    def values(self, *batch: Any) -> Kept:
        return self.kept(self.role.values(joined(*batch)))

    @reported
    def update(self, step: int, *batch: Any) -> dict[str, float]:
        return self.role.update(joined(*batch), step)


class ReferenceHost(Host):
    @reported
    def build(self, config: RunConfig, assets: Assets) -> None:
        self.role = make_reference(config, assets)

    @reported
    @ray.method(num_returns=2)
    def logprobs(self, *batch: Any) -> Kept:
        return self.role.logprobs(joined(*batch)), None


class RewardHost(Host):
    @reported
    def build(self, config: RunConfig, assets: Assets) -> None:
        self.role = make_reward(config, assets)

    @reported
    def score(self, texts: int, *batch: Any) -> Scores:
        return self.role.score(joined(*batch), texts)
