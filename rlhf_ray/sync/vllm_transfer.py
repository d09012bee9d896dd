"""All of `sync/` that touches vLLM: our transports as its weight-transfer engines, and its trainer side.

Imported in two places: in vLLM's worker processes (named as `worker_extension_cls`, which registers the
engines there), and lazily in the learner for nccl and cuda_ipc. Works with vLLM 0.26 to 0.32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from rlhf_ray.sync.buckets import dtype_name, read
from rlhf_ray.sync.export import NamedTensor, ParamMeta
from rlhf_ray.sync.segment import AttachedSegments
from rlhf_ray.sync.sender import WeightClient
from rlhf_ray.sync.shared_memory import check_same_memory

# sync.transport -> vLLM's name of the weight-transfer backend.
BACKENDS = {
    "in_process": "rlhf_ray_in_process",
    "shared_memory": "rlhf_ray_shared_memory",
    "nccl": "nccl",
    "cuda_ipc": "ipc",
}


class WorkerExtension:
    """Named in `worker_extension_cls`, so that a worker imports this module before it loads a model."""


# ---------------------------------------------------------------- receiver: engines inside vLLM's workers


@dataclass
class InProcessInit(WeightTransferInitInfo):
    transport: str


@dataclass
class SharedMemoryInit(WeightTransferInitInfo):
    transport: str
    probe: str
    nonce: str


@dataclass
class InProcessUpdate(WeightTransferUpdateInfo):
    names: list[str]
    tensors: list[Tensor]
    index: int
    last: bool
    given_up: bool = False


@dataclass
class SharedMemoryUpdate(WeightTransferUpdateInfo):
    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    offsets: list[int]
    nbytes: int
    segment: str
    index: int
    last: bool
    given_up: bool = False


# The update whose sender was lost ends with this message, by transport; what it leaves is replaced by the next one.
GIVEN_UP: dict[str, dict[str, Any]] = {
    "in_process": {"names": [], "tensors": [], "index": 0, "last": True, "given_up": True},
    "shared_memory": {
        "names": [], "dtype_names": [], "shapes": [], "offsets": [], "nbytes": 0, "segment": "", "index": 0,
        "last": True, "given_up": True,
    },
}  # fmt: skip


class CheckpointEngine(WeightTransferEngine):
    """Loads Hugging Face names through vLLM's layer-wise reload, and refuses to finish with a hole, unless the update
    was given up."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._expected = {name for name, _ in self.model.named_parameters()}
        self._loaded: set[str] = set()
        self._given_up = False

    def init_transfer_engine(self, init_info: Any) -> None:
        pass

    def start_weight_update(self) -> None:
        # Weights are packed for the kernels (on CPU the parameter is even empty): they can only be loaded
        # between these two calls of the reload module.
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self._loaded, self._given_up = set(), False
        initialize_layerwise_reload(self.model)

    def load(self, pairs: Iterable[NamedTensor]) -> None:
        loaded = self.model.load_weights(pairs)
        # Few old model classes return nothing; then there is nothing to check either.
        self._loaded |= self._expected if loaded is None else set(loaded)

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        missing = sorted(self._expected - self._loaded)
        if missing and not self._given_up:
            # vLLM would log a line and keep the old values.
            raise RuntimeError(f"{len(missing)} parameters were not sent, among them {missing[:3]}")
        finalize_layerwise_reload(self.model, self.model_config)
        repack_tied_head(self.model)

    def receive_weights(self, update_info: Any) -> None:
        self._given_up = update_info.given_up
        if not self._given_up:
            self.load(self.pairs(update_info))

    def pairs(self, update_info: Any) -> Iterable[NamedTensor]:
        raise NotImplementedError

    def shutdown(self) -> None:
        pass

    @staticmethod
    def trainer_send_weights(iterator: Iterator[Any], trainer_args: Any) -> None:
        """Abstract in vLLM 0.26; our senders live in the learner instead."""
        raise NotImplementedError("send with rlhf_ray.sync.factory.make_sender")


