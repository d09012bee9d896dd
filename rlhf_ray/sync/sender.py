"""The learner's side of a weight sync: one interface for all transports, the loop they share, and the plainest one."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from rlhf_ray.errors import RlhfRayError, SyncError
from rlhf_ray.sync.buckets import BucketLayout
from rlhf_ray.sync.export import NamedTensor, WeightSource

NOTHING_EXPORTED = (
    "weight sync: the learner exported no tensor, so the generator would keep its old weights; pass engine.export, "
    "which yields (name, tensor) pairs"
)


@dataclass(frozen=True)
class SyncStats:
    """What one sync cost. Ranks other than 0 send nothing: their gigabytes and buckets are 0."""

    seconds: float
    gigabytes: float  # 1e9 bytes
    buckets: int

    @property
    def gigabytes_per_second(self) -> float:
        return self.gigabytes / self.seconds if self.seconds > 0 else 0.0


class WeightClient(Protocol):
    """vLLM's four weight-transfer calls, answered by one generator or by a fan-out to many."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...
    def start_weight_update(self) -> None: ...
    def update_weights(self, update_info: dict[str, Any]) -> None: ...
    def finish_weight_update(self, weight_version: str | None = None) -> None: ...


class WeightSender(Protocol):
    """Lives in the learner, one on each rank."""

    def send(self, source: WeightSource, client: WeightClient, version: int) -> SyncStats:
        """Push all of `source` as weight `version`. Every rank calls it; only rank 0 talks to `client`.

        Raises SyncError, or what the client raised if that is one of this package's errors; the receivers
        must then be taken for broken.
        """

    def reset(self) -> None:
        """Forget the handshake: the next `send` does it again. Call it when a generator was replaced."""

    def close(self) -> None:
        """Free segments and communicators."""


class BucketSender:
    """The shared part of transports that move buckets by calls: handshake, count, clean failure."""

    transport = ""

    def __init__(self, *, capacity: int, rank: int = 0) -> None:
        self.capacity = capacity
        self.rank = rank
        self._client: WeightClient | None = None

    def init_info(self) -> dict[str, Any]:
        """What the receivers must know before the first bucket."""
        return {"transport": self.transport}

    def send_buckets(self, pairs: Iterator[NamedTensor], client: WeightClient) -> tuple[int, int]:
        """Send everything; returns (buckets, bytes)."""
        raise NotImplementedError

    def send(self, source: WeightSource, client: WeightClient, version: int) -> SyncStats:
        started = time.perf_counter()
        pairs = iter(source())
        if self.rank != 0:
            exhaust(pairs)
            return SyncStats(time.perf_counter() - started, 0.0, 0)
        try:
            if self._client is not client:
                self.reset()
                client.init_weight_transfer_engine(self.init_info())
                self._client = client
            client.start_weight_update()
            buckets, nbytes = self.send_buckets(pairs, client)
            if not buckets:
                raise SyncError(NOTHING_EXPORTED)
            client.finish_weight_update(str(version))
        except Exception as error:
            self.reset()
            exhaust(pairs)
            if isinstance(error, RlhfRayError):
                raise
            raise SyncError(
                f"weight sync ({self.transport}) of version {version} failed: {type(error).__name__}: {error}; the "
                "generators hold half of the new weights and must be replaced"
            ) from error
        return SyncStats(time.perf_counter() - started, nbytes / 1e9, buckets)

    def reset(self) -> None:
        self._client = None

    def close(self) -> None:
        self.reset()


def exhaust(pairs: Iterable[tuple[str, Tensor]]) -> None:
    """Iterate to the end: the other ranks' gathers wait for this rank, also when it has nothing to send."""
    for _ in pairs:
        pass


class InProcessSender(BucketSender):
    """Transport `in_process`: learner and generator share one process, tensors travel by reference."""

    transport = "in_process"

    def send_buckets(self, pairs: Iterator[NamedTensor], client: WeightClient) -> tuple[int, int]:
        layout, tensors, sent, nbytes = BucketLayout(), [], 0, 0
        for name, tensor in pairs:
            if not layout.takes(tensor, self.capacity):
                client.update_weights(_message(layout, tensors, sent, last=False))
                sent, nbytes = sent + 1, nbytes + layout.nbytes
                layout, tensors = BucketLayout(), []
            layout.append(name, tensor)
            # A gathered or merged tensor is only good until the next one is asked for, and vLLM keeps what it
            # gets until a layer is complete.
            tensors.append(tensor.detach().clone())
        if tensors:
            client.update_weights(_message(layout, tensors, sent, last=True))
            sent, nbytes = sent + 1, nbytes + layout.nbytes
        return sent, nbytes


def _message(layout: BucketLayout, tensors: list[Tensor], index: int, *, last: bool) -> dict[str, Any]:
    return {"names": layout.names, "tensors": tensors, "index": index, "last": last}
