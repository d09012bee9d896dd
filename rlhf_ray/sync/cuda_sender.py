"""Transports `nccl` and `cuda_ipc`: thin senders over vLLM's own trainer engines.

Not run on hardware by this project's tests, which replace `open_channel`; see benchmarks/gpu.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from rlhf_ray.errors import ConfigError, RlhfRayError, SyncError
from rlhf_ray.sync.export import NamedTensor, ParamMeta, WeightSource, describe
from rlhf_ray.sync.sender import NOTHING_EXPORTED, SyncStats, WeightClient, exhaust

BACKENDS = {"nccl": "nccl", "cuda_ipc": "ipc"}


class CudaSender:
    """Sends by an NCCL broadcast (`nccl`: any placement) or shared GPU memory (`cuda_ipc`: the same GPU).

    Args:
        receivers: GPU workers of all generators together (generators x tensor parallel size).
        address: host name or address of the learner's rank 0, as the generators see it (nccl).
    """

    def __init__(
        self,
        transport: str,
        *,
        capacity: int,
        rank: int = 0,
        receivers: int = 1,
        address: str | None = None,
        device: torch.device | str = "cuda",
    ) -> None:
        self.transport = transport
        self.capacity = capacity
        self.rank = rank
        self.receivers = receivers
        self.address = address
        self.device = torch.device(device)
        self._source: WeightSource | None = None
        self._active: Iterator[NamedTensor] = iter(())  # the export under way
        self._metadata: list[ParamMeta] | None = None
        self._client: WeightClient | None = None
        self._versioned: VersionedClient | None = None
        self._channel: tuple[Callable[[], None], Callable[[], None]] | None = None

    def send(self, source: WeightSource, client: WeightClient, version: int) -> SyncStats:
        started = time.perf_counter()
        self._source = source
        if self.device.type == "cuda":
            # vLLM's senders read on streams of their own, which do not wait for the optimiser's.
            torch.cuda.synchronize(self.device)
        try:
            if self._metadata is None:
                # One extra pass on the first sync: NCCL receivers size their buffers before the first byte.
                self._metadata = describe(source())
            if not self._metadata:
                raise SyncError(NOTHING_EXPORTED)
            if self._channel is None or self._client is not client:
                self._open(client)
            assert self._channel is not None and self._versioned is not None
            self._versioned.version, self._versioned.calls = version, 0
            self._channel[0]()
        except Exception as error:
            # Not shut down: destroying a communicator whose peer hangs would hang too.
            self._channel = None
            exhaust(self._active)
            if isinstance(error, RlhfRayError):
                raise
            raise SyncError(
                f"weight sync ({self.transport}) of version {version} failed: {type(error).__name__}: {error}; the "
                "generators hold half of the new weights and must be replaced"
            ) from error
        nbytes = sum(_nbytes(m) for m in self._metadata) if self.rank == 0 else 0
        return SyncStats(time.perf_counter() - started, nbytes / 1e9, self._versioned.calls)

    def _open(self, client: WeightClient) -> None:
        vllm = _vllm_side()
        self.reset()
        self._client, self._versioned = client, VersionedClient(client)
        meeting = None
        if self.transport == "nccl":
            address = self.address or own_address()
            meeting = vllm.Rendezvous(address=address, port=free_port(), world_size=1 + self.receivers)
        plan = vllm.ChannelPlan(
            backend=BACKENDS[self.transport],
            metadata=lambda: self._metadata or [],
            stream=self._stream,
            client=self._versioned,
            rank=self.rank,
            buffer_bytes=max(self.capacity, *(_nbytes(m) for m in self._metadata or [])),
            rendezvous=meeting,
        )
        with _stream_kept(self.device):
            self._channel = vllm.open_channel(plan)

    def _stream(self) -> Iterator[NamedTensor]:
        assert self._source is not None
        self._active = iter(self._source())
        for name, tensor in self._active:
            yield name, tensor.detach().to(self.device)  # ZeRO offload exports from the host

    def reset(self) -> None:
        if self._channel is not None:
            self._channel[1]()
        self._channel, self._client, self._versioned = None, None, None

    def close(self) -> None:
        self.reset()


class VersionedClient:
    """Adds the weight version, which vLLM's trainer engines do not pass on, and counts the calls."""

    def __init__(self, client: WeightClient) -> None:
        self.client = client
        self.version = 0
        self.calls = 0

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.client.init_weight_transfer_engine(init_info)

    def start_weight_update(self) -> None:
        self.client.start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.calls += 1
        self.client.update_weights(update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.client.finish_weight_update(str(self.version) if weight_version is None else weight_version)


@contextlib.contextmanager
def _stream_kept(device: torch.device) -> Iterator[None]:
    """vLLM moves its thread to a stream of its own for good; DeepSpeed, which comes next, assumes the default one."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.current_stream(device)
    try:
        yield
    finally:
        torch.cuda.set_stream(stream)


def _vllm_side() -> Any:
    """The module that knows vLLM, or what stands for it in a test."""
    try:
        from rlhf_ray.sync import vllm_transfer
    except ImportError as error:
        raise ConfigError(
            f"sync.transport=nccl and cuda_ipc use vLLM's trainer side, which does not import here ({error}); "
            "install rlhf-ray[vllm] (and ray, which vLLM 0.26 needs for IPC) where the learner runs, or set "
            "sync.transport=shared_memory"
        ) from error
    return vllm_transfer


def _nbytes(meta: ParamMeta) -> int:
    count = meta.dtype.itemsize
    for size in meta.shape:
        count *= size
    return count


def own_address() -> str:
    """This host's address on the network it would leave by; loopback where there is no network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # a documentation address: nothing is sent
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"


def free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def shift_ranks(init_info: dict[str, Any], workers_before: int) -> dict[str, Any]:
    """The handshake for one generator: with nccl, its workers' ranks follow those of the ones before."""
    if "rank_offset" not in init_info:
        return init_info
    return {**init_info, "rank_offset": init_info["rank_offset"] + workers_before}