class InProcessEngine(CheckpointEngine):
    init_info_cls = InProcessInit
    update_info_cls = InProcessUpdate

    def pairs(self, update_info: InProcessUpdate) -> Iterable[NamedTensor]:
        return zip(update_info.names, update_info.tensors, strict=True)


class SharedMemoryEngine(CheckpointEngine):
    init_info_cls = SharedMemoryInit
    update_info_cls = SharedMemoryUpdate

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._segments = AttachedSegments()

    def init_transfer_engine(self, init_info: SharedMemoryInit) -> None:
        check_same_memory(init_info.probe, init_info.nonce)

    def pairs(self, update_info: SharedMemoryUpdate) -> Iterable[NamedTensor]:
        shared = self._segments.flat(update_info.segment, update_info.nbytes)[: update_info.nbytes]
        # vLLM keeps references until a layer is complete, which may be buckets later; by then the sender has
        # filled the segment anew.
        own = shared.clone() if self.device.type == "cpu" else shared.to(self.device)
        return read(own, update_info.names, update_info.dtype_names, update_info.shapes, update_info.offsets)

    def shutdown(self) -> None:
        self._segments.close()


def repack_tied_head(model: torch.nn.Module) -> None:
    """Pack an output head again that shares the embeddings' storage.

    On CPU the head keeps a packed copy. A sync that sends only the embeddings' name changes the shared weight
    and not the copy: log-probabilities off by nats, and no error.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    heads = [m for m in model.modules() if isinstance(m, ParallelLMHead)]
    embeddings = [
        m for m in model.modules() if isinstance(m, VocabParallelEmbedding) and not isinstance(m, ParallelLMHead)
    ]
    for head in heads:
        tied = any(getattr(head, "weight", None) is getattr(e, "weight", None) for e in embeddings)
        process = getattr(head.quant_method, "process_weights_after_loading", None)
        if tied and process is not None:
            process(head)


def register() -> None:
    """Make our engines known to vLLM in this process; harmless when repeated."""
    for name, engine in (
        (BACKENDS["in_process"], InProcessEngine),
        (BACKENDS["shared_memory"], SharedMemoryEngine),
    ):
        with contextlib.suppress(ValueError):  # registered before
            WeightTransferEngineFactory.register_engine(name, engine)


register()


# ---------------------------------------------------------------- sender: vLLM's own trainer side


@dataclass(frozen=True)
class Rendezvous:
    """Where the NCCL group meets: the sender is rank 0, the generators' workers follow."""

    address: str
    port: int
    world_size: int


# What the learner keeps between syncs: one call sends everything, another tears down.
Channel = tuple[Callable[[], None], Callable[[], None]]


@dataclass(frozen=True)
class ChannelPlan:
    """What a channel is made of. `stream` is iterated on every rank; `rendezvous` is for nccl."""

    backend: str  # of vLLM: ipc or nccl
    metadata: Callable[[], list[ParamMeta]]
    stream: Callable[[], Iterator[NamedTensor]]
    client: WeightClient
    rank: int
    buffer_bytes: int
    rendezvous: Rendezvous | None = None


def open_channel(plan: ChannelPlan) -> Channel:
    """Rendezvous with the generators; every learner rank calls it.

    Returns (send, shutdown): `send` iterates `stream` on every rank and drives start, update and finish.
    """
    # Trainer-side engines came after 0.26. The factory for them is there before, but nothing is registered in it;
    # what sends is a static method of the worker's engine.
    if plan.backend == "ipc":
        from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine as WorkerEngine
    else:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine as WorkerEngine
    old = hasattr(WorkerEngine, "trainer_send_weights")
    opener = _OPEN_WITH_STATIC_METHODS[plan.backend] if old else _open_with_trainer_engine
    return opener(plan)


