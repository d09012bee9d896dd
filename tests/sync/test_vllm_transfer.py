"""Our use of vLLM's trainer side, both generations of its interface, with the GPU calls replaced."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from rlhf_ray.models.pretrained import plain_state
from rlhf_ray.sync.export import describe

pytestmark = [pytest.mark.engine, pytest.mark.skipif(sys.platform != "linux", reason="vLLM runs on Linux only")]


@pytest.fixture(scope="module")
def transfer():
    from rlhf_ray.sync import vllm_transfer

    return vllm_transfer


@pytest.fixture
def opened(transfer, make_tied, recorder):
    """open_channel(backend, rank) over a small module."""
    module = make_tied(1)

    def open_channel(backend, rank=0):
        meeting = transfer.Rendezvous("10.0.0.1", 2900, 3) if backend == "nccl" else None
        plan = transfer.ChannelPlan(
            backend=backend,
            metadata=lambda: describe(plain_state(module)),
            stream=lambda: iter(plain_state(module)),
            client=recorder,
            rank=rank,
            buffer_bytes=4096,
            rendezvous=meeting,
        )
        return transfer.open_channel(plan)

    return open_channel


def test_our_engines_are_registered_and_registering_twice_is_harmless(transfer):
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    transfer.register()
    for transport in ("in_process", "shared_memory", "nccl", "cuda_ipc"):
        assert transfer.BACKENDS[transport] in WeightTransferEngineFactory._registry


def trainer_engines():
    from vllm.distributed.weight_transfer import ipc_engine

    if not hasattr(ipc_engine, "IPCTrainerInitInfo"):
        pytest.skip("this vLLM has no trainer engines")


def test_nccl_through_trainer_engine(transfer, opened, recorder, monkeypatch):
    trainer_engines()
    from vllm.distributed.weight_transfer import nccl_engine

    joined, sent = [], []
    group = types.SimpleNamespace(destroy=lambda: sent.append("destroyed"))
    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: joined.append(info) or group)
    monkeypatch.setattr(
        nccl_engine,
        "packed_nccl_broadcast_producer",
        lambda iterator, **given: sent.extend([n for n, _ in iterator] + [given["buffer_size_bytes"]]),
    )
    send, shutdown = opened("nccl")
    assert (joined[0].master_address, joined[0].master_port, joined[0].world_size) == ("10.0.0.1", 2900, 3)
    init = recorder.calls[0][1]
    assert init["rank_offset"] == 1 and init["world_size"] == 3 and init["packed"] is True
    send()
    assert recorder.order == ["init", "start", "update", "finish"]
    update = recorder.calls[2][1]
    assert update["names"] == ["embed.weight", "body.weight", "body.bias", "head.weight"]
    assert update["dtype_names"] == ["float32"] * 4 and update["shapes"][1] == [2, 2]
    assert sent == [*update["names"], 4096]
    shutdown()
    assert sent[-1] == "destroyed"


def fake_gpu(monkeypatch, engine_module):
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(uuid="gpu-0"))
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def producer(iterator, gpu_uuid, **given):
        for name, tensor in iterator:
            yield types.SimpleNamespace(
                ipc_handle={gpu_uuid: ("handle", name)},
                names=[name],
                dtype_names=["float32"],
                shapes=[list(tensor.shape)],
                tensor_sizes=[tensor.numel() * 4],
            )

    monkeypatch.setattr(engine_module, "packed_ipc_producer", producer)


def test_ipc_through_trainer_engine(transfer, opened, recorder, monkeypatch):
    trainer_engines()
    from vllm.distributed.weight_transfer import ipc_engine

    fake_gpu(monkeypatch, ipc_engine)
    send, _ = opened("ipc")
    assert recorder.calls == [("init", {"packed": True})]
    send()
    assert recorder.order == ["init", "start", "update", "update", "update", "update", "finish"]
    first = recorder.calls[2][1]
    assert first["names"] == ["embed.weight"] and first["ipc_handles"] == {"gpu-0": ("handle", "embed.weight")}
    assert first["tensor_sizes"] == [32]


class Static:
    """The static methods that vLLM 0.26 had in place of trainer engines."""

    def __init__(self) -> None:
        self.sent: list = []

    def trainer_init(self, meeting):
        self.meeting = meeting
        return "group"

    def trainer_send_weights(self, iterator, arguments):
        names = [name for name, _ in iterator]
        self.sent.append((names, arguments))
        if not isinstance(arguments, dict):
            arguments.send_mode(Update(names=names, ipc_handles={"gpu-0": ()}, packed=True))


def Update(**fields):
    from dataclasses import make_dataclass

    return make_dataclass("Update", fields)(**fields)


@pytest.fixture
def vllm_0_26(monkeypatch, transfer):
    """As if the installed vLLM had the older interface."""
    from vllm.distributed.weight_transfer import ipc_engine, nccl_engine

    static = Static()
    monkeypatch.setattr(ipc_engine, "IPCWeightTransferEngine", static)
    monkeypatch.setattr(nccl_engine, "NCCLWeightTransferEngine", static)
    monkeypatch.setattr(ipc_engine, "IPCTrainerSendWeightsArgs", types.SimpleNamespace, raising=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(synchronize=lambda: None))
    return static


def test_nccl_through_static_methods(vllm_0_26, opened, recorder):
    send, _ = opened("nccl")
    assert vllm_0_26.meeting == {"master_address": "10.0.0.1", "master_port": 2900, "world_size": 3}
    # 0.26 knows no packing in the handshake: it refuses unknown keys
    assert recorder.calls == [("init", {**vllm_0_26.meeting, "rank_offset": 1})]
    send()
    assert recorder.order == ["init", "start", "update", "finish"]
    update = recorder.calls[2][1]
    assert update["packed"] is True and update["packed_buffer_size_bytes"] == 4096
    names, arguments = vllm_0_26.sent[0]
    assert names == update["names"] and arguments["group"] == "group"
    assert arguments["packed_buffer_size_bytes"] == 4096
    assert arguments["packed_num_buffers"] == update["packed_num_buffers"]


def test_ipc_through_static_methods(vllm_0_26, opened, recorder):
    send, _ = opened("ipc")
    assert recorder.calls == [("init", {})]
    send()
    assert recorder.order == ["init", "start", "update", "finish"]
    assert recorder.calls[2][1]["packed"] is True
    assert recorder.calls[2][1]["names"] == ["embed.weight", "body.weight", "body.bias", "head.weight"]
    assert vllm_0_26.sent[0][1].packed_buffer_size_bytes == 4096


@pytest.mark.parametrize("backend", ["nccl", "ipc"])
def test_static_methods_on_other_ranks(vllm_0_26, opened, recorder, backend):
    send, _ = opened(backend, rank=1)
    vllm_0_26.trainer_send_weights = lambda iterator, _: list(iterator)
    send()
    assert recorder.calls == []