def _open_with_trainer_engine(plan: ChannelPlan) -> Channel:
    from vllm.distributed.weight_transfer import WeightTransferTrainerFactory, base

    class ExportSource(base.WeightSource):
        """vLLM's ModuleSource gathers FSDP shards only; this one is whatever the learner exports."""

        def metadata(self) -> list[Any]:
            return [base.ParamMeta(m.name, m.dtype, m.shape) for m in plan.metadata()]

        def __iter__(self) -> Iterator[NamedTensor]:
            return plan.stream()

    info: Any
    if plan.backend == "ipc":
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        info = IPCTrainerInitInfo(rank=plan.rank, packed=True, packed_buffer_size_bytes=plan.buffer_bytes)
    else:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        assert plan.rendezvous is not None
        info = NCCLTrainerInitInfo(
            rank=plan.rank,
            master_address=plan.rendezvous.address,
            master_port=plan.rendezvous.port,
            world_size=plan.rendezvous.world_size,
            packed=True,
            packed_buffer_size_bytes=plan.buffer_bytes,
        )
    engine = WeightTransferTrainerFactory.trainer_init(info, client=plan.client, source=ExportSource())
    return engine.send_weights, engine.shutdown


def _open_ipc_0_26(plan: ChannelPlan) -> Channel:
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerSendWeightsArgs, IPCWeightTransferEngine

    if plan.rank == 0:
        plan.client.init_weight_transfer_engine({})
    arguments = IPCTrainerSendWeightsArgs(
        send_mode=lambda info: plan.client.update_weights(asdict(info)),
        packed=True,
        packed_buffer_size_bytes=plan.buffer_bytes,
    )

    def send() -> None:
        if plan.rank == 0:
            plan.client.start_weight_update()
        IPCWeightTransferEngine.trainer_send_weights(plan.stream(), arguments)
        if plan.rank == 0:
            plan.client.finish_weight_update()

    return send, lambda: None


def _open_nccl_0_26(plan: ChannelPlan) -> Channel:
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine
    from vllm.distributed.weight_transfer.packed_tensor import DEFAULT_PACKED_NUM_BUFFERS

    if plan.rank != 0:
        return lambda: _iterate(plan.stream()), lambda: None
    assert plan.rendezvous is not None
    meeting = {
        "master_address": plan.rendezvous.address,
        "master_port": plan.rendezvous.port,
        "world_size": plan.rendezvous.world_size,
    }
    packing = {
        "packed": True,
        "packed_buffer_size_bytes": plan.buffer_bytes,
        "packed_num_buffers": DEFAULT_PACKED_NUM_BUFFERS,
    }
    # Workers block in the rendezvous until the trainer joins, hence the thread.
    with ThreadPoolExecutor(max_workers=1) as caller:
        joined = caller.submit(plan.client.init_weight_transfer_engine, {**meeting, "rank_offset": 1})
        group = NCCLWeightTransferEngine.trainer_init(meeting)
        joined.result()

    def send() -> None:
        meta = plan.metadata()
        update = {
            "names": [m.name for m in meta],
            "dtype_names": [dtype_name(m.dtype) for m in meta],
            "shapes": [list(m.shape) for m in meta],
            **packing,
        }
        plan.client.start_weight_update()
        caller = ThreadPoolExecutor(max_workers=1)
        try:
            received = caller.submit(plan.client.update_weights, update)
            if received.done():
                received.result()  # refused before any NCCL call: a broadcast would wait forever
            NCCLWeightTransferEngine.trainer_send_weights(plan.stream(), {"group": group, **packing})
            received.result()
        finally:
            # After a failed broadcast the receiver never returns: waiting for it would hide the error.
            caller.shutdown(wait=False)
        plan.client.finish_weight_update()
        torch.cuda.current_stream().synchronize()

    return send, lambda: None


_OPEN_WITH_STATIC_METHODS = {"ipc": _open_ipc_0_26, "nccl": _open_nccl_0_26}


def _iterate(pairs: Iterator[NamedTensor]) -> None:
    for _ in pairs:
        pass
